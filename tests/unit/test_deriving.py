"""Images that derive from others, as far as they need no guest; tests/functional/test_derived.py has the rest."""

import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageState, ImageStore
from pytest_vmsandbox.core.architecture import native_architecture
from pytest_vmsandbox.core.errors import (
    CacheError,
    CommandError,
    CommandResult,
    GuestLost,
    ImageError,
    LaunchError,
)
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.images import changing, deriving
from pytest_vmsandbox.guests.images.maker import make_image
from support import damage, images
from support.images import DEFINITION

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
DELIVER = f"""#!/bin/sh
echo kernel >$VMSANDBOX_OUT/vmlinuz
od -A n -N 8 -t x8 /dev/urandom >$VMSANDBOX_OUT/initrd.img
echo {KEY} vmsandbox >$VMSANDBOX_OUT/host_key.pub
echo busybox 1.37 >$VMSANDBOX_OUT/packages.txt
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two images, `lower` and `upper` on top of it, and what makes and looks up images."""

    class World:
        folder = tmp_path / "images"
        cache = tmp_path / "cache"
        store = ImageStore(cache)
        settings = Settings(image_path=(folder,), cache=cache)

        def __init__(self):
            self.lines = []

        def derive(self, name, base, more=""):
            text = f'schema = 1\ndescription = "More"\nfrom = "{base}"\n{more}'
            (self.folder / name).mkdir()
            (self.folder / name / "image.toml").write_text(text)

        def definition(self, name):
            return Catalogue([self.folder]).get(name)

        def make(self, name, **options):
            return make_image(
                self.definition(name), self.settings, progress=self.lines.append, **options
            )

        def state(self, name):
            return self.store.state(self.definition(name))

    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    world = World()
    images.define(world.folder / "lower", images.toml(architecture=native_architecture()), DELIVER)
    world.derive("upper", "lower", '[boot]\nappend = "quiet"\n')
    yield world
    assert list(temporary.iterdir()) == []
    assert list(world.store.root.glob(".*")) == []


class TestCopies:
    def test_notes_of_the_base_hold_for_what_derives_from_it(self, world):
        note = "echo no updates >$VMSANDBOX_OUT/notes.txt\n"
        (world.folder / "lower" / "build").write_text(DELIVER + note)
        assert world.make("upper").notes == ("no updates",)

    def test_a_copy_with_another_command_line(self, world):
        upper = world.make("upper")
        lower = world.store.require(world.definition("lower"))  # it was built on the way
        assert "lower is built" not in world.lines
        assert upper.definition.append == "quiet"
        for name in ("vmlinuz", "initrd.img", "host_key.pub", "packages.txt"):
            assert (upper.folder / name).read_bytes() == (lower.folder / name).read_bytes()
            assert not (upper.folder / name).samefile(lower.folder / name)
        assert upper.record()["base"] == lower.as_base()
        upper.verified()
        world.make("upper")
        assert world.lines[-1] == "upper is built"

    def test_it_needs_its_base_no_more(self, world):
        upper = world.make("upper")
        assert world.store.remove("lower") > 0
        assert world.state("upper") is ImageState.BUILT
        assert world.make("upper") == upper
        upper.verified()
        assert world.state("lower") is ImageState.MISSING

    def test_a_damaged_base_is_not_copied(self, world):
        damage.KINDS["flipped"](world.make("lower").initrd)
        with pytest.raises(ImageError, match="'lower' is damaged"):
            world.make("upper")
        assert world.state("upper") is ImageState.MISSING


class TestStale:
    def test_when_its_base_was_built_again(self, world):
        world.derive("top", "upper")
        first = world.make("top").build_id
        world.make("lower", force=True)
        for name in ("upper", "top"):
            assert world.state(name) is ImageState.STALE
            with pytest.raises(ImageError, match="its base '.*' was built again since"):
                world.store.require(world.definition(name))
        second = world.make("top")
        lower = world.store.require(world.definition("lower"))
        assert second.initrd.read_bytes() == lower.initrd.read_bytes()
        assert second.build_id != first
        assert {world.state(name) for name in ("lower", "upper", "top")} == {ImageState.BUILT}

    def test_when_the_definition_of_its_base_changed(self, world):
        world.make("upper")
        (world.folder / "lower" / "more").write_text("x")
        assert world.state("upper") is ImageState.STALE
        world.make("upper")
        assert world.state("upper") is world.state("lower") is ImageState.BUILT

    @pytest.mark.parametrize("why", ["by force", "because its base was built again"])
    def test_it_is_not_replaced_while_guests_use_it(self, world, why):
        upper = world.make("upper")
        if why != "by force":
            world.make("lower", force=True)
        with upper.hold(), pytest.raises(CacheError, match="in use"):
            world.make("upper", force=why == "by force")
        upper.verified()


