"""A guest that answers SSH and has no helper gets one while its template is made, and is cloned."""

import shutil

import pytest

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from support.helperless import bare

LOOK = "hostname; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n'"


@pytest.fixture
def lines():
    """What is said to people."""
    return []


@pytest.fixture
def factory(tmp_path, lines):
    """Makes guests of an image `bare`, which has no helper, and no init that could start one."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    (cache_dir() / "accelerator").mkdir(parents=True, exist_ok=True, mode=0o700)
    (cache / "accelerator").symlink_to(cache_dir() / "accelerator")
    tiny = ImageStore(cache_dir()).require(Catalogue().get("tiny"))
    bare(tmp_path / "images" / "bare", ImageStore(cache), tiny)
    settings = Settings(image_path=(tmp_path / "images",), cache=cache, clones="demand")
    with GuestFactory.open(settings, Announcer(lines.append)) as factory:
        yield factory
    shutil.rmtree(cache, ignore_errors=True)


def test_it_is_cloned_like_the_others(factory, lines):
    """Two clones differ, and in one of them the helper is there again after a reboot."""
    with factory.boot("bare") as one, factory.boot("bare") as other:
        assert [vm.origin for vm in (one, other)] == ["cloned", "cloned"]
        assert [line for line in lines if "cannot be cloned" in line] == []
        (name, random), (other_name, other_random) = (
            vm.shell(LOOK).stdout.splitlines() for vm in (one, other)
        )
        assert name != other_name
        assert random != other_random
        with one.snapshot():
            one.shell("touch /run/changed")
        assert one.run(["test", "-e", "/run/changed"], check=False).returncode == 1
        started = one.shell("echo $PATH; id -un", user="tester").stdout.splitlines()
        assert started[1] == "tester"
        one.reboot()
        assert one.shell("hostname; pidof helper | wc -w").stdout.split() == [name, "1"]
        one.engine.ping()
