"""What a guest has written into its copy of a project, brought back: a guest that cannot be trusted."""

import io
import os
import socket
import tarfile
import tempfile
import time

import pytest

from pytest_vmsandbox.core.errors import ConfigError, TransferError
from pytest_vmsandbox.inside import tree_copy
from pytest_vmsandbox.inside.tree import Tree
from pytest_vmsandbox.inside.tree_copy import Outcome, Patterns, bring_back, changes, push
from support.local import LocalGuest

ALL = Patterns(["*"])


class Sides:
    """A project here, and a guest's copy of it."""

    def __init__(self, folder):
        self.here, self.there = folder / "here", folder / "there"
        self.guest = LocalGuest()
        self.here.mkdir()
        (self.here / "kept.txt").write_text("kept")
        (self.here / "old.txt").write_text("old")
        self.since = time.time()

    def push(self):
        self.tree = Tree.of(self.here)
        push(self.guest.stream_script, self.tree, str(self.there))

    def write(self, name, content="new"):
        file = self.there / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return file

    def bring_back(self, patterns=ALL, **more):
        found = bring_back(
            self.guest.stream_script, self.tree, str(self.there),
            patterns=patterns, since=self.since, **more,
        )  # fmt: skip
        return {outcome: paths for outcome, paths in found.items() if paths}

    @property
    def files(self):
        """All that is here, but for folders."""
        return {
            str(it.relative_to(self.here)): None if it.is_symlink() else it.read_text()
            for it in self.here.rglob("*")
            if it.is_symlink() or it.is_file()
        }


@pytest.fixture
def sides(tmp_path):
    sides = Sides(tmp_path)
    sides.push()
    return sides


SAME = {"kept.txt": "kept", "old.txt": "old"}


def test_nothing_was_written(sides):
    assert sides.bring_back() == {}
    assert changes(sides.guest.stream_script, sides.tree, str(sides.there)).written == {}


def test_what_is_written_comes_back(sides):
    """New files in new folders, odd names among them, and other content; nothing that is equal."""
    odd = os.fsdecode(b"-odd \xff\n'$x")
    sides.write("old.txt", "changed")
    sides.write("kept.txt", "kept")
    sides.write(f"a/b/{odd}", "1")
    sides.write(f"a/{'l' * 200}/{'m' * 200}", "2")
    (sides.there / "empty").mkdir()
    assert sides.bring_back() == {
        Outcome.BROUGHT: [f"a/b/{odd}", f"a/{'l' * 200}/{'m' * 200}", "old.txt"]
    }
    assert sides.files == {
        "kept.txt": "kept", "old.txt": "changed",
        f"a/b/{odd}": "1", f"a/{'l' * 200}/{'m' * 200}": "2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("glob", "fits", "other"),
    [
        ("out.txt", ["out.txt"], ["a/out.txt"]),
        ("*.out", ["x.out", "a/b/x.out"], ["x.outer"]),
        ("**/__snapshots__", ["__snapshots__/a", "t/__snapshots__/b/c"], ["a__snapshots__"]),
        ("data/", ["data/x", "data/y/z"], ["a/data/x", "database"]),
        ("t/*/x", ["t/a/x", "t/a/b/x"], ["t/x"]),
        ("odd[1].txt", ["odd[1].txt", "odd1.txt"], ["odd2.txt"]),
    ],
)
def test_globs(glob, fits, other):
    patterns = Patterns([glob])
    assert {path: patterns.outcome(path) for path in fits} == dict.fromkeys(fits, Outcome.BROUGHT)
    assert {path: patterns.outcome(path) for path in other} == dict.fromkeys(other, Outcome.LEFT)


def test_the_last_glob_decides():
    patterns = Patterns(["*.out", "!tmp", "tmp/keep.out"])
    assert patterns.outcome("tmp/x.out") is None  # and nobody is told
    assert patterns.outcome("tmp/keep.out") is Outcome.BROUGHT


@pytest.mark.parametrize(
    "glob", ["", "!", "/etc/passwd", "../x", "a/../../x", ".git", ".git/hooks/*", "!../x"]
)
def test_globs_that_are_refused(glob):
    with pytest.raises(ConfigError, match="vm_pull"):
        Patterns([glob])