class TestTwoAtOnce:
    def test_one_makes_it_and_the_other_waits(self, world, monkeypatch):
        began, go_on, made = threading.Event(), threading.Event(), []
        derive = deriving.derive

        def slow(build, base, settings):
            began.set()
            assert go_on.wait(20)
            made.append(build)
            return derive(build, base, settings)

        monkeypatch.setattr("pytest_vmsandbox.guests.images.maker.derive", slow)
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(world.make("upper"))) for _ in range(2)
        ]
        threads[0].start()
        assert began.wait(20)
        threads[1].start()
        while "waiting: another process is building upper" not in world.lines:
            threads[1].join(0.01)
        go_on.set()
        for thread in threads:
            thread.join(20)
        assert len(made) == 1
        assert results[0] == results[1]


def test_what_has_holes_is_copied_with_them(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x")
    with source.open("r+b") as file:
        file.truncate(1 << 30)
    source.chmod(0o600)
    changing.copy_file(source, tmp_path / "copy")
    status = (tmp_path / "copy").stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < 1 << 20
    assert status.st_mode & 0o777 == 0o600


class TestWhatNeedsAGuest:
    @pytest.mark.parametrize(
        "more",
        [
            '[add]\nscript = "image.toml"\n',
            '[add]\npackages = ["nginx"]\n',
            '[system]\nuser = "app"\n',
            "[system]\npython = true\n",
            '[system]\ninit = "openrc"\n',
        ],
    )
    def test_a_change_in_it_and_a_statement_about_it(self, world, more):
        world.derive("other", "lower", more)
        assert deriving._is_changed(world.definition("other"), world.make("lower"))

    @pytest.mark.parametrize(
        "more", ["", '[boot]\nappend = "x"\n', '[system]\nname = "x"\npython = false\n']
    )
    def test_what_only_we_must_know(self, world, more):
        world.derive("other", "lower", more)
        assert not deriving._is_changed(world.definition("other"), world.make("lower"))


class TestErrorsOfTheGuest:
    """People know the image and the script, but no guest and no program of ours."""

    build: Any = SimpleNamespace(
        definition=replace(DEFINITION, name="mine", folder=Path("/images/mine")), write=print
    )
    lost = GuestLost("the guest is switched off", details="its console", remedy="call vm.reboot()")
    result = CommandResult(argv=("rm",), returncode=1, stdout="", stderr="no rm", duration=0)

    @pytest.mark.parametrize(
        "error", [lost, CommandError("rm failed", result=result, remedy="check=False")]
    )
    def test_name_the_image_and_the_script(self, error):
        with pytest.raises(ImageError) as raised, changing.named(self.build, "setup.sh"):
            raise error
        assert raised.value.brief == f"making 'mine' failed: {error.brief}"
        assert raised.value.details == error.details
        assert raised.value.remedy.startswith("look at /images/mine/setup.sh. It must neither")

    def test_without_a_script(self):
        with pytest.raises(ImageError) as raised, changing.named(self.build):
            raise self.lost
        assert raised.value.remedy == ""  # the builder names the log

    def test_chance(self):
        error = GuestLost("QEMU was killed", remedy="try again", transient=True)
        with pytest.raises(ImageError) as raised, changing.named(self.build, "setup.sh"):
            raise error
        assert raised.value.transient
        assert raised.value.remedy == "try again"

    @pytest.mark.parametrize("error", [ImageError("x"), LaunchError("x"), CacheError("x")])
    def test_what_is_not_of_the_guest(self, error):
        with pytest.raises(type(error)) as raised, changing.named(self.build, "setup.sh"):
            raise error
        assert raised.value is error

    def test_a_script_that_fails(self):
        engine = SimpleNamespace(
            stretch=lambda seconds: seconds,
            run=lambda *_, **__: replace(self.result, returncode=3),
        )
        guest: Any = SimpleNamespace(engine=engine)
        with pytest.raises(ImageError, match="'mine' failed: setup.sh ended with status 3"):
            changing.run(self.build, guest, "", what="setup.sh")


class TestHostKey:
    def test_is_as_it_was(self):
        deriving._check_host_key(TestErrorsOfTheGuest.build, "1 2 key\n", "1 2 key\n")

    @pytest.mark.parametrize("after", ["", "3 2 key\n"], ids=["removed", "changed"])
    def test_that_nobody_knows(self, after):
        with pytest.raises(ImageError, match="changes or removes the guest's SSH host key"):
            deriving._check_host_key(TestErrorsOfTheGuest.build, "1 2 key\n", after)

    def test_the_script_is_for_any_shell(self):
        subprocess.run(["/bin/sh", "-n", "-c", deriving._HOST_KEYS], check=True)
