"""The emulator for single programs of another architecture."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue import emulator, programs
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import ImageError

STATIC = b"\x7fELF static"
DYNAMIC = b"\x7fELF /lib64/ld-linux-x86-64.so.2"
STRANGE = "q:e|m, \\x41%s'\"ü\n"  # a name with what has a meaning somewhere
LIB = Path(__file__).resolve().parents[2] / "images/debian/lib.sh"


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A folder for programs, which is all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(programs, "search_path", lambda: str(folder))
    return folder


def program(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else f"#!/bin/sh\n{content}\n".encode())
    file.chmod(0o755)
    return file


def apt(folder: Path, *, has: str, name: str, after_update: bool = False) -> None:
    """Programs that play apt-get and dpkg-deb, with one package."""
    for used in ("sh", "mkdir", "touch", "chmod", "grep"):
        (folder / used).symlink_to(str(shutil.which(used)))
    said = folder.parent / "said"
    guard = f'grep -q " update$" {said} || exit 100' if after_update else ":"
    program(
        folder / "apt-get",
        f'echo "$@" >>{said}\n'
        f'case "$*" in *" update") exit 0 ;; *" download {has}") {guard}; touch {has}_1_all.deb ;;\n'
        '*) echo "E: Unable to locate package" ; exit 100 ;; esac',
    )
    program(
        folder / "dpkg-deb",
        f"mkdir -p tree/usr/bin; printf '\\177ELF' >tree/usr/bin/{name}; chmod 755 tree/usr/bin/{name}",
    )


class TestInstalled:
    @pytest.mark.parametrize("name", ["qemu-aarch64-static", "qemu-aarch64"])
    def test_found(self, path, tmp_path, name):
        file = program(path / name, STATIC)
        assert emulator.emulator("aarch64", tmp_path) == str(file)

    def test_dynamic_one_is_no_use(self, path, tmp_path):
        program(path / "qemu-aarch64", DYNAMIC)
        with pytest.raises(ImageError, match="no apt to fetch it"):
            emulator.emulator("aarch64", tmp_path)


class TestFetched:
    def test_once(self, path, tmp_path):
        apt(path, has="qemu-user-static", name="qemu-s390x-static")
        said: list[str] = []
        first = emulator.emulator("s390x", tmp_path / "cache", say=said.append)
        assert Path(first).read_bytes() == b"\x7fELF"
        assert os.access(first, os.X_OK)
        (path / "apt-get").unlink()
        assert emulator.emulator("s390x", tmp_path / "cache", say=said.append) == first
        [line] = said
        assert line.startswith("fetching the emulator for programs of s390x: apt downloads ")

    def test_since_debian_13(self, path, tmp_path):
        apt(path, has="qemu-user", name="qemu-s390x")
        assert Path(emulator.emulator("s390x", tmp_path / "cache")).is_file()

    def test_with_lists_of_our_own(self, path, tmp_path):
        apt(path, has="qemu-user-static", name="qemu-arm-static", after_update=True)
        assert Path(emulator.emulator("armv7l", tmp_path / "cache")).is_file()
        update = next(
            line
            for line in (tmp_path / "said").read_text().splitlines()
            if line.endswith(" update")
        )
        assert "Dir::State=" in update

    def test_all_that_apt_says_is_shown(self, path, tmp_path):
        apt(path, has="nothing", name="nothing")
        program(path / "apt-get", 'echo "E: no route to the mirror"; echo "E: $*"; exit 100')
        with pytest.raises(ImageError) as caught:
            emulator.emulator("riscv64", tmp_path / "cache")
        told = caught.value.details.splitlines()
        assert sum("no route" in line for line in told) == 1
        endings = [line.rpartition(" ")[2] for line in told if line.startswith("E: -qq")]
        assert endings == [*emulator.PACKAGES, "update", *emulator.PACKAGES]

    def test_not_to_be_had(self, path, tmp_path, monkeypatch):
        apt(path, has="nothing", name="nothing")
        with pytest.raises(ImageError) as caught:
            emulator.emulator("riscv64", tmp_path / "cache")
        told = str(caught.value)
        assert "programs of riscv64 do not run here: apt does not deliver the emulator" in told
        assert "Unable to locate package" in told
        assert "apt-get install qemu-user-static (since Debian 13: qemu-user)" in told
        assert "VMSANDBOX_NO_BINFMT=1" in told
        assert not [file for file in (tmp_path / "cache").rglob("*") if file.name == "tree"]


class TestRegistration:
    def test_little(self):
        assert emulator.registration("aarch64", "/x/qemu") == (
            ":qemu-aarch64:M::"
            r"\x7f\x45\x4c\x46\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:"
            r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:"
            "/x/qemu:OCF"
        )

    def test_big(self):
        assert emulator.registration("s390x", "/x/qemu") == (
            ":qemu-s390x:M::"
            r"\x7f\x45\x4c\x46\x02\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x16:"
            r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff:"
            "/x/qemu:OCF"
        )

    def test_the_path_has_the_separator(self):
        usual = emulator.registration("aarch64", "/x/qemu")
        assert emulator.registration("aarch64", "/x:/qemu") == (
            usual.replace(":", "|").replace("/x/", "/x:/")
        )
        assert emulator.registration("aarch64", "/:|/qemu")[0] == ";"

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_within_the_limit_of_the_kernel(self, name):
        assert len(emulator.registration(name, "/" + "x" * 255)) < 1920


class TestCanRegister:
    def test_hidden(self, monkeypatch):
        monkeypatch.setenv("VMSANDBOX_NO_BINFMT", "1")
        assert not emulator.can_register()

    def test_old_kernel(self, path, monkeypatch):
        monkeypatch.delenv("VMSANDBOX_NO_BINFMT", raising=False)
        monkeypatch.setenv("PATH", str(path))
        assert not emulator.can_register()  # there is no unshare
        program(path / "unshare", "exit 1")
        assert not emulator.can_register()
        program(path / "unshare", "exit 0")
        assert emulator.can_register()


def test_runs(tmp_path):
    assert emulator.runs(str(program(tmp_path / "yes", '[ "$1" = --about ]')))
    assert not emulator.runs(str(program(tmp_path / "no", "exit 1")))
    assert not emulator.runs(str(program(tmp_path / "foreign", b"\x7fELF\x02\x02\x01")))


def test_what_the_machine_emulates_does_not_run(path, tmp_path, monkeypatch):
    """Only where nothing is registered, it is seen what the machine runs by itself."""
    monkeypatch.setenv("PATH", str(path))
    program(path / "unshare", 'for last; do :; done; [ "$last" = true ]')
    assert not emulator.runs(str(program(tmp_path / "emulated", "exit 0")))


class TestNameSpace:
    """A recipe has a binfmt_misc of its own, and this machine's is as before."""

    START = f"""#!/bin/sh
set -eu
. {LIB}
enter 1000000000
echo "inside: $(cd /proc/sys/fs/binfmt_misc && echo *)"
"""
    LOOK = """
cp /proc/sys/fs/binfmt_misc/qemu-s390x "$VMSANDBOX_OUT/entry"
chown 1234:5678 "$VMSANDBOX_OUT/entry" || [ "$(id -u)" != 0 ]
kill -KILL $$
"""

    @pytest.fixture
    def start(self, tmp_path):
        """Start a recipe whose image has programs of s390x."""
        if not emulator.can_register():
            pytest.skip("this kernel has no binfmt_misc in user name spaces")
        for name in ("out", "work"):
            (tmp_path / name).mkdir()
        interpreter = program(tmp_path / STRANGE, STATIC)

        def start(script: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [program(tmp_path / "build", script)],
                cwd=tmp_path,
                env={
                    **os.environ,
                    "VMSANDBOX_OUT": str(tmp_path / "out"),
                    "VMSANDBOX_WORK": str(tmp_path / "work"),
                    "VMSANDBOX_PYTHON": sys.executable,
                    "VMSANDBOX_BINFMT": emulator.registration("s390x", str(interpreter)),
                },
                stdout=subprocess.PIPE,
                text=True,
            )

        return start

    def test_nothing_of_it_is_seen_here(self, tmp_path, start):
        before = machine_wide()
        output, _ = start(self.START + self.LOOK).communicate(timeout=20)
        assert output == "inside: qemu-s390x register status\n"
        assert machine_wide() == before
        entry = tmp_path / "out/entry"
        assert f"interpreter {tmp_path}/{STRANGE}\nflags: OCF" in entry.read_text()
        if os.geteuid() == 0:  # with all users of this machine
            assert entry.stat().st_uid == 1234

    @pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
    def test_nothing_of_it_is_left(self, start, end):
        before = machine_wide()
        process = start(self.START + "setsid sleep 1000 & sleep 1000\n")
        assert process.stdout.readline().startswith("inside: ")
        process.send_signal(end)
        process.communicate(timeout=20)  # until nobody holds its standard output any more
        assert machine_wide() == before


def machine_wide() -> tuple[list[str], list[str]]:
    """All that this machine's binfmt_misc has, and where it is mounted."""
    folder = Path("/proc/sys/fs/binfmt_misc")
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return sorted(map(str, folder.glob("*"))), [line for line in mounts if "binfmt_misc" in line]