@pytest.mark.parametrize("path", [".git/hooks/pre-commit", "a/.git/config", ".GIT/config"])
def test_git_s_own_never_comes(sides, path):
    sides.write(path)
    assert sides.bring_back() == {}
    assert sides.bring_back(Patterns(["*", "*.GIT/*", "*/hooks/*", "*config"])) == {}
    assert sides.files == SAME


@pytest.mark.parametrize(
    "path",
    [
        *("conftest.py", "a/test_x.py", "a/X.PY", "m.so", "m.cpython-311-x.so", "x.pth"),
        *("a/__pycache__/x.cpython-311.pyc", "pytest.ini", "pyproject.toml", "tox.ini"),
        *("setup.cfg", ".coveragerc", ".gitattributes", ".github/workflows/x.yml"),
    ],
)
def test_code_comes_only_by_its_exact_name(sides, path):
    sides.write(path)
    assert sides.bring_back() == {Outcome.IS_CODE: [path]}
    assert sides.files == SAME
    assert sides.bring_back(Patterns(["*", path])) == {Outcome.BROUGHT: [path]}
    assert sides.files[path] == "new"


def test_what_nobody_has_asked_for(sides):
    for name in ("a/profile.out", "__pycache__/x.pyc", ".pytest_cache/x", ".coverage", "x.py"):
        sides.write(name)
    assert sides.bring_back(Patterns([])) == {Outcome.LEFT: ["a/profile.out", "x.py"]}
    assert sides.files == SAME


def test_removed_files_stay_here_and_are_told_if_they_are_wanted(sides):
    (sides.there / "old.txt").unlink()
    assert sides.bring_back() == {Outcome.REMOVED: ["old.txt"]}
    assert sides.bring_back(Patterns(["kept.txt"])) == {}
    assert sides.files == SAME


@pytest.mark.parametrize("how", ["changed", "made", "removed", "by another guest"])
def test_what_was_written_here_meanwhile_stays(sides, how):
    name = "new.txt" if how in ("made", "by another guest") else "old.txt"
    sides.write(name, "of the guest")
    if how == "by another guest":
        other = sides.there.with_name("other")
        push(sides.guest.stream_script, sides.tree, str(other))
        (other / name).write_text("of another guest")
        bring_back(
            sides.guest.stream_script,
            sides.tree,
            str(other),
            patterns=ALL,
            since=sides.since,
        )
    elif how == "removed":
        (sides.here / name).unlink()
    else:
        (sides.here / name).write_text("of a person")
    before = sides.files
    assert sides.bring_back() == {Outcome.DIFFERENT: [name]}
    assert sides.files == before


def test_what_others_have_written_likewise_is_no_conflict(sides):
    sides.write("new.txt")
    (sides.here / "new.txt").write_text("new")
    assert sides.bring_back() == {}


def test_what_did_not_go_there_is_written_over_if_it_is_old(tmp_path):
    """Such as the result of the last run, which git ignores."""
    sides = Sides(tmp_path)
    sides.push()
    (sides.here / "profile.out").write_text("of the last run")
    (sides.here / "profile.out").chmod(0o640)
    sides.since = time.time() + 1
    sides.write("profile.out")
    assert sides.bring_back() == {Outcome.BROUGHT: ["profile.out"]}
    assert sides.files["profile.out"] == "new"
    assert (sides.here / "profile.out").stat().st_mode & 0o777 == 0o640


