"""The second stage in a guest: who decides, what a recipe leaves, and what dpkg's output becomes. tests/systems has guests."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.catalogue import emulator, helpers, making
from pytest_vmsandbox.catalogue.builder import build
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.own import own_folders
from pytest_vmsandbox.catalogue.store import HOST_KEY, PACKAGES, ImageStore
from pytest_vmsandbox.core.architecture import native_architecture
from pytest_vmsandbox.core.errors import CommandTimeout, ImageError, LaunchError
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.images import changing, maker as image_maker
from support import images

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
WHOLE = f"echo {KEY} >$VMSANDBOX_OUT/host_key.pub"
UNPACKED = "echo /second-stage >$VMSANDBOX_OUT/second-stage"
# As a recipe runs: it is root, or calls itself so, and may mount.
UNSHARE = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount"]
(DEBIAN,) = [folder / "debian" for folder in own_folders() if (folder / "debian").is_dir()]


@pytest.fixture
def define(tmp_path, monkeypatch):
    """Make a definition whose recipe delivers the files of each image, and does what is given."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))

    def define(script):
        recipe = (
            "#!/bin/sh\ncd $VMSANDBOX_OUT\necho kernel >vmlinuz\necho initrd >initrd.img\n"
            f"truncate -s 1M disk.raw\n{script}\n"
        )
        text = images.toml(architecture=native_architecture(), disk=True)
        images.define(tmp_path / "mine", text, recipe)
        return ImageDefinition.read(tmp_path / "mine")

    return define


@pytest.fixture
def guest(monkeypatch):
    """What plays the guest: it notes what runs in it, and answers with the name of the file that is asked for."""
    noted = SimpleNamespace(images=[], scripts=[], shut_down=False, status=None)

    class Guest:
        def shell(self, script, user):
            assert user == "root"
            name = script.split("/")[-1]
            return SimpleNamespace(stdout=f"{KEY}\n" if name == HOST_KEY else f"{name} 1\n")

    @contextmanager
    def changing_(build, base, hardware, settings, key):
        noted.images.append(base)
        yield Guest()
        noted.shut_down = True

    def run(build, guest, script, **options):
        noted.scripts.append(script)
        if noted.status:
            raise ImageError("the second stage ended with status 1")

    monkeypatch.setattr(changing, "changing", changing_)
    monkeypatch.setattr(changing, "run", run)
    return noted


class TestWhoDecides:
    def make(self, definition, tmp_path):
        settings = Settings(cache=tmp_path / "cache")
        return image_maker.make_image(definition, settings, progress=lambda _: None)

    def test_a_recipe_that_has_done_all(self, define, guest, tmp_path):
        self.make(define(WHOLE), tmp_path)
        assert guest.images == []

    def test_a_recipe_that_has_only_unpacked(self, define, guest, tmp_path):
        definition = define(UNPACKED)
        image = self.make(definition, tmp_path)
        (booted,) = guest.images
        assert booted.definition.append == f"{definition.append} init=/second-stage/init"
        assert guest.scripts == ["exec /second-stage/run"]
        assert guest.shut_down
        assert image.host_key == KEY
        assert (image.folder / PACKAGES).read_text() == f"{PACKAGES} 1\n"
        assert image.definition.append == definition.append
        assert not (image.folder / making.SECOND_STAGE).exists()

    def test_nothing_is_unpacked_without_the_emulator_for_its_guest(
        self, define, guest, tmp_path, monkeypatch
    ):
        def nothing(architecture):
            raise LaunchError(f"no emulator for {architecture}")

        program = tmp_path / "helper"
        monkeypatch.setattr(helpers, "helper_program", lambda *_, **__: program)
        monkeypatch.setattr(helpers, "lacking", lambda *_: ())
        monkeypatch.setattr(emulator, "can_register", lambda: False)
        monkeypatch.setattr(image_maker, "find_qemu", nothing)
        definition = define(f": $VMSANDBOX_HELPER $VMSANDBOX_EMULATOR; touch {tmp_path}/begun")
        with pytest.raises(LaunchError, match=f"no emulator for {native_architecture()}"):
            self.make(definition, tmp_path)
        assert not (tmp_path / "begun").exists()

    def test_nothing_is_kept_if_it_fails(self, define, guest, tmp_path):
        guest.status = 1
        with pytest.raises(ImageError, match="the second stage ended with status 1"):
            self.make(define(UNPACKED), tmp_path)
        assert not guest.shut_down
        assert ImageStore(tmp_path / "cache").folders_of("mine") == []

    def test_an_unpacked_system_is_no_image(self, define, tmp_path):
        definition = define(f"{WHOLE}\n{UNPACKED}")
        with pytest.raises(ImageError, match="not complete") as caught:
            build(definition, ImageStore(tmp_path / "cache"), progress=lambda _: None)
        assert "no guest has completed what the recipe has only unpacked" in caught.value.details


