"""What guests are asked for, and with what."""

import pytest

from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.factory import GuestFactory

TOML = """
schema = 1
description = "An image of somebody's own"
architecture = "x86_64"
recipe = "build"
uses = []
requires = []
[boot]
append = ""
memory_min = "64MiB"
[system]
python = false
init = "busybox"
user = "debian"
"""


@pytest.fixture
def image_path(tmp_path):
    folder = tmp_path / "images" / "own"
    folder.mkdir(parents=True)
    (folder / "image.toml").write_text(TOML)
    (folder / "build").touch(mode=0o755)
    return (tmp_path / "images",)


class TestUser:
    @pytest.mark.parametrize(
        ("default", "wish", "user"),
        [
            (Hardware(), {}, "debian"),
            (Hardware(user="root"), {}, "root"),
            (Hardware(user="root"), {"user": "tester"}, "tester"),
            (Hardware(), {"user": "root"}, "root"),
        ],
    )
    def test_is_the_image_s_where_nobody_is_named(self, image_path, default, wish, user):
        settings = Settings(image_path=image_path, hardware=default)
        with GuestFactory.open(settings) as factory:
            assert factory._hardware("own", wish).user == user