def test_no_link_is_followed_or_made(sides, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("safe")
    (sides.here / "folder").symlink_to(outside)
    (sides.here / "file").symlink_to(outside / "file")
    (sides.here / "fifo").mkdir()
    (sides.there / "made").symlink_to("/etc/passwd")
    os.mkfifo(sides.there / "pipe")
    for name in ("folder/file", "folder/a/b", "file", "fifo"):
        sides.write(name)
    assert sides.bring_back() == {Outcome.IN_THE_WAY: ["fifo", "file", "folder/a/b", "folder/file"]}
    assert [it.name for it in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "safe"
    assert not os.path.lexists(sides.here / "made")


def test_limits(sides, monkeypatch):
    monkeypatch.setattr(tree_copy, "MAX_FILE", 10)
    monkeypatch.setattr(tree_copy, "MAX_TOTAL", 15)
    sides.write("a", "x" * 10)
    sides.write("b", "x" * 11)
    sides.write("c", "x" * 3)
    assert sides.bring_back() == {Outcome.BROUGHT: ["a"], Outcome.TOO_LARGE: ["b", "c"]}
    monkeypatch.setattr(tree_copy, "MAX_FILES", 1)
    monkeypatch.setattr(tree_copy, "MAX_TOTAL", 100)
    assert sides.bring_back(Patterns(["c", "d"])) == {
        Outcome.BROUGHT: ["c"], Outcome.LEFT: ["a", "b"]
    }  # fmt: skip


class Liar(LocalGuest):
    """Lists what it has, and then hands out something else."""

    def __init__(self, archive):
        super().__init__()
        self.archive = archive

    def stream_script(self, script, *, stdin=None, stdout=None):
        if "tar " not in script:
            super().stream_script(script, stdin=stdin, stdout=stdout)
            return
        for start in range(0, len(self.archive), 1000):
            stdout(self.archive[start : start + 1000])


def archive(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.SYMTYPE:
                member.linkname = content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"no archive at all" * 100, "archive"),
        (archive(("./../evil", tarfile.REGTYPE, b"x")), "leads out"),
        (archive(("/tmp/evil", tarfile.REGTYPE, b"x")), "leads out"),
        (archive(("./new", tarfile.REGTYPE, b"x" * 100_000)), "sent more than"),
    ],
    ids=["noise", "upwards", "absolute", "too much"],
)
def test_an_archive_that_is_refused(sides, sent, why):
    sides.write("new", "x")
    sides.guest = Liar(sent)
    with pytest.raises(TransferError) as caught:
        sides.bring_back()
    assert why in str(caught.value)
    assert sides.files == SAME


def test_an_archive_with_other_files_than_those_asked_for(sides, tmp_path):
    """What was not asked for is not written; what a link leads to is not read."""
    (tmp_path / "secret").write_text("secret")
    sides.write("a/secret", "x")
    sides.write("b", "x")
    sides.guest = Liar(
        archive(
            ("./a", tarfile.SYMTYPE, str(tmp_path)),
            ("./conftest.py", tarfile.REGTYPE, b"evil"),
            ("./b", tarfile.SYMTYPE, str(tmp_path / "secret")),
        )
    )
    assert sides.bring_back() == {}
    assert sides.files == SAME


@pytest.mark.parametrize("name", ["__snapshots__/../../x", "../x", "a/./x", "a//x", "/x"])
def test_a_listing_that_leads_out_of_the_folder(sides, tmp_path, monkeypatch, name):
    """Such a name is resolved twice here: where the archive was unpacked, and in the project."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch/x").write_text("of the host")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))

    class Listing(Liar):
        def stream_script(self, script, *, stdin=None, stdout=None):
            super().stream_script(script, stdin=stdin, stdout=stdout)
            if "find " in script:
                stdout(f"f\0001\000{time.time()}\000{name}\0".encode())

    sides.guest = Listing(archive(("./__snapshots__/y", tarfile.REGTYPE, b"y")))
    with pytest.raises(TransferError, match="is invalid"):
        sides.bring_back()
    assert sides.files == SAME
    assert not (tmp_path / "x").exists()


def test_half_a_file_is_never_there(sides, monkeypatch):
    """And one that cannot be written keeps no other one away."""
    rename = os.rename

    def fail(source, target, **how):
        if target == "old.txt":
            raise OSError(28, "No space left on device")
        rename(source, target, **how)

    sides.write("a", "1")
    sides.write("old.txt", "changed")
    sides.write("z", "2")
    monkeypatch.setattr(os, "rename", fail)
    assert sides.bring_back() == {
        Outcome.BROUGHT: ["a", "z"], Outcome.UNWRITABLE: ["old.txt (No space left on device)"]
    }  # fmt: skip
    assert sides.files == SAME | {"a": "1", "z": "2"}


def test_a_socket_here(sides, monkeypatch):
    monkeypatch.chdir(sides.here)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
    sides.write("s")
    assert sides.bring_back() == {Outcome.IN_THE_WAY: ["s"]}