class TestTime:
    """On a machine where all takes ten times as long as on a usual one."""

    def run(self, late=None):
        def engine_run(command, *, stdout, timeout, idle):
            stdout(b"== configuring packages\nsome line\n")
            noted.append((timeout, idle))
            if late is not None:
                raise late
            return SimpleNamespace(returncode=0)

        noted, lines = [], []
        engine: Any = SimpleNamespace(run=engine_run, stretch=lambda seconds: 10 * seconds)
        build: Any = SimpleNamespace(definition=images.DEFINITION, write=lines.append)
        guest: Any = SimpleNamespace(engine=engine)
        try:
            changing.run(build, guest, "true", what="the second stage", silent=60.0, longest=600.0)
        finally:
            assert lines == [b"== configuring packages\n", b"some line\n"]
        return noted

    def test_there_are_limits(self):
        assert self.run() == [(6000.0, 600.0)]

    def test_too_late(self):
        late = CommandTimeout(
            "there was no output for 600 s", seconds=600.0, stdout=b"", stderr=b""
        )
        with pytest.raises(ImageError, match="the second stage was killed: there was no output"):
            self.run(late)


class TestRecipe:
    """The shell functions, with a folder in the place of what they would find."""

    def run(self, tmp_path, script, *, start=(), **environment):
        words = f'set -eu\n. ./lib.sh\n. ./second-stage.sh\nTMPDIR="{tmp_path}" ROOT="{tmp_path}/root"\n{script}'
        return subprocess.run(
            [*start, "/bin/sh", "-c", words],
            cwd=DEBIAN,
            env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def program(self, tmp_path, name, script):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def test_what_is_left_in_the_tree(self, tmp_path):
        (tmp_path / "root/usr/bin").mkdir(parents=True)
        (tmp_path / "root/usr/bin/busybox").touch()
        result = self.run(
            tmp_path,
            "second_stage suite=trixie 'modules=one two' \"quoted=it's\"",
            VMSANDBOX_OUT=str(tmp_path),
            SOURCE_DATE_EPOCH="123",
        )
        assert result.returncode == 0, result.stderr
        assert (tmp_path / making.SECOND_STAGE).read_text() == "/second-stage\n"
        left = tmp_path / "root/second-stage"
        assert {"busybox", "debian", "init", "run", "settings"} <= {p.name for p in left.iterdir()}
        assert (left / "debian/lib.sh").read_bytes() == (DEBIAN / "lib.sh").read_bytes()
        read = self.run(
            tmp_path, f'. {left}/settings; echo "$suite|$modules|$quoted|$SOURCE_DATE_EPOCH"'
        )
        assert read.stdout == "trixie|one two|it's|123\n"

    @pytest.mark.parametrize("option", ["noexec", "exec"])
    def test_where_no_program_can_be_run(self, tmp_path, option):
        """Such a mount would fail minutes later, in a script of a package."""
        (tmp_path / "place").mkdir()
        script = f"""
            mount -t tmpfs -o {option} tmpfs {tmp_path}/place
            TMPDIR={tmp_path}/place VMSANDBOX_WORK={tmp_path}/place/work
            bootstrap() {{ echo "$@"; }}
            install_system trixie apt
        """
        result = self.run(tmp_path, script, start=UNSHARE)
        if option == "exec":
            assert result.stdout.startswith("trixie minbase apt")
            assert result.stderr == ""
        else:
            assert result.stdout == ""
            assert f"no program can be run in {tmp_path}/place, which" in result.stderr
            assert "noexec: set TMPDIR" in result.stderr

    def package(self, tmp_path, name, architecture, multi_arch):
        """Make a package with a `preinst`, a setting, and a file that the image does not want."""
        tree = tmp_path / name
        for file, content in {
            "DEBIAN/control": f"Package: {name}\nVersion: 1\nArchitecture: {architecture}\nMulti-Arch: {multi_arch}\n"
            "Maintainer: Nobody <nobody@example.org>\nDescription: nothing\n",
            "DEBIAN/preinst": f"#!/bin/sh\ntouch {tmp_path}/has-run\n",
            "DEBIAN/conffiles": f"/etc/{name}.conf\n",
            f"etc/{name}.conf": "",
            f"usr/share/{name}": "content\n",
            f"usr/share/man/{name}.1": "left out\n",
        }.items():
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            (tree / file).write_text(content)
        (tree / "DEBIAN/preinst").chmod(0o755)
        (tmp_path / "root.packages").mkdir(exist_ok=True)
        command = ["dpkg-deb", "--build", "--root-owner-group", tree, tmp_path / "root.packages"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def test_foreign_packages_are_unpacked_and_no_script_of_theirs_runs(self, tmp_path):
        for folder in ("info", "updates", "triggers"):
            (tmp_path / "root/var/lib/dpkg" / folder).mkdir(parents=True)
        (tmp_path / "root/var/lib/dpkg/status").touch()
        (tmp_path / "root/etc/dpkg/dpkg.cfg.d").mkdir(parents=True)
        settings = tmp_path / "root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
        settings.write_text("force-unsafe-io\npath-exclude=/usr/share/man/*\n")
        foreign = "s390x" if native_architecture() != "s390x" else "arm64"
        self.package(tmp_path, "one", foreign, "same")
        self.package(tmp_path, "two", "all", "no")
        arch = {"VMSANDBOX_DEBIAN_ARCHITECTURE": foreign}
        result = self.run(tmp_path, "unpack three,two/backports", start=UNSHARE, **arch)
        assert result.returncode == 0, result.stderr
        root = tmp_path / "root"
        status = (root / "var/lib/dpkg/status").read_text()
        assert status.count("Status: install ok unpacked") == 2
        assert (root / "usr/share/one").read_text() == "content\n"
        assert (root / "etc/two.conf.dpkg-new").exists()
        assert not (root / "usr/share/man/one.1").exists()
        assert not (tmp_path / "has-run").exists()
        states = (root / "var/lib/apt/extended_states").read_text()
        assert states == f"Package: one\nArchitecture: {foreign}\nAuto-Installed: 1\n\n"
        info = root / "var/lib/dpkg/info"
        scripts = {path.name for path in info.glob("*.preinst")}
        assert scripts == {f"one:{foreign}.preinst", "two.preinst"}
        assert all(os.access(info / script, os.X_OK) for script in scripts)
        assert sorted(path.name for path in tmp_path.glob("root.*")) == []

    def system(self, tmp_path, states):
        """Make what plays a guest with unpacked packages; a program of its own notes each call of dpkg."""
        (tmp_path / "root/usr/sbin").mkdir(parents=True)
        info = tmp_path / "root/var/lib/dpkg/info"
        info.mkdir(parents=True)
        for name in ("one", "two:s390x"):
            script = f'#!/bin/sh\necho "preinst $1 $DPKG_MAINTSCRIPT_PACKAGE $DPKG_MAINTSCRIPT_ARCH" >>{tmp_path}/calls\n'
            (info / f"{name}.preinst").write_text(script)
            (info / f"{name}.preinst").chmod(0o755)
        calls = (
            f'[ "$1" = --print-architecture ] && echo s390x || echo "dpkg $*" >>{tmp_path}/calls'
        )
        self.program(tmp_path, "dpkg", calls)
        self.program(tmp_path, "dpkg-query", f"printf '{states}'")
        return info

    def test_packages_are_configured_as_in_a_new_system(self, tmp_path):
        self.system(tmp_path, "ii one\\nii two\\n")
        result = self.run(tmp_path, "configure_packages")
        assert result.returncode == 0, result.stderr
        calls = (tmp_path / "calls").read_text().splitlines()
        assert calls[:3] == [
            "preinst install one s390x",
            "preinst install two s390x",
            "dpkg --force-depends --configure base-passwd",
        ]
        assert calls[-1] == "dpkg --configure --pending"
        assert not (tmp_path / "root/usr/sbin/policy-rc.d").exists()

    def test_a_package_stays_unconfigured(self, tmp_path):
        self.system(tmp_path, "ii one\\niU two\\niF three\\n")
        result = self.run(tmp_path, "configure_packages")
        assert result.returncode == 1
        assert result.stderr.endswith("these packages are not configured: two three\n")

    def test_a_preinst_fails(self, tmp_path):
        info = self.system(tmp_path, "")
        (info / "one.preinst").write_text("#!/bin/sh\nexit 7\n")
        result = self.run(tmp_path, "configure_packages")
        assert result.returncode == 1
        assert "one: its preinst ended with status 7" in result.stderr
        assert not (tmp_path / "calls").exists()

    def test_how_far_dpkg_is(self, tmp_path):
        lines = "".join(f"Setting up p{n} ...\\n" for n in range(45))
        result = self.run(
            tmp_path, f"count=45; follow 'Setting up' configuring printf 'other\\n{lines}'"
        )
        assert result.returncode == 0
        shown = [line for line in result.stdout.splitlines() if line.startswith("== ")]
        assert shown == ["== configuring", "== configuring: 20 of 45", "== configuring: 40 of 45"]
        assert result.stdout.count("Setting up") == 45

    def test_dpkg_fails(self, tmp_path):
        result = self.run(tmp_path, "count=1; follow Up configuring sh -c 'echo bad >&2; exit 3'")
        assert result.returncode == 1
        assert "bad\n" in result.stdout
        assert "configuring: dpkg ended with status 3" in result.stderr


def test_everything_runs_from_memory_that_runs_until_the_end():
    init = Path(DEBIAN / "second-stage/init").read_text(encoding="utf-8")
    _, _, memory = init.partition("exec $here/busybox")
    assert memory
    for line in memory.splitlines():
        assert "/second-stage/" not in line.replace("/run/second-stage", "")
