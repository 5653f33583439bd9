"""What of a project goes to a guest: with a real git, and a real find and tar in the guest's place."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pytest_vmsandbox.core.errors import CommandError, CommandResult, ConfigError, TransferError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.inside import tree as tree_module, tree_copy
from pytest_vmsandbox.inside.tree import Tree, TreeEntry
from pytest_vmsandbox.inside.tree_copy import Changes, changes, push

ODD_NAMES = ["a b", "-rf", "--", "new\nline", "it's", '"', "$HOME", "*", "é€", "\\", "...", " "]
RAW = os.fsdecode(b"raw-\xff\xfe")
LONG = "l" * 120


class FakeGuest:
    """Runs scripts here as a guest would; counts them."""

    def __init__(self, home):
        self.home = home
        self.scripts = []

    def stream_script(self, script, *, stdin=None, stdout=None):
        self.scripts.append(script)
        process = subprocess.Popen(
            ["/bin/sh", "-c", script],
            cwd=self.home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process:
            with suppress(BrokenPipeError):
                while stdin is not None and (data := stdin.read(1 << 16)):
                    process.stdin.write(data)
                    process.stdin.flush()
            with suppress(BrokenPipeError):
                process.stdin.close()
            while data := process.stdout.read1(1 << 16):
                if stdout is not None:
                    stdout(data)
            stderr = process.stderr.read().decode(errors="replace")
        if process.returncode:
            result = CommandResult(
                argv=("sh",), returncode=process.returncode, stdout="", stderr=stderr, duration=0
            )
            raise CommandError("the script failed", result=result)


class TalkingGuest:
    """Gives one answer to everything."""

    def __init__(self, answer, status=0):
        self.answer, self.status = answer, status

    def stream_script(self, script, *, stdin=None, stdout=None):
        stdout(self.answer)
        if self.status:
            result = CommandResult(
                argv=("sh",), returncode=self.status, stdout="", stderr="sorry", duration=0
            )
            raise CommandError("the script failed", result=result)


@pytest.fixture
def guest(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    return FakeGuest(home)


@pytest.fixture(autouse=True)
def git_of_its_own(monkeypatch, tmp_path_factory):
    """No setting of this machine, and none of the hook that may run these tests, plays a part."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_SYSTEM": "/dev/null",
        "GIT_CEILING_DIRECTORIES": str(tmp_path_factory.getbasetemp()),
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@example.org",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.org",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def git(folder, *arguments):
    if not shutil.which("git"):
        pytest.skip("there is no git on this machine")
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def write(root, *paths, text="x"):
    for path in paths:
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


def files(tree):
    return [path for path, entry in tree.entries.items() if entry.kind != "dir"]


