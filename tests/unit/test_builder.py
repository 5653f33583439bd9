"""Building images with real recipes, and keeping them: real processes, files and locks."""

import json
import os
import pathlib
import platform
import select
import shutil
import signal
import subprocess
import sys
import threading

import pytest

import pytest_vmsandbox.catalogue.builder as builder_module
from pytest_vmsandbox.cache.files import locked, private_folder, remove_tree
from pytest_vmsandbox.catalogue import emulator, helpers, making, programs
from pytest_vmsandbox.catalogue.builder import build, check_room
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.store import ImageState, ImageStore, build_command
from pytest_vmsandbox.core.architecture import native_architecture
from pytest_vmsandbox.core.errors import CacheError, ConfigError, ImageError
from support import damage, images

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
DELIVER = f"""
echo kernel >$VMSANDBOX_OUT/vmlinuz
echo initrd >$VMSANDBOX_OUT/initrd.img
echo {KEY} vmsandbox >$VMSANDBOX_OUT/host_key.pub
"""
BUILDER = """
import sys
from pathlib import Path
import pytest_vmsandbox.catalogue.builder as builder_module
from pytest_vmsandbox.catalogue.builder import build
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.store import ImageStore
if "without-namespaces" in sys.argv:
    builder_module._own_namespaces = list
build(ImageDefinition.read(Path(sys.argv[1])), ImageStore(Path(sys.argv[2])),
      progress=lambda line: print(line, flush=True))
"""
SETUPS = pytest.mark.parametrize("namespaces", [True, False], ids=["as we are", "no namespaces"])


def define(folder, script=DELIVER, *, disk=False, requires="[]"):
    definition = images.toml(architecture=native_architecture(), requires=requires, disk=disk)
    images.define(folder, definition, f"#!/bin/sh\nset -eu\n{script}")
    return ImageDefinition.read(folder)


