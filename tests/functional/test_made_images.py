"""Images that are made in guests: they derive from `tiny`, or `tiny` comes from elsewhere and boots for the first time."""

import hashlib
import os
import shutil

import pytest

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.making import Build
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageState, ImageStore
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.images import changing
from pytest_vmsandbox.guests.images.maker import make_image
from pytest_vmsandbox.machine.disk import Disks
from support.images import DEFINITION

SCRIPT = """\
set -e
id -u
ls
cp motd /etc/motd
rm /etc/shells
"""


class World:
    """A cache of its own, with `tiny` in it, and a folder of definitions."""

    def __init__(self, folder):
        self.cache, self.definitions = folder / "cache", folder / "images"
        (cache_dir() / "accelerator").mkdir(parents=True, exist_ok=True, mode=0o700)
        self.cache.mkdir(mode=0o700)
        (self.cache / "accelerator").symlink_to(cache_dir() / "accelerator")
        shutil.copytree(
            cache_dir() / "images" / "tiny", self.cache / "images" / "tiny", copy_function=os.link
        )
        self.settings = Settings(image_path=(self.definitions,), cache=self.cache, clones="never")
        self.store = ImageStore(self.cache)
        self.tiny = self.store.require(Catalogue().get("tiny"))
        self.lines = []

    def define(self, name, text, **files):
        (self.definitions / name).mkdir(parents=True)
        for file, content in {"image.toml": text, **files}.items():
            (self.definitions / name / file).write_text(content)
        return Catalogue([self.definitions], self.cache).get(name)

    def make(self, definition):
        return make_image(definition, self.settings, progress=self.lines.append)


@pytest.fixture
def world(tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    world = World(tmp_path)
    yield world
    assert list(temporary.iterdir()) == []
    assert list(world.store.root.glob(".*")) == []
    world.tiny.verified()


def test_a_derived_image(world):
    text = 'schema = 1\ndescription = "More"\nfrom = "tiny"\n'
    text += '[add]\nscript = "setup.sh"\n[system]\nuser = "app"\n'
    definition = world.define("more", text, **{"setup.sh": SCRIPT, "motd": "hello\n"})
    image = world.make(definition)
    assert world.lines[:4] == [
        "tiny is built",
        "booting tiny",
        "adding the user app",
        "running setup.sh",
    ]
    assert "0\nimage.toml\nmotd\nsetup.sh\n" in (image.folder / "build.log").read_text()
    packages = image.folder / "packages.txt"
    assert packages.read_text() == (world.tiny.folder / "packages.txt").read_text()
    assert image.record()["found"] == {"python": "", "init": "busybox", "helper": True}
    with GuestFactory.open(world.settings) as factory, factory.boot("more") as vm:
        assert vm.run(["id", "-un"]).stdout == "app\n"
        assert vm.read_text("/etc/motd") == "hello\n"
        assert vm.run(["ls", "/etc/shells"], check=False).returncode != 0
        assert vm.run(["ls", "-A", "/root"], user="root").stdout == ""


def test_a_script_that_fails_leaves_nothing(world):
    text = 'schema = 1\ndescription = "Less"\nfrom = "tiny"\n[add]\nscript = "setup.sh"\n'
    script = "echo about to fail\necho because of this >&2\nexit 3\n"
    definition = world.define("less", text, **{"setup.sh": script})
    with pytest.raises(ImageError, match="making 'less' failed: .* ended with status 3") as raised:
        world.make(definition)
    assert raised.value.details.endswith("about to fail\nbecause of this")
    assert world.store.state(definition) is ImageState.MISSING
    assert world.store.folders_of("less") == []


def test_the_first_boot_of_a_system_from_elsewhere(world):
    tiny, source = world.tiny, []
    for key, file in (("kernel", tiny.kernel), ("initrd", tiny.initrd)):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        source.append(f'{key} = "{key}"\n{key}_sha256 = "{digest}"\n')
    text = (
        f'schema = 1\ndescription = "From elsewhere"\narchitecture = "{tiny.definition.architecture}"\n'
        f'[source]\n{"".join(source)}[boot]\nappend = "{tiny.definition.append}"\n'
        '[system]\npython = false\ninit = "busybox"\n'
    )
    definition = world.define("other", text)
    for key, file in (("kernel", tiny.kernel), ("initrd", tiny.initrd)):
        shutil.copyfile(file, definition.folder / key)
    image = world.make(definition)
    assert image.host_key == tiny.host_key
    assert image.record()["found"]["helper"] is True
    assert "booting it for the first time" in world.lines


@pytest.mark.parametrize("shares", [True, False], ids=["blocks are shared", "copied"])
def test_a_disk_and_what_was_written_become_one(tmp_path, monkeypatch, shares):
    if shares:  # as on a file system that can do it
        monkeypatch.setattr(changing, "_shares", lambda old, new: bool(shutil.copyfile(old, new)))
    for name in ("base", "out", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "disk.raw").write_bytes(b"a" * MIB + b"b" * MIB)
    base = BuiltImage(definition=DEFINITION, digest="", folder=tmp_path / "base")
    with (
        (tmp_path / "log").open("wb") as log,
        Disks.open(base=base.disk, root_size=4 * MIB, blank=[], folder=tmp_path) as disks,
    ):
        build = Build(
            definition=DEFINITION,
            out=tmp_path / "out",
            cache=tmp_path,
            work=tmp_path / "work",
            log=log,
            lock=log.fileno(),
            progress=print,
        )
        changing._write(build, b"c" * MIB, disks.overlays[0][0])
        changing._keep(build, base, disks)
    assert (tmp_path / "log").read_text() == ""
    made = (tmp_path / "out" / "disk.raw").read_bytes()
    assert made == b"c" * MIB + b"b" * MIB + bytes(2 * MIB)
    assert (tmp_path / "base" / "disk.raw").read_bytes() == b"a" * MIB + b"b" * MIB
