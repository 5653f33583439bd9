"""The second QEMU that tests run on: fetched once, and told where it is not the one that is pinned."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vmsandbox.machine.qemu import Qemu, find_qemu
from second_qemu import run
from second_qemu.run import Failure, Pin

PIN = Pin(suite="forky", version="11.1.2")
# It plays the dynamic loader, to which QEMU's own path and arguments are passed.
LOADER = """\
#!/bin/sh
test "$1" = --library-path && shift 2
echo "QEMU emulator version 11.1.2: $*"
"""


class Archive:
    """What is fetched from it, and how often."""

    def __init__(self):
        self.fetched = []
        self.works = True

    def unpack(self, suite, folder):
        self.fetched.append(suite)
        (folder / "usr/lib64").mkdir(parents=True)
        loader = folder / "usr/lib64/ld-linux-x86-64.so.2"
        loader.write_text(LOADER)
        loader.chmod(0o755)
        if not self.works:
            raise Failure("there is no network")


@pytest.fixture
def archive():
    return Archive()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a cache"


def test_what_is_pinned():
    pin = run.pinned()
    assert pin.suite.isalpha()
    assert tuple(map(int, pin.version.split("."))) >= (11, 1)


def test_it_is_fetched_once(archive, folder):
    program = run.obtain(PIN, folder, archive.unpack)
    assert run.obtain(PIN, folder, archive.unpack) == program
    assert archive.fetched == ["forky"]


def test_it_runs_with_its_own_libraries_and_files(archive, folder, monkeypatch):
    program = run.obtain(PIN, folder, archive.unpack)
    monkeypatch.setenv("VMSANDBOX_QEMU", str(program))
    assert find_qemu("x86_64").release == "11.1.2"
    output = subprocess.run(
        [program, "-M", "a b"], capture_output=True, text=True, check=True
    ).stdout
    usr = program.parent / "usr"
    assert f"{usr}/bin/qemu-system-x86_64 -L {usr}/share/qemu" in output
    assert output.endswith("-M a b\n")


def test_every_user_can_start_it(archive, folder):
    program = run.obtain(PIN, folder, archive.unpack)
    for path in (program, program.parent, folder):
        assert path.stat().st_mode & 0o005 == 0o005


def test_another_pin_replaces_it(archive, folder):
    run.obtain(PIN, folder, archive.unpack)
    program = run.obtain(Pin(suite="sid", version="12.0.0"), folder, archive.unpack)
    assert archive.fetched == ["forky", "sid"]
    assert [it for it in folder.iterdir() if it.is_dir()] == [program.parent]


def test_a_fetch_that_fails_is_tried_anew(archive, folder):
    archive.works = False
    with pytest.raises(Failure, match="no network"):
        run.obtain(PIN, folder, archive.unpack)
    archive.works = True
    assert run.obtain(PIN, folder, archive.unpack).exists()


def test_without_the_tools_the_remedy_is_told(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Failure, match=r"Debian forky could not be fetched(.|\n)*Remedy: .*network"):
        run.unpack("forky", tmp_path)


@pytest.mark.parametrize(
    ("version", "more"), [((11, 1, 2), ""), ((11, 2, 0), "forky has 11.1.2 no more; write 11.2.0")]
)
def test_which_one_it_is(version, more):
    found = Qemu(path=Path("/cache/qemu"), version=version, build="")
    first, *rest = run.told(PIN, found).splitlines()
    assert first.endswith(f"{found.release}, /cache/qemu")
    assert [it.split(": ", 1)[1].split(" into ")[0] for it in rest] == ([more] if more else [])


def test_the_command_has_it_in_its_environment(archive, folder, monkeypatch):
    became = []
    monkeypatch.setattr(run, "cache", lambda: folder)
    monkeypatch.setattr(run, "unpack", archive.unpack)
    monkeypatch.setattr(os, "execvp", lambda *argv: became.append(argv))
    monkeypatch.setattr(sys, "argv", ["run.py", "pytest", "-x"])
    monkeypatch.setenv("VMSANDBOX_QEMU", "")
    run.main()
    assert became == [("pytest", ["pytest", "-x"])]
    assert Path(os.environ["VMSANDBOX_QEMU"]).is_relative_to(folder)