@pytest.fixture
def tmp(tmp_path, monkeypatch):
    """The folder for temporary files, which must be empty again after each test."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def store(tmp_path, tmp):
    store = ImageStore(tmp_path / "cache")
    yield store
    assert [*store.root.glob("*/.*"), *store.root.glob(".*")] == []


@pytest.fixture
def lines():
    return []


@pytest.fixture
def make(store, lines):
    def make(definition, **options):
        return build(definition, store, progress=lines.append, **options)

    return make


@pytest.fixture
def alive(tmp_path):
    """A FIFO that recipes open for writing: at its end of file, all that hold it are gone."""

    class Alive:
        path = tmp_path / "alive"

        def __init__(self):
            os.mkfifo(self.path)
            self.reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

        def wait_for_end(self, seconds):
            ready = select.select([self.reader], [], [], seconds)[0]
            return bool(ready) and os.read(self.reader, 1) == b""

    alive = Alive()
    yield alive
    os.close(alive.reader)


@pytest.fixture
def start(tmp_path, store):
    """Start a builder in a process of its own."""
    processes = []

    def start(definition, *arguments):
        root = pathlib.Path(builder_module.__file__).parents[2]
        process = subprocess.Popen(
            [sys.executable, "-c", BUILDER, definition.folder, tmp_path / "cache", *arguments],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def without_namespaces(monkeypatch):
    """As it is for ordinary users, and in most containers."""
    monkeypatch.setattr(builder_module, "_own_namespaces", list)


class TestBuild:
    @SETUPS
    def test_result(self, tmp_path, make, store, lines, monkeypatch, namespaces):
        if not namespaces:
            without_namespaces(monkeypatch)
        definition = define(
            tmp_path / "mine",
            f"echo == one; echo two; echo == three >&2; {DELIVER}\n"
            "truncate -s 64M $VMSANDBOX_OUT/disk.raw",
            disk=True,
        )
        assert store.state(definition) is ImageState.MISSING
        image = make(definition)
        assert store.state(definition) is ImageState.BUILT
        assert image == store.require(definition)
        assert image.folder == tmp_path / "cache" / "images" / "mine" / definition.digest[:16]
        assert image.digest == definition.digest
        assert image.kernel.read_text() == "kernel\n"
        assert image.initrd.read_text() == "initrd\n"
        assert image.disk.stat().st_size == 64 * 1024**2
        assert image.host_key == KEY
        assert 0 < image.size_on_disk < 1024**2
        assert lines == ["one", "three"]
        assert (image.folder / "build.log").read_text() == "== one\ntwo\n== three\n"
        metadata = json.loads((image.folder / "image.json").read_text())
        assert metadata["schema"] == 2
        assert metadata["name"] == "mine"
        assert metadata["digest"] == definition.digest
        assert metadata["built"] > 1e9
        assert metadata["definition"]["description"] == "An image"
        assert store.all() == [image]
        assert not store.failed_log("mine").exists()

    def test_another_user_can_read_what_guests_run(self, tmp_path, make):
        script = f"umask 077; {DELIVER}\ntruncate -s 1M $VMSANDBOX_OUT/disk.raw"
        image = make(define(tmp_path / "mine", script, disk=True))
        modes = [file.stat().st_mode & 0o777 for file in (image.kernel, image.initrd, image.disk)]
        assert modes == [0o644] * 3
        assert image.folder.stat().st_mode & 0o777 == 0o700

    def test_surroundings_of_a_recipe(self, tmp_path, make, tmp, lines):
        make(
            define(
                tmp_path / "mine",
                f"""{DELIVER}
                echo "== $PWD"
                echo "== $(stat -c %a $VMSANDBOX_OUT $VMSANDBOX_WORK | xargs)"
                echo "== ${{VMSANDBOX_WORK%-*}} $(ls $VMSANDBOX_OUT $VMSANDBOX_WORK | wc -w)"
                echo "== $(umask) $(readlink /proc/self/fd/0) $LC_ALL"
                case $TMPDIR:$PATH in $VMSANDBOX_WORK:*/usr/sbin*) echo "== yes";; esac
                test -z "$(find /proc/self/fd -lname '*.lock')" && echo "== no lock"
                """,
            )
        )
        assert lines[:2] == [str(tmp_path / "mine"), "700 711"]
        assert lines[2].startswith(f"{tmp}/vmsandbox-work")
        assert lines[3:] == ["0022 /dev/null C.UTF-8", "yes", "no lock"]

    def test_each_architecture_is_an_image_of_its_own(
        self, tmp_path, make, store, lines, monkeypatch
    ):
        """This machine has a faked name: arm64, where ``mine`` is for arm64."""
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        names = ("VMSANDBOX_ARCHITECTURE", "VMSANDBOX_DEBIAN_ARCHITECTURE", "VMSANDBOX_CONSOLE")
        said = " ".join(f"${{{name}}}" for name in names)
        define(tmp_path / "mine", f'{DELIVER}\necho "== {said}"')
        file = tmp_path / "mine" / "image.toml"
        text = file.read_text().replace(
            f'architecture = "{native_architecture()}"', 'architectures = ["x86_64", "aarch64"]'
        )
        file.write_text(text)
        built = [
            make(ImageDefinition.read(file.parent, architecture=architecture))
            for architecture in ("x86_64", "aarch64")
        ]
        assert lines == ["x86_64 amd64 ttyS0", "aarch64 arm64 ttyAMA0"]
        assert [image.folder.parent.name for image in built] == ["mine_amd64", "mine"]
        found = sorted(store.all(), key=lambda image: image.folder)
        assert found == [built[1], built[0]]
        assert [image.definition.variant_of for image in found] == ["", "mine"]

    def test_folders_are_private(self, tmp_path, make):
        image = make(define(tmp_path / "mine"))
        for folder in (image.folder, *list(image.folder.parents)[:3]):
            assert folder.stat().st_mode & 0o777 == 0o700, folder

    def test_built_is_not_built_again(self, tmp_path, make, lines):
        definition = define(tmp_path / "mine", f"echo == built;{DELIVER}")
        image = make(definition)
        assert make(definition) == image
        assert lines == ["built", "mine is built"]

    def test_a_damaged_one_is_not_replaced_by_the_way(self, tmp_path, make, lines):
        """Guests may use it."""
        definition = define(tmp_path / "mine", f"echo == built;{DELIVER}")
        image = make(definition)
        (image.folder / "image.json").write_text("{")
        assert make(definition) == image
        assert lines == ["built", "mine is built"]
        with pytest.raises(ImageError, match="'mine' is damaged"):
            make(definition).verified()

    def test_force(self, tmp_path, make, lines):
        definition = define(tmp_path / "mine", f"echo == built;{DELIVER}")
        image = make(definition)
        before = image.kernel.stat().st_ino, image.folder.stat().st_ino
        image = make(definition, force=True)
        assert (image.kernel.stat().st_ino, image.folder.stat().st_ino) != before
        assert lines == ["built", "built"]

    def test_force_does_not_replace_what_is_in_use(self, tmp_path, make, lines):
        definition = define(tmp_path / "mine", f"echo == built;{DELIVER}")
        image = make(definition)
        with image.hold(), pytest.raises(CacheError, match="in use"):
            make(definition, force=True)
        assert image.kernel.exists()
        assert lines == ["built"]

    @SETUPS
    def test_failure(self, tmp_path, make, store, monkeypatch, namespaces):
        if not namespaces:
            without_namespaces(monkeypatch)
        definition = define(tmp_path / "mine", "seq 100; echo oops >&2; exit 3")
        with pytest.raises(ImageError, match="'mine' failed: its recipe ended with status 3") as e:
            make(definition)
        log = store.failed_log("mine")
        assert e.value.details.splitlines()[-20:] == [*map(str, range(82, 101)), "oops"]
        assert "\n81\n" not in e.value.details
        assert str(log) in e.value.remedy
        assert log.read_text().startswith("1\n2\n")
        assert not (store.root / "mine").exists()
        assert store.state(definition) is ImageState.MISSING
        with pytest.raises(ImageError, match="not built"):
            store.require(definition)

    @SETUPS
    def test_failure_by_a_signal(self, tmp_path, make, monkeypatch, namespaces):
        if not namespaces:
            without_namespaces(monkeypatch)
        with pytest.raises(ImageError, match="ended with signal 9"):
            make(define(tmp_path / "mine", "sh -c 'kill -9 $$'"))

    def test_recipe_that_cannot_be_executed(self, tmp_path, make):
        definition = define(tmp_path / "mine")
        (definition.folder / "build").write_text("#!/gone/interpreter\n")
        with pytest.raises(ImageError, match="ended with status") as e:
            make(ImageDefinition.read(definition.folder))
        assert "No such file" in e.value.details

    def test_definition_that_is_gone(self, tmp_path, make):
        definition = define(tmp_path / "mine")
        assert definition.digest
        shutil.rmtree(definition.folder)
        with pytest.raises(ImageError, match=r"'mine' failed: .*No such file"):
            make(definition)

    def test_output_cannot_deceive_on_a_terminal(self, tmp_path, make, lines):
        script = r"printf '== \033[2Jone\033]0;title\007\n\033[31mtwo\n'; exit 1"
        with pytest.raises(ImageError) as raised:
            make(define(tmp_path / "mine", script))
        assert lines == ["one"]
        assert raised.value.details.endswith("\n== one\ntwo")

    def test_a_failure_leaves_the_built_one(self, tmp_path, make, store):
        image = make(define(tmp_path / "mine"))
        definition = define(tmp_path / "mine", "false")
        with pytest.raises(ImageError):
            make(definition)
        assert image.kernel.exists()
        assert store.state(definition) is ImageState.STALE

    @pytest.mark.parametrize(
        ("script", "disk", "wrong"),
        [
            ("rm $VMSANDBOX_OUT/vmlinuz", False, "vmlinuz is missing"),
            (": >$VMSANDBOX_OUT/initrd.img", False, "initrd.img is empty"),
            ("cd $VMSANDBOX_OUT; ln -sf vmlinuz initrd.img", False, "initrd.img is missing or not"),
            ("rm $VMSANDBOX_OUT/host_key.pub", False, "host_key.pub is missing"),
            ("", True, "disk.raw is missing"),
            ("echo >$VMSANDBOX_OUT/disk.raw", False, "image.toml has no [disk]"),
            ("echo ssh-rsa AAAA >$VMSANDBOX_OUT/host_key.pub", False, "not one line with"),
            ("echo ssh-ed25519 AAAA >$VMSANDBOX_OUT/host_key.pub", False, "not one line with"),
            ("echo ssh-ed25519 ! >$VMSANDBOX_OUT/host_key.pub", False, "not one line with"),
            ("echo ssh-ed25519 >$VMSANDBOX_OUT/host_key.pub", False, "not one line with"),
            (f"echo {KEY} >>$VMSANDBOX_OUT/host_key.pub", False, "not one line with"),
            ("echo '# x' >>$VMSANDBOX_OUT/host_key.pub", False, "not one line with"),
        ],
    )
    def test_result_is_checked(self, tmp_path, make, store, script, disk, wrong):
        definition = define(tmp_path / "mine", f"{DELIVER}\n{script}", disk=disk)
        with pytest.raises(ImageError, match="is not complete") as e:
            make(definition)
        assert wrong in e.value.details
        assert store.state(definition) is ImageState.MISSING

    def test_definition_that_changes_meanwhile(self, tmp_path, make, store):
        definition = define(tmp_path / "mine", f"{DELIVER}\ntouch extra")
        with pytest.raises(ImageError, match="changed while it was being built"):
            make(definition)
        assert store.all() == []
        assert make(ImageDefinition.read(definition.folder))

    def test_missing_programs(self, tmp_path, make, lines):
        requires = '["sh", "no-such-1", "no-such-2"]'
        definition = define(tmp_path / "mine", "echo == ran", requires=requires)
        with pytest.raises(ImageError, match="missing: no-such-1, no-such-2") as e:
            make(definition)
        assert "apt-get install no-such-1 no-such-2" in e.value.remedy
        assert lines == []

    def test_programs_in_sbin(self, tmp_path, make, monkeypatch):
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        assert make(define(tmp_path / "mine", f"{DELIVER}\nmke2fs -V", requires='["mke2fs"]'))

    def test_programs_are_not_needed_for_what_is_built(self, tmp_path, make, monkeypatch):
        definition = define(tmp_path / "mine", requires='["sh"]')
        image = make(definition)
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(programs, "SBIN", ())
        assert make(definition) == image
        with pytest.raises(ImageError, match="missing: sh"):
            make(definition, force=True)

    def test_room(self, tmp_path):
        check_room([tmp_path], 1)
        with pytest.raises(ImageError, match=r"only .*iB are free in .*; a build needs 1024TiB"):
            check_room([tmp_path], 1024**5)


class TestMuchOutput:
    """It neither fills the disk nor the memory, and an error shows the end of it."""

    def test_is_an_error(self, tmp_path, make, monkeypatch, alive):
        monkeypatch.setattr(making, "_MOST_OUTPUT", 100_000)
        definition = define(tmp_path / "mine", f"exec 9>{alive.path}\nyes")
        with pytest.raises(ImageError, match="'mine' failed: its .* wrote more than") as caught:
            make(definition)
        assert "let them write less" in caught.value.remedy
        assert caught.value.details.endswith("\ny\ny")
        assert alive.wait_for_end(20)

    def test_in_one_line(self, tmp_path, make, store):
        script = "head -c 300000 /dev/zero | tr '\\0' x\necho; echo the end\nexit 1"
        with pytest.raises(ImageError) as caught:
            make(define(tmp_path / "mine", script))
        assert store.failed_log("mine").read_bytes() == b"x" * 300_000 + b"\nthe end\n"
        assert caught.value.details.endswith(f"\n{'x' * 500}…\nthe end")

    def test_is_read_in_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(making, "LONGEST_LINE", 10)
        written = []
        with (tmp_path / "log").open("wb") as log:
            test_build = making.Build(
                definition=images.DEFINITION,
                out=tmp_path,
                cache=tmp_path,
                work=tmp_path,
                log=log,
                lock=log.fileno(),
                progress=print,
            )
            monkeypatch.setattr(making.Build, "write", lambda _, line: written.append(line))
            assert test_build.run(["printf", "one\ntwo and three\n"]) == 0
        assert written == [b"one\n", b"two and th", b"ree\n"]


class TestHelper:
    """A recipe that names the helper gets it: the static program for its guests."""

    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        asked = []
        program = tmp_path / "the helper"
        program.write_text("program")

        def helper_program(*arguments, say):
            asked.append(arguments)
            return program

        monkeypatch.setattr(helpers, "helper_program", helper_program)
        return asked

    def test_the_recipe_gets_it(self, tmp_path, make, store, asked):
        definition = define(tmp_path / "mine", f'cat "$VMSANDBOX_HELPER"\n{DELIVER}')
        image = make(definition)
        assert (image.folder / "build.log").read_text().startswith("program")
        assert asked == [(definition.architecture, store.root.parent)]

    def test_a_file_that_it_uses_names_it(self, tmp_path, make, asked):
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared/lib.sh").write_text('cat "$VMSANDBOX_HELPER"\n')
        script = f". ../shared/lib.sh\n{DELIVER}"
        folder = define(tmp_path / "mine", script).folder
        toml = folder / "image.toml"
        toml.write_text(toml.read_text().replace("uses = []", 'uses = ["../shared"]'))
        image = make(ImageDefinition.read(folder))
        assert (image.folder / "build.log").read_text().startswith("program")

    def test_others_are_built_where_it_cannot_be_made(self, tmp_path, make, asked, monkeypatch):
        monkeypatch.setenv("VMSANDBOX_HELPER", "/of/somebody/else")
        script = f'env | grep "^VMSANDBOX_HEL" >$VMSANDBOX_OUT/packages.txt\n{DELIVER}'
        image = make(define(tmp_path / "mine", script))
        assert (image.folder / "packages.txt").read_text() == "VMSANDBOX_HELPER=\n"
        assert asked == []

    def test_what_makes_it_is_missing(self, tmp_path, make, monkeypatch):
        monkeypatch.setattr(helpers, "lacking", lambda *_: ("cc", "libc.a"))
        with pytest.raises(ImageError, match="programs that are missing: cc, libc.a") as caught:
            make(define(tmp_path / "mine", f'cat "$VMSANDBOX_HELPER"\n{DELIVER}'))
        assert "gcc libc6-dev" in caught.value.remedy
        make(define(tmp_path / "other"))

    def test_that_it_cannot_be_made_is_an_error(self, tmp_path, make, monkeypatch):
        def helper_program(*_, say):
            raise ImageError("the helper cannot be made", details="why", remedy="what to do")

        monkeypatch.setattr(helpers, "helper_program", helper_program)
        with pytest.raises(ImageError, match="the helper cannot be made") as caught:
            make(define(tmp_path / "mine", f'cat "$VMSANDBOX_HELPER"\n{DELIVER}'))
        assert caught.value.remedy == "what to do"


class TestEmulator:
    """A recipe that names the emulator gets it, if the programs of its image do not run here."""

    SHOW = f"""env | grep -e ^VMSANDBOX_EMULATOR= -e ^VMSANDBOX_BINFMT= | sort >$VMSANDBOX_OUT/packages.txt
    {DELIVER}
    """

    @pytest.fixture
    def shown(self, tmp_path, make, monkeypatch):
        """What a recipe sees, and what was asked for."""
        asked = []

        def fetch(*arguments, say):
            asked.append(arguments)
            return "/the/emulator"

        monkeypatch.setattr(helpers, "helper_program", lambda *_, say: pathlib.Path("/the/helper"))
        monkeypatch.setattr(emulator, "emulator", fetch)

        def show(names, *, runs, can_register):
            monkeypatch.setattr(emulator, "runs", lambda helper: runs)
            monkeypatch.setattr(emulator, "can_register", lambda: can_register)
            image = make(define(tmp_path / "mine", f": {names}\n{self.SHOW}"))
            lines = (image.folder / "packages.txt").read_text().splitlines()
            return dict(line.split("=", 1) for line in lines), asked

        return show

    def test_foreign(self, shown):
        seen, _ = shown("VMSANDBOX_HELPER VMSANDBOX_EMULATOR", runs=False, can_register=True)
        assert seen["VMSANDBOX_EMULATOR"] == "/the/emulator"
        assert seen["VMSANDBOX_BINFMT"].endswith(":/the/emulator:OCF")

    def test_runs_here(self, shown):
        seen, asked = shown("VMSANDBOX_HELPER VMSANDBOX_EMULATOR", runs=True, can_register=True)
        assert seen == {"VMSANDBOX_EMULATOR": "", "VMSANDBOX_BINFMT": ""}
        assert asked == []

    def test_where_the_kernel_takes_none_nothing_is_fetched(self, shown):
        seen, asked = shown("VMSANDBOX_HELPER VMSANDBOX_EMULATOR", runs=False, can_register=False)
        assert seen == {"VMSANDBOX_EMULATOR": "none", "VMSANDBOX_BINFMT": ""}
        assert asked == []


class TestEnd:
    """However a build ends: nothing that it started is left, and nothing half-made."""

    @SETUPS
    @pytest.mark.parametrize("end", ["true", "false", "kill 0", "kill -9 $$"])
    def test_what_runs_in_the_background_ends(
        self, tmp_path, make, alive, monkeypatch, namespaces, end
    ):
        if not namespaces:
            without_namespaces(monkeypatch)
        script = f"""
        exec 3>{alive.path}
        setsid sh -c 'sleep 1000 & sleep 1000' >/dev/null 2>&1 &
        (sleep 1000 & ) ; {DELIVER} {end}"""
        try:
            make(define(tmp_path / "mine", script))
        except ImageError:
            assert end != "true"
        assert alive.wait_for_end(0)

    @SETUPS
    def test_exception(self, tmp_path, store, alive, monkeypatch, namespaces):
        if not namespaces:
            without_namespaces(monkeypatch)
        script = f"exec 3>{alive.path}; setsid sleep 1000 & echo == go; sleep 1000"
        definition = define(tmp_path / "mine", script)

        def interrupt(line):
            raise KeyboardInterrupt(line)

        with pytest.raises(KeyboardInterrupt, match="go"):
            build(definition, store, progress=interrupt)
        assert alive.wait_for_end(0)
        assert store.all() == []

    def test_interrupt(self, tmp_path, start, store, alive):
        script = f"exec 3>{alive.path}; setsid sleep 1000 & echo == go; sleep 1000"
        process = start(define(tmp_path / "mine", script))
        assert process.stdout.readline() == "go\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT
        assert alive.wait_for_end(0)
        assert not (store.root / "mine").exists()

    @SETUPS
    def test_killed_builder(self, tmp_path, make, start, store, alive, tmp, namespaces):
        marker = tmp_path / "again"
        script = f"""
        [ -e {marker} ] && {{ {DELIVER} exit 0; }}
        exec 3>{alive.path}; echo half >$VMSANDBOX_OUT/vmlinuz; mkdir $VMSANDBOX_WORK/tree
        setsid sh -c 'sleep 1000 & sleep 1000' & echo == go; sleep 1000"""
        definition = define(tmp_path / "mine", script)
        process = start(definition, "" if namespaces else "without-namespaces")
        assert process.stdout.readline() == "go\n"
        process.kill()
        process.wait()
        assert alive.wait_for_end(5)
        assert store.state(definition) is ImageState.MISSING
        assert len(list(tmp.iterdir())) == 1  # only the next build removes it
        marker.touch()
        image = make(definition)
        assert image.kernel.read_text() == "kernel\n"
        assert list((store.root / "mine").iterdir()) == [image.folder]

    def test_killed_builder_keeps_the_lock_until_its_recipe_is_gone(
        self, tmp_path, start, store, alive, make
    ):
        script = f"exec 3>{alive.path}; setsid sleep 1000 & echo == go; sleep 1000"
        definition = define(tmp_path / "mine", script)
        process = start(definition)
        assert process.stdout.readline() == "go\n"
        process.kill()
        with locked(store.root / "mine.lock", on_busy=lambda: None):
            assert alive.wait_for_end(0)
        make(define(tmp_path / "mine"))  # and removes what is left

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts outside of user namespaces")
    def test_mounts_vanish(self, tmp_path, make):
        script = f"mount -t tmpfs none $VMSANDBOX_WORK; touch $VMSANDBOX_WORK/x; {DELIVER}"
        make(define(tmp_path / "mine", script))
        assert str(tmp_path) not in pathlib.Path("/proc/self/mounts").read_text(encoding="utf-8")

    def test_read_only_leftovers_are_removed(self, tmp_path, make):
        script = f"mkdir -p $VMSANDBOX_WORK/a/b; chmod 0 $VMSANDBOX_WORK/a; {DELIVER}"
        assert make(define(tmp_path / "mine", script))

    @pytest.mark.skipif(
        subprocess.run(
            ["unshare", "--user", "--map-root-user", "--map-auto", "true"],
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode
        != 0,
        reason="this user has no subordinate users",
    )
    def test_leftovers_of_subordinate_users_are_removed(self, tmp_path, make, tmp):
        script = f"""{DELIVER}
        unshare --user --map-root-user --map-auto sh -c '
            mkdir $VMSANDBOX_WORK/tree && touch $VMSANDBOX_WORK/tree/file
            chown -R 7:7 $VMSANDBOX_WORK/tree && chmod 0700 $VMSANDBOX_WORK/tree'
        echo == $(stat -c %U $VMSANDBOX_WORK/tree)"""
        assert make(define(tmp_path / "mine", script))

    def test_warden_that_is_killed(self, tmp_path, store, alive):
        script = f"exec 3>{alive.path}; echo == go; exec sleep 1000"
        definition = define(tmp_path / "mine", script)
        children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children")

        def kill(line):
            os.kill(int(children.read_text(encoding="utf-8")), signal.SIGKILL)

        with pytest.raises(ImageError, match="ended with signal 9"):
            build(definition, store, progress=kill)
        assert alive.wait_for_end(5)

    def test_in_a_thread(self, tmp_path, make):
        images = []
        thread = threading.Thread(target=lambda: images.append(make(define(tmp_path / "mine"))))
        thread.start()
        thread.join()
        assert images[0].kernel.exists()


class TestTwoAtOnce:
    def test_build_once(self, tmp_path, start):
        gate, count = tmp_path / "gate", tmp_path / "count"
        os.mkfifo(gate)
        script = f"echo once >>{count}; echo == go; read line <{gate}; {DELIVER}"
        definition = define(tmp_path / "mine", script)
        first = start(definition)
        assert first.stdout.readline() == "go\n"
        second = start(definition)
        assert second.stdout.readline() == "waiting: another process is building mine\n"
        gate.write_text("\n")
        assert second.stdout.read() == "mine is built\n"
        assert (first.wait(), second.wait()) == (0, 0)
        assert count.read_text() == "once\n"

    def test_the_second_builds_when_the_first_fails(self, tmp_path, start):
        gate, count = tmp_path / "gate", tmp_path / "count"
        os.mkfifo(gate)
        script = f"""
        [ -e {count} ] && {{ {DELIVER} exit 0; }}
        echo once >{count}; echo == go; read line <{gate}; exit 1"""
        definition = define(tmp_path / "mine", script)
        first = start(definition)
        assert first.stdout.readline() == "go\n"
        second = start(definition)
        assert second.stdout.readline().startswith("waiting")
        gate.write_text("\n")
        assert (first.wait(), second.wait()) == (1, 0)


class TestStore:
    def test_an_empty_store_is_not_made(self, tmp_path, store):
        definition = define(tmp_path / "mine")
        assert store.state(definition) is ImageState.MISSING
        assert store.all() == []
        assert store.remove("mine") == 0
        assert not store.root.exists()

    def test_missing(self, tmp_path, store):
        with pytest.raises(ImageError, match="'mine' is not built") as e:
            store.require(define(tmp_path / "mine"))
        assert e.value.remedy == f"vmsandbox images build mine --image-path={tmp_path}"

    @pytest.mark.parametrize(
        ("parent", "option"),
        [
            ("images", " --image-path=images"),
            ("my images", " --image-path='my images'"),
            ("cache/imported", ""),
        ],
    )
    def test_the_command_names_the_folder_if_it_must(self, tmp_path, monkeypatch, parent, option):
        monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        (tmp_path / parent).mkdir(parents=True)
        command = build_command(define(tmp_path / parent / "mine"))
        assert command == f"vmsandbox images build mine{option}"

    def test_stale(self, tmp_path, store, make):
        old = make(define(tmp_path / "mine"))
        definition = define(tmp_path / "mine", f"{DELIVER}\ntrue")
        assert store.state(definition) is ImageState.STALE
        with pytest.raises(ImageError, match="'mine' is stale") as e:
            store.require(definition)
        assert e.value.remedy == f"vmsandbox images build mine --image-path={tmp_path}"
        assert [it.digest for it in store.all()] == [old.digest]
        new = make(definition)
        assert store.all() == [new]
        assert not old.folder.exists()

    def test_stale_in_use_stays(self, tmp_path, store, make):
        old = make(define(tmp_path / "mine"))
        with old.hold():
            new = make(define(tmp_path / "mine", f"{DELIVER}\ntrue"))
            assert {it.digest for it in store.all()} == {old.digest, new.digest}
            assert old.kernel.exists()
        newer = make(define(tmp_path / "mine", f"{DELIVER}\nfalse || true"))
        assert store.all() == [newer]

    def test_remove(self, tmp_path, store, make):
        mine, other = make(define(tmp_path / "mine")), make(define(tmp_path / "other"))
        size = mine.size_on_disk
        assert store.remove("mine") == size > 0
        assert store.all() == [other]
        assert store.state(mine.definition) is ImageState.MISSING
        assert store.remove(other.definition.name) == size
        assert store.all() == []
        assert store.remove("other") == 0

    def test_remove_leaves_nothing_of_it(self, tmp_path, store, make):
        make(define(tmp_path / "mine"))
        with pytest.raises(ImageError):
            make(define(tmp_path / "mine", "exit 1"))
        store.remove("mine")
        assert [path.name for path in store.root.iterdir()] == ["mine.lock"]

    def test_remove_leaves_what_is_in_use(self, store, make, tmp_path):
        image = make(define(tmp_path / "mine"))
        with image.hold():
            with image.hold(), pytest.raises(ImageError, match="'mine' is in use"):
                store.remove("mine")
            with pytest.raises(ImageError, match="'mine' is in use"):
                store.remove(image.definition.name)
            assert image.kernel.exists()
        assert store.remove("mine") > 0

    @pytest.mark.parametrize("name", ["..", "../mine", "", "*"])
    def test_remove_takes_names_only(self, store, name):
        with pytest.raises(ConfigError):
            store.remove(name)

    def test_hold_and_key_of_what_is_gone(self, tmp_path, store, make):
        image = make(define(tmp_path / "mine"))
        store.remove("mine")
        with pytest.raises(ImageError, match="was removed"), image.hold():
            pass
        with pytest.raises(ImageError, match="was removed"):
            _ = image.host_key

    def test_what_happens_inside_hold_is_not_touched(self, tmp_path, make):
        image = make(define(tmp_path / "mine"))
        with pytest.raises(FileNotFoundError, match="mine too"), image.hold():
            raise FileNotFoundError("mine too")

    @pytest.mark.parametrize("harm", damage.KINDS)
    @pytest.mark.parametrize(
        "name", ["vmlinuz", "initrd.img", "host_key.pub", "disk.raw", "image.json"]
    )
    def test_damage_is_an_error_that_names_the_remedy(self, tmp_path, store, make, name, harm):
        script = f"{DELIVER}\necho disk >$VMSANDBOX_OUT/disk.raw"
        definition = define(tmp_path / "mine", script, disk=True)
        image = make(definition)
        assert image.verified().keys() == {"vmlinuz", "initrd.img", "host_key.pub", "disk.raw"}
        damage.KINDS[harm](image.folder / name)
        with pytest.raises(ImageError, match=rf"'mine' is damaged: .*{name}") as caught:
            store.require(definition).verified()
        assert caught.value.remedy == f"vmsandbox images build mine --image-path={tmp_path} --force"
        make(definition, force=True)
        store.require(definition).verified()

    def test_one_without_digests_is_taken_as_it_is(self, tmp_path, store, make):
        """It was built before they were kept."""
        definition = define(tmp_path / "mine")
        image = make(definition)
        content = json.loads((image.folder / "image.json").read_text())
        del content["digests"], content["seal"]
        (image.folder / "image.json").write_text(json.dumps({**content, "schema": 1}))
        damage.KINDS["flipped"](image.kernel)
        assert store.require(definition).verified()
        assert store.all() == [image]

    def test_a_lock_that_was_lost(self, tmp_path, store, make):
        image = make(define(tmp_path / "mine"))
        (image.folder / "in-use.lock").unlink()
        with image.hold(), pytest.raises(ImageError, match="in use"):
            store.remove("mine")

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"definition": {}}'])
    def test_what_others_wrote_is_passed_over(self, tmp_path, store, make, content):
        image, other = make(define(tmp_path / "mine")), make(define(tmp_path / "other"))
        (image.folder / "image.json").write_text(content)
        assert store.all() == [other]
        assert store.remove("mine") > 0

    def test_cache_that_is_not_ours(self):
        with pytest.raises(CacheError, match="the cache cannot be used: /proc/1/x cannot be made"):
            private_folder(pathlib.Path("/proc/1/x"))
        if os.geteuid() != 0:
            with pytest.raises(CacheError, match="belongs to another user"):
                private_folder(pathlib.Path("/usr"))

    def test_remove_tree_of_nothing(self, tmp_path):
        remove_tree(tmp_path / "gone")


def test_a_name_adds_no_line_to_the_log_of_a_build(tmp_path):
    seen = []

    def maker(made):
        made.say("unpacking \x1b[2Ja\n== b\r")
        raise ImageError("it ends")

    with pytest.raises(ImageError, match="it ends") as caught:
        build(define(tmp_path / "one"), ImageStore(tmp_path / "cache"), maker, progress=seen.append)
    assert seen == ["unpacking a == b"]
    assert caught.value.details.splitlines()[-1] == "== unpacking a == b"