def picture(folder, but=()):
    """Everything that the guest has to have as the host has it."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder", path.stat().st_mode & 0o777)
        else:
            status = path.stat()
            found[name] = (
                status.st_mode & 0o777,
                status.st_mtime_ns // 1000,
                path.read_bytes(),
            )
    return {name: it for name, it in found.items() if name not in but}


class TestGit:
    @pytest.fixture(autouse=True)
    def repository(self, root):
        git(root, "init", "-q")

    def test_what_is_tracked_or_not_ignored(self, root):
        write(root, ".gitignore", text="*.log\nbuilt/\n")
        write(root, "src/a.py", "forced.log", "other.log", "built/x", "new/b.py", "gone")
        git(root, "add", "src", "gone")
        git(root, "add", "-f", "forced.log")
        (root / "gone").unlink()
        (root / "empty").mkdir()
        tree = Tree.of(root)
        assert list(tree.entries) == [
            ".gitignore", "forced.log", "new", "new/b.py", "src", "src/a.py"
        ]  # fmt: skip
        assert tree.root == root

    def test_entries(self, root):
        write(root, "sub/file", text="four")
        os.utime(root / "sub/file", ns=(0, 1_700_000_000_123_456_789))
        (root / "sub/file").chmod(0o751)
        (root / "sub").chmod(0o555)
        (root / "link").symlink_to("../else where")
        assert Tree.of(root).entries == {
            "link": TreeEntry(kind="link", target="../else where"),
            "sub": TreeEntry(kind="dir", mode=0o755),
            "sub/file": TreeEntry(
                kind="file", size=4, mtime_ns=1_700_000_000_123_456_789, mode=0o751
            ),
        }  # fmt: skip
        (root / "sub").chmod(0o755)

    def test_a_time_before_all_times(self, root):
        write(root, "file")
        os.utime(root / "file", ns=(0, -1_500_000_000))
        assert Tree.of(root).entries["file"].mtime_ns == 0

    def test_names(self, root):
        names = sorted([*ODD_NAMES, RAW])
        write(root, *names)
        git(root, "add", "--", *names[::2])
        assert files(Tree.of(root)) == names

    def test_a_part_of_a_work_tree(self, root):
        write(root, "beside", "part/of/it", "part/new")
        git(root, "add", "part/of")
        assert files(Tree.of(root / "part")) == ["new", "of/it"]

    def test_a_part_that_is_ignored(self, root):
        write(root, ".gitignore", text="part/\n")
        write(root, "part/sub/file")
        assert files(Tree.of(root / "part")) == ["sub/file"]
        assert files(Tree.of(root / "part/sub")) == ["file"]

    def test_a_repository_that_ignores_all(self, root):
        write(root, ".gitignore", text="*\n")
        write(root, "file")
        assert files(Tree.of(root)) == []
        assert files(Tree.of(root, more=["file"])) == ["file"]

    @pytest.fixture
    def library(self, tmp_path):
        library = tmp_path / "library"
        write(library, "tracked")
        git(library, "init", "-q")
        git(library, "add", ".")
        git(library, "commit", "-qm", "first")
        return library

    def test_submodules_and_repositories_inside(self, root, library):
        git(root, "-c", "protocol.file.allow=always", "submodule", "add", str(library), "module")
        write(root, "module/untracked")
        shutil.copytree(library, root / "embedded")
        git(root, "-c", "advice.addEmbeddedRepo=false", "add", "embedded")
        shutil.copytree(library, root / "cloned")
        write(root, "cloned/.gitignore", text="ignored\n")
        write(root, "cloned/ignored", "cloned/new", ".tox/src/cloned/file")
        git(root / ".tox/src/cloned", "init", "-q")
        assert files(Tree.of(root)) == [
            ".gitmodules",
            "cloned/.gitignore", "cloned/new", "cloned/tracked",
            "embedded/tracked",
            "module/tracked",
        ]  # fmt: skip
        assert files(Tree.of(root / "module")) == ["tracked", "untracked"]

    def test_a_repository_inside_that_is_broken(self, root, library):
        shutil.copytree(library, root / "embedded")
        git(root, "-c", "advice.addEmbeddedRepo=false", "add", "embedded")
        shutil.rmtree(root / "embedded/.git")
        write(root, "embedded/.git", text="gitdir: /nowhere\n")
        assert files(Tree.of(root)) == ["embedded/tracked"]

    def test_a_submodule_that_is_not_there(self, root, library):
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=library, text=True)
        git(root, "update-index", "--add", "--cacheinfo", f"160000,{head.strip()},module")
        assert list(Tree.of(root).entries) == []
        (root / "module").mkdir()
        assert list(Tree.of(root).entries) == []

    def test_caches_that_nobody_ignores(self, root):
        write(root, "a/__pycache__/a.pyc", ".venv/bin/python", "env/pyvenv.cfg", "env/lib/x")
        write(root, "node_modules/kept", "__pycache__x", "odd/.tox")
        (root / "link").symlink_to("env")
        git(root, "add", "node_modules")
        assert files(Tree.of(root)) == ["__pycache__x", "link", "node_modules/kept", "odd/.tox"]

    def test_what_runs_write_that_nobody_ignores(self, root):
        write(root, ".coverage", ".coveragerc", "sub/.coverage", "tracked/.coverage")
        git(root, "add", "tracked")
        assert files(Tree.of(root)) == [".coveragerc", "tracked/.coverage"]

    def test_what_is_tracked_behind_a_link(self, root, tmp_path):
        write(root, "folder/file")
        git(root, "add", ".")
        shutil.move(root / "folder", tmp_path / "elsewhere")
        (root / "folder").symlink_to(tmp_path / "elsewhere")
        assert files(Tree.of(root)) == ["folder"]

    def test_a_file_that_became_a_folder(self, root):
        write(root, "it")
        git(root, "add", ".")
        (root / "it").unlink()
        write(root, "it/inside")
        assert list(Tree.of(root).entries) == ["it", "it/inside"]

    def test_the_repository_of_a_hook_is_not_ours(self, root, tmp_path, monkeypatch):
        other = tmp_path / "other"
        write(other, "other")
        git(other, "init", "-q")
        git(other, "add", ".")
        write(root, "file")
        monkeypatch.setenv("GIT_DIR", str(other / ".git"))
        monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
        assert files(Tree.of(root)) == ["file"]

    def test_the_root_behind_a_link(self, root, tmp_path):
        write(root, "file")
        (tmp_path / "link").symlink_to(root)
        tree = Tree.of(tmp_path / "link")
        assert (tree.root, files(tree)) == (root, ["file"])

    def test_git_refuses(self, root):
        (root / ".git/index").write_bytes(b"no index")
        with pytest.raises(ConfigError, match="failed to list the files") as caught:
            Tree.of(root)
        assert "index" in caught.value.details
        assert "git status" in caught.value.remedy

    @pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
    def test_a_repository_of_somebody_else(self, root):
        for place in (root, root / ".git"):
            os.chown(place, 12345, 12345)
        with pytest.raises(ConfigError) as caught:
            Tree.of(root)
        assert "safe.directory" in caught.value.details


class TestWalk:
    def test_all_but_caches(self, root):
        write(root, "file", "sub/file", "sub/.git", "x.egg-info/PKG-INFO", "build/it", ".coverage")
        write(root, ".git/HEAD", ".hg/x", "a/__pycache__/x", "env/pyvenv.cfg", "env/x", ".tox/x")
        (root / "empty").mkdir()
        (root / "link").symlink_to("env")
        assert list(Tree.of(root).entries) == [
            "a", "build", "build/it", "empty", "file", "link", "sub", "sub/file",
            "x.egg-info", "x.egg-info/PKG-INFO",
        ]  # fmt: skip

    def test_without_git(self, root, monkeypatch):
        git(root, "init", "-q")
        write(root, ".gitignore", text="ignored")
        write(root, "ignored")
        monkeypatch.setenv("PATH", str(root))
        assert files(Tree.of(root)) == [".gitignore", "ignored"]

    def test_a_bare_repository(self, root):
        git(root, "init", "-q", "--bare")
        assert "HEAD" in files(Tree.of(root))

    def test_special_files(self, root, monkeypatch):
        write(root, "file")
        os.mkfifo(root / "pipe")
        monkeypatch.chdir(root)
        with socket.socket(socket.AF_UNIX) as it:
            it.bind("socket")
            assert files(Tree.of(root)) == ["file"]

    def test_names(self, root):
        write(root, *ODD_NAMES, RAW)
        assert files(Tree.of(root)) == sorted([*ODD_NAMES, RAW])

    def test_what_cannot_be_read(self, root, monkeypatch):
        (root / RAW).mkdir()

        def scandir(path):
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(ConfigError, match="cannot be sent to a guest: Permission denied"):
            Tree.of(root)

    def test_what_cannot_be_looked_at(self, root, monkeypatch):
        write(root, RAW)

        def lstat(path):
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(os, "lstat", lstat)
        with pytest.raises(ConfigError) as caught:
            Tree.of(root)
        str(caught.value).encode()


class TestMore:
    @pytest.fixture(autouse=True)
    def repository(self, root):
        git(root, "init", "-q")
        write(root, ".gitignore", text="built/\n*.so\n.venv/\n")
        write(root, "built/deep/x", "built/__pycache__/x", "a/b.so", ".venv/pyvenv.cfg", "a/c")

    def test_ignored_files_and_folders(self, root):
        (root / "built/empty").mkdir()
        tree = Tree.of(root, more=["built/", "./a/b.so", "a/c"])
        assert list(tree.entries) == [
            ".gitignore", "a", "a/b.so", "a/c",
            "built", "built/deep", "built/deep/x", "built/empty",
        ]  # fmt: skip

    def test_an_environment_that_is_named(self, root):
        assert ".venv/pyvenv.cfg" in Tree.of(root, more=[".venv"]).entries

    def test_all(self, root):
        assert set(files(Tree.of(root, more=["."]))) >= {"built/deep/x", "a/b.so"}

    def test_a_link(self, root):
        (root / "x.so").symlink_to("/nowhere")
        assert Tree.of(root, more=["x.so"]).entries["x.so"].target == "/nowhere"

    @pytest.mark.parametrize(
        "path", ["", "/etc/passwd", "..", "a/../../x", "none", "a/none", "a\0b", ".git/HEAD"]
    )
    def test_what_cannot_be(self, root, path):
        with pytest.raises(ConfigError, match="vm_push"):
            Tree.of(root, more=[path])

    def test_what_leads_through_a_link(self, root, tmp_path):
        write(tmp_path, "outside/file")
        (root / "link").symlink_to(tmp_path / "outside")
        with pytest.raises(ConfigError, match="through a symbolic link"):
            Tree.of(root, more=["link/file"])


class TestRefused:
    @pytest.fixture(autouse=True)
    def people(self, monkeypatch, tmp_path):
        """Users of a machine whose homes are all below `tmp_path`."""
        homes = tmp_path / "homes"
        for name in ("me", "you", "daemon"):
            write(homes, f"{name}/project/file")
        (tmp_path / "link").symlink_to(homes / "you")
        me, you, daemon = (
            SimpleNamespace(pw_uid=number, pw_dir=str(home))
            for number, home in (
                (1000, homes / "me"),
                (1001, tmp_path / "link"),
                (33, homes / "daemon"),
            )
        )
        monkeypatch.setattr(pwd, "getpwall", lambda: [you, daemon])
        monkeypatch.setattr(pwd, "getpwuid", lambda _uid: me)
        monkeypatch.setenv("HOME", str(tmp_path / "mine"))
        (tmp_path / "mine").mkdir()
        return homes

    @pytest.mark.parametrize("path", ["me", "you", "", "..", "../mine", "../link"])
    def test_homes_and_what_holds_them(self, people, path):
        with pytest.raises(ConfigError, match="home folder") as caught:
            Tree.of(people / path)
        assert "--rootdir" in caught.value.remedy

    def test_the_root_folder(self, monkeypatch):
        monkeypatch.setattr(pwd, "getpwall", list)
        with pytest.raises(ConfigError, match="^/ "):
            Tree.of(Path("/"))

    @pytest.mark.parametrize("path", ["me/project", "you/project", "daemon"])
    def test_others_are_not(self, people, path):
        assert [it.rpartition("/")[2] for it in files(Tree.of(people / path))] == ["file"]

    def test_a_user_without_a_name(self, people, monkeypatch):
        def getpwuid(uid):
            raise KeyError(uid)

        monkeypatch.setattr(pwd, "getpwuid", getpwuid)
        monkeypatch.delenv("HOME")
        assert files(Tree.of(people / "me")) == ["project/file"]

    @pytest.mark.parametrize("path", ["none", "file"])
    def test_what_is_no_folder(self, root, path):
        write(root, "file")
        with pytest.raises(ConfigError, match="not a folder"):
            Tree.of(root / path)

    @pytest.mark.parametrize("with_git", [True, False])
    def test_too_many_files(self, root, monkeypatch, with_git):
        if with_git:
            git(root, "init", "-q")
        write(root, "a", *(f"data/{it}" for it in range(5)), *(f"src/{it}" for it in range(2)))
        monkeypatch.setattr(tree_module, "MAX_FILES", 8)
        assert len(files(Tree.of(root))) == 8
        monkeypatch.setattr(tree_module, "MAX_FILES", 7)
        with pytest.raises(ConfigError, match="more than 7 files") as caught:
            Tree.of(root)
        assert "data: 5 files, 0.0 MiB\n  src: " in caught.value.details
        assert ".gitignore" in caught.value.remedy

    def test_too_many_bytes(self, root):
        write(root, "many/a", "many/b", f"{RAW}/small")
        for name in ("data/large", "more/larger"):
            write(root, name)
            os.truncate(root / name, 150 * MIB)
        with pytest.raises(ConfigError, match="more than 256 MiB") as caught:
            Tree.of(root)
        lines = caught.value.details.splitlines()[1:]
        assert len(lines) == 3
        assert {line.strip() for line in lines} >= {
            "data: 1 files, 150.0 MiB", "more: 1 files, 150.0 MiB"
        }  # fmt: skip
        str(caught.value).encode()

    def test_more_counts(self, root):
        git(root, "init", "-q")
        write(root, ".gitignore", text="data\n")
        write(root, "data")
        os.truncate(root / "data", 300 * MIB)
        assert files(Tree.of(root)) == [".gitignore"]
        with pytest.raises(ConfigError, match="more than 256 MiB"):
            Tree.of(root, more=["data"])

    def test_no_more_is_looked_at_than_the_limit(self, root, monkeypatch):
        write(root, *(f"{top}/{it}" for top in "abc" for it in range(10)))
        monkeypatch.setattr(tree_module, "MAX_FILES", 5)
        looked = []
        real = os.lstat

        def lstat(path, **same):
            looked.append(str(path))
            return real(path, **same)

        monkeypatch.setattr(os, "lstat", lstat)
        with pytest.raises(ConfigError):
            Tree.of(root)
        assert len([it for it in looked if it.rpartition("/")[2].isdigit()]) <= 10


NONE = Changes({}, ())


class TestPush:
    def make(self, root):
        write(root, *ODD_NAMES, RAW, f"{LONG}/{LONG}/file", f"sub/{RAW}/{LONG}", "-sub/deep/file")
        write(root, "empty", text="")
        (root / "link").symlink_to("a b")
        (root / RAW[::-1]).symlink_to(RAW)
        (root / LONG / "link").symlink_to(f"../{LONG}/{LONG}/{RAW}")
        (root / "program").write_text("#!/bin/sh")
        (root / "program").chmod(0o755)
        (root / "folder").mkdir(mode=0o700)

    def test_all_of_it(self, guest, root, tmp_path):
        self.make(root)
        tree, dest = Tree.of(root), tmp_path / "guest/it's deep"
        push(guest.stream_script, tree, str(dest))
        assert picture(dest) == picture(root)
        assert len(guest.scripts) == 1
        assert changes(guest.stream_script, Tree.of(root), str(dest)) == NONE
        assert len(guest.scripts) == 2

    def test_a_relative_place(self, guest, root):
        write(root, "file")
        for dest in ("-name/", "sub/folder"):
            push(guest.stream_script, Tree.of(root), dest)
            assert picture(guest.home / dest) == picture(root)

    def test_an_empty_tree(self, guest, root, tmp_path):
        push(guest.stream_script, Tree.of(root), str(tmp_path / "new"))
        assert list((tmp_path / "new").iterdir()) == []

    @pytest.mark.parametrize(
        "mtime", [0, 1, 1_700_000_000_999_999_999, 1 << 61, -1, -1_500_000_000]
    )
    def test_any_time(self, guest, root, tmp_path, mtime):
        write(root, "file")
        os.utime(root / "file", ns=(0, mtime))
        dest = str(tmp_path / "dest")
        push(guest.stream_script, Tree.of(root), dest)
        assert (tmp_path / "dest/file").stat().st_mtime_ns == max(0, mtime)
        assert changes(guest.stream_script, Tree.of(root), dest) == NONE

    @pytest.mark.parametrize("change", ["content", "time", "mode", "link", "folder mode"])
    def test_one_change(self, guest, root, tmp_path, change):
        self.make(root)
        dest = tmp_path / "dest"
        push(guest.stream_script, Tree.of(root), str(dest))
        if change == "content":
            write(root, "a b", text="new")
        elif change == "time":
            os.utime(root / "a b", ns=(0, (root / "a b").stat().st_mtime_ns + 1000))
        elif change == "mode":
            (root / "a b").chmod(0o600)
        elif change == "link":
            (root / "link").unlink()
            (root / "link").symlink_to("nowhere")
        else:
            (root / "sub").chmod(0o711)
        expected = ["a b"] if change in {"content", "time"} else []
        assert list(changes(guest.stream_script, Tree.of(root), str(dest)).written) == expected
        push(guest.stream_script, Tree.of(root), str(dest))
        assert picture(dest) == picture(root)

    def test_what_a_test_changed_in_the_guest(self, guest, root, tmp_path):
        write(root, "file", "folder/file")
        dest = tmp_path / "dest"
        push(guest.stream_script, Tree.of(root), str(dest))
        write(dest, "file", text="y")
        shutil.rmtree(dest / "folder")
        write(dest, "own", "__pycache__/own")
        found = changes(guest.stream_script, Tree.of(root), str(dest))
        assert sorted(found.written) == ["__pycache__/own", "file", "own"]
        assert found.removed == ("folder/file",)
        push(guest.stream_script, Tree.of(root), str(dest))
        assert picture(dest, but=["own", "__pycache__", "__pycache__/own"]) == picture(root)
        assert (dest / "own").exists()

    def test_a_folder_of_which_the_mode_changed_keeps_what_is_in_it(self, guest, root, tmp_path):
        write(root, "folder/file")
        dest = tmp_path / "dest"
        push(guest.stream_script, Tree.of(root), str(dest))
        write(dest, "folder/own/file")
        (root / "folder").chmod(0o700)
        push(guest.stream_script, Tree.of(root), str(dest))
        assert picture(dest, but=["folder/own", "folder/own/file"]) == picture(root)
        assert (dest / "folder/own/file").exists()
        assert time.time() - (dest / "folder").stat().st_mtime < 60  # importlib looks at it

    def test_nothing_is_written_through_a_link(self, guest, root, tmp_path):
        write(root, "hard", "soft", "folder/file", text="new")
        outside = tmp_path / "outside"
        write(outside, "hard", "soft", "file", text="old")
        dest = tmp_path / "dest"
        dest.mkdir()
        os.link(outside / "hard", dest / "hard")
        (dest / "soft").symlink_to(outside / "soft")
        (dest / "folder").symlink_to(outside)
        push(guest.stream_script, Tree.of(root), str(dest))
        assert picture(dest) == picture(root)
        assert {it.read_text() for it in outside.iterdir()} == {"old"}

    def test_a_place_that_is_refused(self, guest, root, tmp_path):
        write(root, "file")
        write(tmp_path, "in the way")
        with pytest.raises(TransferError, match="could not be pushed") as caught:
            push(guest.stream_script, Tree.of(root), str(tmp_path / "in the way"))
        assert "exists" in caught.value.details
        with pytest.raises(TransferError, match="not a path"):
            push(guest.stream_script, Tree.of(root), "")

    def test_the_guest_cannot_take_it(self, guest, root, tmp_path, monkeypatch):
        write(root, "file", text="x" * 100_000)
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/tar").write_text("#!/bin/sh\necho No space left >&2; exit 2")
        (tmp_path / "bin/tar").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        with pytest.raises(TransferError, match="could not be pushed") as caught:
            push(guest.stream_script, Tree.of(root), str(tmp_path / "dest"))
        assert "disk=" in caught.value.remedy


class TestChanges:
    """A file that is not what it was when the tree was looked at."""

    @pytest.mark.parametrize("became", ["nothing", "link", "pipe", "folder"])
    def test_another_kind(self, guest, root, tmp_path, became):
        write(root, "a", "odd", "z")
        tree = Tree.of(root)
        (root / "odd").unlink()
        if became == "link":
            (root / "odd").symlink_to("/etc/passwd")
        elif became == "pipe":
            os.mkfifo(root / "odd")
        elif became == "folder":
            (root / "odd").mkdir()
        with pytest.raises(TransferError, match="project/odd changed while it was sent") as caught:
            push(guest.stream_script, tree, str(tmp_path / "dest"))
        assert ".gitignore" in caught.value.remedy

    def test_a_file_that_grew_before_it_was_sent_is_unchanged_there(self, guest, root, tmp_path):
        """The output of pytest may go into it. No test has written it."""
        write(root, "out.txt", text="a")
        tree, dest = Tree.of(root), tmp_path / "dest"
        write(root, "out.txt", text="a line more")
        push(guest.stream_script, tree, str(dest))
        assert changes(guest.stream_script, tree, str(dest)) == NONE
        write(dest, "out.txt", text="a test's")
        assert [*changes(guest.stream_script, tree, str(dest)).written] == ["out.txt"]

    def test_a_link_that_is_gone(self, guest, root, tmp_path):
        (root / RAW).symlink_to("x")
        tree = Tree.of(root)
        (root / RAW).unlink()
        with pytest.raises(TransferError, match="changed while") as caught:
            push(guest.stream_script, tree, str(tmp_path / "dest"))
        str(caught.value).encode()

    def test_what_was_written_before_it_is_packed_goes(self, guest, root, tmp_path):
        write(root, "file")
        tree = Tree.of(root)
        write(root, "file", text="longer")
        push(guest.stream_script, tree, str(tmp_path / "dest"))
        assert picture(tmp_path / "dest") == picture(root)
        assert changes(guest.stream_script, Tree.of(root), str(tmp_path / "dest")) == NONE

    @pytest.mark.parametrize("change", ["shorter", "longer", "same size"])
    def test_written_to_while_it_is_packed(self, guest, root, tmp_path, monkeypatch, change):
        write(root, "file", text="x" * 100)
        tree = Tree.of(root)
        real, seen = os.fstat, []

        def fstat(descriptor):
            status = real(descriptor)
            if (
                not seen
                and status.st_size == 100
                and status.st_ino == (root / "file").stat().st_ino
            ):
                seen.append(status)
                write(root, "file", text="y" * {"shorter": 5, "longer": 200}.get(change, 100))
                os.utime(root / "file", (1, 1))
            return status

        monkeypatch.setattr(os, "fstat", fstat)
        with pytest.raises(TransferError, match="project/file changed while"):
            push(guest.stream_script, tree, str(tmp_path / "dest"))


DOT = b"d\x004096\x001.0\x00\x00"
FILE = b"f\x001\x001.5000000000\x00name\x00"


class TestListing:
    def tree(self, root):
        write(root, "name")
        os.utime(root / "name", ns=(0, 1_500_000_000))
        (root / "name").chmod(0o644)
        return Tree.of(root)

    @pytest.mark.parametrize("status", [0, 1])
    def test_what_makes_sense(self, root, status):
        special = b"s\x000\x00-5.0000000000\x00socket\x00"
        guest = TalkingGuest(DOT + special + FILE, status)  # 1: it could not look everywhere
        assert changes(guest.stream_script, self.tree(root), "x") == NONE

    def test_the_guest_fails(self, root):
        for answer, status in ((b"", 1), (b"", 127), (DOT, -9)):
            with pytest.raises(TransferError, match="cannot list") as caught:
                changes(TalkingGuest(answer, status).stream_script, self.tree(root), "x")
            assert "sorry" in caught.value.details

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            FILE,
            b"hello\n" + DOT,
            DOT[:-1],
            DOT + FILE[:-3],
            DOT + FILE.replace(b"1.5", b"1e5"),
            DOT + FILE.replace(b"name", b"../name"),
            DOT + FILE.replace(b"f\x001", b"f\x00" + b"1" * 5000),
            DOT + FILE.replace(b"f\x001", b"f\x00-1"),
            DOT + "f\0٣\x001.5\x00name\0".encode(),
            DOT + b"\0" * 1000,
            DOT + b"x" * 100_000,
        ],
    )
    def test_what_makes_none(self, root, answer):
        with pytest.raises(TransferError, match="is invalid") as caught:
            changes(TalkingGuest(answer).stream_script, self.tree(root), "x")
        assert len(str(caught.value)) < 1000

    def test_what_never_ends(self, root, monkeypatch):
        monkeypatch.setattr(tree_copy, "_MAX_LISTING", 1000)
        with pytest.raises(TransferError, match="more than"):
            changes(TalkingGuest(DOT + FILE * 100).stream_script, self.tree(root), "x")

    @given(st.binary(max_size=200))
    def test_anything(self, data):
        try:
            tree_copy._parsed(DOT + data, "x")
        except TransferError:
            pass

    def test_a_large_one_is_quick(self):
        started = time.process_time()
        names = (b"f\x0012345\x001700000000.1234567890\x00some/folder/%d\x00" % it
                 for it in range(5000))  # fmt: skip
        assert len(tree_copy._parsed(DOT + b"".join(names), "x")) == 5000
        assert time.process_time() - started < 1


NAMES = st.sampled_from(["a", "b", "é", RAW, " -", "\n"])
CONTENTS = st.one_of(
    st.binary(max_size=20),
    st.tuples(st.just("link"), NAMES),
)
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=3).map("/".join),
    st.tuples(CONTENTS, st.sampled_from([0o644, 0o700, 0o777])),
    max_size=5,
)


def build(root, described):
    """Make `root` hold what is described; a path that leads through a file is left out."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, (content, mode) in described.items():
        place = root / path
        if os.path.lexists(place) or any(
            it.is_symlink() or it.is_file() for it in place.parents if it != root
        ):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            place.symlink_to(content[1])
        else:
            place.write_bytes(content)
            place.chmod(mode)


@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(first=TREES, second=TREES)
def test_the_guest_follows(guest, tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("follows")
    root, dest = folder / "root", folder / "dest"
    build(root, first)
    push(guest.stream_script, Tree.of(root), str(dest))
    assert picture(dest) == picture(root)
    assert changes(guest.stream_script, Tree.of(root), str(dest)) == NONE
    build(root, second)
    found = changes(guest.stream_script, Tree.of(root), str(dest))
    there, here = versions(dest), versions(root)
    assert set(found.written) == {path for path in there if there[path] != here.get(path)}
    assert set(found.removed) == {path for path in here if not os.path.lexists(dest / path)}


def versions(folder):
    """The files, by what tells one content of theirs from another."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns // 1000)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
