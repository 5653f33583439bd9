"""The helper as a static program: where it comes from, and who makes it."""

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vmsandbox.cache.store import HELPERS, Entry, Store, tidy
from pytest_vmsandbox.catalogue import helpers, own, programs
from pytest_vmsandbox.catalogue.helpers import helper_program, helper_source
from pytest_vmsandbox.core.architecture import ARCHITECTURES, native_architecture
from pytest_vmsandbox.core.errors import ImageError

NATIVE = native_architecture()
FOREIGN = next(name for name in ARCHITECTURES if name != NATIVE)
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the helper is for Linux"),
    pytest.mark.skipif(NATIVE not in ARCHITECTURES, reason="no guest is like this machine"),
]


def head(architecture):
    """The first bytes of a program."""
    bits, order, machine = ARCHITECTURES[architecture].elf
    number = machine.to_bytes(2, "big" if order == 2 else "little")
    return b"\x7fELF" + bytes([bits, order]) + bytes(12) + number


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The source, a file of its own, of which nothing is packaged."""
    folder = tmp_path / "images" / "helper"
    folder.mkdir(parents=True)
    monkeypatch.setattr(own, "own_folders", lambda: [folder.parent])
    monkeypatch.setattr(helpers, "_PACKAGED", tmp_path / "packaged")
    (tmp_path / "packaged").mkdir()
    (folder / "helper.c").write_text("int main;\n")
    return folder / "helper.c"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """The only C compiler: notes its calls, and makes what `makes` says."""
    return Compiler(tmp_path, monkeypatch)


class Compiler:
    def __init__(self, folder, monkeypatch):
        self.file = folder / "cc"
        self.calls_file = folder / "calls"
        self.result = folder / "result"
        self.makes(head(NATIVE))
        self.file.write_text(
            f'#!/bin/sh\necho "$@" >>{self.calls_file}\nwhile [ $1 != -o ]; do shift; done\n'
            f"cp {self.result} $2 && chmod 755 $2\n"
        )
        self.file.chmod(0o755)
        monkeypatch.setattr(programs, "find", lambda name: str(self.file) if name == "cc" else None)
        monkeypatch.setattr(helpers, "find_spec", lambda _: None)
        self._monkeypatch = monkeypatch

    def is_zig(self):
        """Let it be Zig, too."""
        real = helpers.zig
        self._monkeypatch.setattr(helpers, "find_spec", {"ziglang": object()}.get)
        self._monkeypatch.setattr(helpers, "zig", lambda name: [str(self.file), *real(name)[1:]])

    def makes(self, content):
        self.result.write_bytes(content)

    def has_no_library(self):
        self.file.write_text("#!/bin/sh\necho ${1#-print-file-name=}\n")

    def fails(self, said="cannot find -lc"):
        self.file.write_text(
            f"#!/bin/sh\n[ $1 = -print-file-name=libc.a ] || echo {said} >&2\nexit 1\n"
        )

    def does(self, script):
        """What it does in the place of all else."""
        self.file.write_text(f"#!/bin/sh\n{script}\n")

    @property
    def calls(self):
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


def package(source, architecture, content):
    """Put a program where the wheel has it, with its digest."""
    program = helpers._PACKAGED / architecture
    program.write_bytes(content)
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in (source, program)
    ]
    source.with_name("SHA256SUMS").write_text("".join(lines))
    return program


class TestWheel:
    def test_its_program_is_taken(self, source, compiler, tmp_path):
        for architecture in (NATIVE, FOREIGN):
            program = package(source, architecture, head(architecture))
            assert helper_program(architecture, tmp_path / "cache") == program
        assert not compiler.calls
        assert not (tmp_path / "cache").exists()

    def test_not_that_of_another_source(self, source, compiler, tmp_path):
        program = package(source, NATIVE, head(NATIVE))
        source.write_text("int changed;\n")
        assert helper_program(NATIVE, tmp_path / "cache") != program
        assert len(compiler.calls) == 1

    def test_not_a_damaged_one(self, source, compiler, tmp_path):
        program = package(source, NATIVE, head(NATIVE))
        program.write_bytes(head(NATIVE) + b"more")
        assert helper_program(NATIVE, tmp_path / "cache") != program


class TestCompiler:
    def test_the_program_is_kept(self, source, compiler, tmp_path):
        said = []
        first = helper_program(NATIVE, tmp_path / "cache", say=said.append)
        assert first.read_bytes() == head(NATIVE)
        assert first.stat().st_mode & 0o111
        assert helper_program(NATIVE, tmp_path / "cache", say=said.append) == first
        assert said == [f"making the helper for {ARCHITECTURES[NATIVE].debian}"]
        [call] = compiler.calls
        assert "-static" in call.split()

    def test_another_source_makes_another_program(self, source, compiler, tmp_path):
        first = helper_program(NATIVE, tmp_path / "cache")
        source.write_text("int changed;\n")
        assert helper_program(NATIVE, tmp_path / "cache") != first

    def test_a_damaged_one_is_made_again(self, source, compiler, tmp_path):
        program = helper_program(NATIVE, tmp_path / "cache")
        program.write_bytes(b"damaged")
        assert helper_program(NATIVE, tmp_path / "cache").read_bytes() == head(NATIVE)

    def test_it_is_used_now_so_it_is_the_last_to_go(self, source, compiler, tmp_path):
        program = helper_program(NATIVE, tmp_path / "cache")
        os.utime(program.with_name("in-use.lock"), (1, 1))
        helper_program(NATIVE, tmp_path / "cache")
        assert program.with_name("in-use.lock").stat().st_mtime > 1

    def test_a_cache_that_cannot_be_written_is_enough(self, source, compiler, tmp_path):
        program = helper_program(NATIVE, tmp_path / "cache")
        folders = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
        for path in folders:
            path.chmod(path.stat().st_mode & ~stat.S_IWUSR)
        try:
            assert helper_program(NATIVE, tmp_path / "cache") == program
        finally:
            for path in folders:
                path.chmod(path.stat().st_mode | stat.S_IWUSR)

    @pytest.mark.parametrize("content", [b"\x7fELF", head(FOREIGN), b"", b"#!/bin/sh"])
    def test_a_program_for_something_else_is_refused(self, source, compiler, tmp_path, content):
        compiler.makes(content)
        with pytest.raises(ImageError, match=f"made no program for {ARCHITECTURES[NATIVE].debian}"):
            helper_program(NATIVE, tmp_path / "cache")
        assert not Store(tmp_path / "cache", HELPERS, Entry).all()

    def test_it_fails(self, source, compiler, tmp_path):
        compiler.fails()
        with pytest.raises(ImageError) as caught:
            helper_program(NATIVE, tmp_path / "cache")
        assert "cannot find -lc" in caught.value.details
        assert "libc6-dev" not in caught.value.remedy  # it is there
        left = {path.name for path in (tmp_path / "cache/helpers").iterdir()}
        assert all(name.endswith(".lock") for name in left)

    def test_the_library_is_missing(self, source, compiler, tmp_path):
        compiler.has_no_library()
        with pytest.raises(ImageError) as caught:
            helper_program(NATIVE, tmp_path / "cache")
        assert "libc6-dev" in caught.value.remedy

    @pytest.mark.parametrize("said", ["No space left on device", "error: NoSpaceLeft"])
    def test_the_disk_is_full(self, source, compiler, tmp_path, said):
        compiler.fails(said)
        with pytest.raises(ImageError) as caught:
            helper_program(NATIVE, tmp_path / "cache")
        assert caught.value.remedy.startswith("make room")

    def test_it_writes_nothing(self, source, compiler, tmp_path):
        compiler.does("exit 0")
        with pytest.raises(ImageError) as caught:
            helper_program(NATIVE, tmp_path / "cache")
        assert "it made no program" in caught.value.details

    def test_nothing_is_left_of_one_that_takes_too_long(
        self, source, compiler, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(helpers, "_SECONDS", 0.5)
        child = tmp_path / "child"
        compiler.does(f"sleep 50 &\necho $! >{child}\nsleep 50")
        with pytest.raises(ImageError) as caught:
            helper_program(NATIVE, tmp_path / "cache")
        assert "it did not end within 0.5 seconds" in caught.value.details
        assert not Path("/proc", child.read_text().strip()).exists()

    def test_there_is_none(self, source, compiler, tmp_path, monkeypatch):
        monkeypatch.setattr(programs, "find", lambda _: None)
        with pytest.raises(ImageError) as caught:
            helper_program(NATIVE, tmp_path / "cache")
        assert caught.value.details == ""
        assert "gcc" in caught.value.remedy


class TestLacking:
    """What to install, before anything is made."""

    def test_nothing_where_there_is_a_compiler(self, source, tmp_path, monkeypatch):
        if not helpers._has_library(str(programs.find("cc"))):
            pytest.skip("there is no C compiler here, or no static C library")
        assert helpers.lacking(NATIVE, tmp_path) == ()

    @pytest.mark.parametrize("place", ["", "usr/lib/x-linux-gnu", "usr/lib64"])
    def test_the_compiler(self, source, compiler, tmp_path, monkeypatch, place):
        monkeypatch.setattr(programs, "find", lambda _: None)
        monkeypatch.setattr(helpers, "_ROOT", tmp_path)
        if place:
            (tmp_path / place).mkdir(parents=True)
            (tmp_path / place / "libc.a").touch()
        missing = helpers.lacking(NATIVE, tmp_path)
        assert [*map(programs.package_of, missing)] == ["gcc", "libc6-dev"][: 1 if place else 2]

    def test_the_library(self, source, compiler, tmp_path):
        compiler.has_no_library()
        missing = helpers.lacking(NATIVE, tmp_path)
        assert [*map(programs.package_of, missing)] == ["libc6-dev"]

    @pytest.mark.parametrize("where", ["wheel", "cache", "zig"])
    def test_nothing_if_there_is_a_program(self, source, compiler, tmp_path, monkeypatch, where):
        if where == "wheel":
            package(source, NATIVE, head(NATIVE))
        elif where == "cache":
            helper_program(NATIVE, tmp_path)
        else:
            monkeypatch.setattr(helpers, "find_spec", {"ziglang": object()}.get)
        monkeypatch.setattr(programs, "find", lambda _: None)
        assert helpers.lacking(NATIVE, tmp_path) == ()

    def test_nothing_that_helps_another_architecture(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(programs, "find", lambda _: None)
        assert helpers.lacking(FOREIGN, tmp_path) == ()


class TestOtherArchitectures:
    def test_the_compiler_of_this_machine_is_not_asked(self, source, compiler, tmp_path):
        with pytest.raises(ImageError) as caught:
            helper_program(FOREIGN, tmp_path / "cache")
        assert compiler.calls == []
        assert "pip install ziglang" in caught.value.remedy
        assert "gcc" not in caught.value.remedy

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_zig_is_used_where_it_is_installed(
        self, compiler, source, tmp_path, monkeypatch, architecture
    ):
        compiler.is_zig()
        monkeypatch.setattr(programs, "find", lambda _: None)
        compiler.makes(head(architecture))
        said = []
        program = helper_program(architecture, tmp_path / "cache", say=said.append)
        assert program.read_bytes() == head(architecture)
        assert ["minutes" in line for line in said] == [architecture != NATIVE]
        [call] = compiler.calls
        assert call.startswith("-m ziglang cc -target ")
        assert f" {ARCHITECTURES[architecture].zig} " in call


class TestZig:
    """What Zig does where it is installed."""

    @pytest.fixture
    def calls(self, compiler, source, monkeypatch):
        """The work folders of Zig's calls, so far."""
        compiler.is_zig()
        compiler.makes(head(FOREIGN))
        calls, real = [], helpers.compiled

        def compiled(*given):
            calls.append(given[4])
            return real(*given)

        monkeypatch.setattr(helpers, "compiled", compiled)
        return calls

    def test_what_fails_once_is_tried_again(self, calls, compiler, tmp_path):
        text = compiler.file.read_text()
        once = f'#!/bin/sh\nmkdir {tmp_path}/once && echo "no such file" && exit 1\n'
        compiler.file.write_text(once + text)
        program = helper_program(FOREIGN, tmp_path / "cache")
        assert program.read_bytes() == head(FOREIGN)
        assert len({*calls}) == 2

    def test_the_remedy_if_it_fails_twice(self, calls, compiler, tmp_path):
        compiler.fails()
        with pytest.raises(ImageError) as caught:
            helper_program(FOREIGN, tmp_path / "cache")
        assert len(calls) == 2
        assert "try again" in caught.value.remedy
        assert "pip install" not in caught.value.remedy

    def test_another_run_tidies_the_cache(self, calls, tmp_path, monkeypatch):
        """It leaves what a compiler works with."""
        real = helpers.compiled

        def compiled(*given):
            tidy(tmp_path / "cache", print)
            assert given[4].is_dir()
            return real(*given)

        monkeypatch.setattr(helpers, "compiled", compiled)
        helper_program(FOREIGN, tmp_path / "cache")
        assert len(calls) == 1


def test_the_source_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(own, "own_folders", lambda: [tmp_path])
    with pytest.raises(ImageError, match="is missing"):
        helper_source()


def test_several_processes_make_one(tmp_path, source, compiler):
    """One makes it, and the others wait for it."""
    script = f"""
import sys
from pathlib import Path
from pytest_vmsandbox.catalogue import helpers, own, programs
own.own_folders = lambda: [Path({str(source.parent.parent)!r})]
helpers._PACKAGED = Path("/nowhere")
programs.find = lambda name: {str(compiler.file)!r}
print(helpers.helper_program({NATIVE!r}, Path({str(tmp_path / "cache")!r})))
"""
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, encoding="utf-8")
        for _ in range(2)
    ]
    printed = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    [program] = printed
    assert Path(program).read_bytes() == head(NATIVE)
    assert len(compiler.calls) == 1


def test_the_recorded_digests_are_those_of_this_source():
    """Otherwise no wheel could have the programs. See images/helper/build.py."""
    source = Path(__file__).parents[2] / "images/helper/helper.c"
    digests = helpers.recorded(source)
    assert [*digests] == ["helper.c", *ARCHITECTURES]
    assert digests["helper.c"] == hashlib.sha256(source.read_bytes()).hexdigest()
