"""Files and trees in both directions, through real shells here, and archives that are hostile."""

import filecmp
import io
import os
import shlex
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pytest_vmsandbox.core.errors import CommandError, CommandResult, TransferError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.guests.reaching import archive, transfer
from pytest_vmsandbox.guests.reaching.archive import extract

SHELLS = [["/bin/sh"]]
SHELLS += [[path, "sh"] for path in [shutil.which("busybox")] if path]
ODD_NAMES = ["a b", "-rf", "--", "new\nline", "it's", '"', "$HOME", "*", "é€", "\\", ".hidden", " "]
RAW = os.fsdecode(b"raw-\xff\xfe")


@pytest.fixture(params=SHELLS, ids=lambda shell: shell[0].rpartition("/")[2])
def stream(request, tmp_path):
    """Runs scripts as a guest would, in a folder of its own."""
    home = tmp_path / "home"
    home.mkdir()

    def stream(script, *, stdin=None, stdout=None):
        written = []
        process = subprocess.Popen(
            [*request.param, "-c", script],
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process:
            if stdin is not None:
                try:
                    while data := stdin.read(1 << 16):
                        process.stdin.write(data)
                        process.stdin.flush()
                except BrokenPipeError:
                    pass
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
            while data := process.stdout.read1(1 << 16):
                (stdout or written.append)(data)
            stderr = process.stderr.read().decode(errors="replace")
        if process.returncode:
            result = CommandResult(
                argv=("sh",), returncode=process.returncode, stdout="", stderr=stderr, duration=0
            )
            raise CommandError("the script failed", result=result)
        return stderr

    return stream


@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def there(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    return folder


def picture(folder):
    """Everything that a copy has to keep."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder", path.stat().st_mode & 0o777)
        else:
            found[name] = ("file", path.stat().st_mode & 0o777, path.read_bytes())
    return found


def make_tree(folder):
    for number, name in enumerate([*ODD_NAMES, RAW]):
        (folder / name).write_bytes(bytes([number]) * number)
    for name in ("empty", "deep/er/est", "-folder"):
        (folder / name).mkdir(parents=True)
    (folder / "deep/er/est/file").write_text("deep")
    (folder / "link").symlink_to("a b")
    (folder / "dangling").symlink_to("../nowhere/at all")
    (folder / "absolute").symlink_to("/etc/passwd")
    (folder / "to-folder").symlink_to("deep")
    (folder / "program").write_text("#!/bin/sh")
    (folder / "program").chmod(0o755)


class TestPush:
    @pytest.mark.parametrize("name", [*ODD_NAMES, RAW])
    def test_a_file_of_any_name(self, stream, here, there, name):
        source = here / name
        source.write_bytes(b"con\0tent\xff")
        transfer.push(stream, source, f"{there}/{name}")
        assert (there / name).read_bytes() == b"con\0tent\xff"
        assert os.listdir(there) == [name]

    @pytest.mark.parametrize("mode", [0o000, 0o400, 0o644, 0o755, 0o777])
    def test_a_file_keeps_its_mode(self, stream, here, there, mode):
        source = here / "file"
        source.touch()
        source.chmod(mode)
        if not os.access(source, os.R_OK):
            pytest.skip("only root reads it")
        transfer.push(stream, source, str(there / "file"))
        assert (there / "file").stat().st_mode & 0o777 == mode

    def test_a_file_into_a_folder_that_is_there(self, stream, here, there):
        (here / "file").write_text("x")
        transfer.push(stream, here / "file", str(there))
        assert (there / "file").read_text() == "x"

    def test_a_file_into_a_folder_that_is_made(self, stream, here, there):
        (here / "file").write_text("x")
        transfer.push(stream, here / "file", f"{there}/a/b/")
        assert (there / "a/b/file").read_text() == "x"

    def test_missing_folders_are_made(self, stream, here, there):
        (here / "file").write_text("x")
        transfer.push(stream, here / "file", f"{there}/a/b")
        assert (there / "a/b").read_text() == "x"

    def test_a_file_is_replaced(self, stream, here, there):
        (here / "file").write_text("new")
        (there / "file").write_text("old and longer")
        transfer.push(stream, here / "file", str(there / "file"))
        assert (there / "file").read_text() == "new"
        assert os.listdir(there) == ["file"]

    def test_a_name_alone_is_one_of_the_home(self, stream, here, tmp_path):
        (here / "file").write_text("x")
        for dest in ("name", "-name", "sub/name"):
            transfer.push(stream, here / "file", dest)
            assert (tmp_path / "home" / dest).read_text() == "x"

    def test_a_link_is_followed_at_the_source(self, stream, here, there):
        (here / "file").write_text("x")
        (here / "link").symlink_to("file")
        transfer.push(stream, here / "link", str(there / "copy"))
        assert not (there / "copy").is_symlink()
        assert (there / "copy").read_text() == "x"

    def test_a_tree(self, stream, here, there):
        make_tree(here)
        transfer.push(stream, here, str(there / "copy"))
        assert picture(there / "copy") == picture(here)

    def test_a_tree_is_merged(self, stream, here, there):
        (here / "new").write_text("new")
        (here / "both").write_text("new")
        (there / "old").write_text("old")
        (there / "both").write_text("old")
        transfer.push(stream, here, str(there))
        assert {name: (there / name).read_text() for name in os.listdir(there)} == {
            "new": "new",
            "old": "old",
            "both": "new",
        }

    def test_a_tree_into_a_folder(self, stream, here, there):
        (here / "file").write_text("x")
        transfer.push(stream, here, f"{there}/a/")
        assert (there / "a/here/file").read_text() == "x"

    def test_a_tree_with_folders_that_are_read_only(self, stream, here, there):
        (here / "locked").mkdir()
        (here / "locked/file").write_text("x")
        (here / "locked").chmod(0o555)
        transfer.push(stream, here, str(there / "copy"))
        assert picture(there / "copy") == picture(here)

    def test_an_empty_tree(self, stream, here, there):
        transfer.push(stream, here, str(there / "copy"))
        assert list((there / "copy").iterdir()) == []

    def test_what_is_not_there(self, stream, here, there):
        with pytest.raises(TransferError, match="cannot be read") as caught:
            transfer.push(stream, here / "none", str(there / "copy"))
        assert "this machine" in caught.value.remedy

    def test_what_is_no_file(self, stream, here, there):
        os.mkfifo(here / "pipe")
        with pytest.raises(TransferError, match="neither a file nor a folder"):
            transfer.push(stream, here / "pipe", str(there / "copy"))

    def test_a_place_that_is_refused(self, stream, here, there):
        (here / "file").write_text("x")
        (there / "file").write_text("in the way")
        with pytest.raises(TransferError, match="could not be pushed") as caught:
            transfer.push(stream, here / "file", str(there / "file/below"))
        assert caught.value.details
        with pytest.raises(TransferError, match="could not be pushed"):
            transfer.push(stream, here, str(there / "file"))
        assert os.listdir(there) == ["file"]

    @pytest.mark.parametrize("path", ["", "a\0b"])
    def test_an_impossible_path(self, stream, here, path):
        with pytest.raises(TransferError, match="is not a path in the guest"):
            transfer.push(stream, here, path)
        with pytest.raises(TransferError, match="is not a path in the guest"):
            transfer.pull(stream, path, here)


class TestPushOfWhatIsAlive:
    def test_pipes_sockets_and_devices_are_left_out(self, stream, here, there):
        (here / "sub").mkdir()
        (here / "sub/file").write_text("x")
        os.mkfifo(here / "sub/pipe")
        with closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.bind(str(here / "socket"))
            left_out = transfer.push(stream, here, str(there))
        assert sorted(left_out) == ["./socket (socket)", "./sub/pipe (pipe)"]
        assert list(picture(there)) == ["sub", "sub/file"]

    def test_files_that_do_not_say_their_size(self, stream, there):
        source = Path("/proc/sys/kernel/random")
        assert (source / "boot_id").stat().st_size == 0
        transfer.push(stream, source, str(there))
        transfer.push(stream, source / "boot_id", str(there / "single"))
        text = (source / "boot_id").read_text()
        assert (there / "boot_id").read_text() == (there / "single").read_text() == text

    def test_what_is_removed_meanwhile(self, stream, here, there, monkeypatch):
        for name in ("a", "b", "c"):
            (here / name).write_text(name)
        (here / "folder").mkdir()
        monkeypatch.setattr(archive, "paths", self.removing(here / "b", here / "folder"))
        transfer.push(stream, here, str(there))
        assert list(picture(there)) == ["a", "c"]

    @staticmethod
    def removing(file, folder):
        paths = archive.paths

        def removed(source):
            found = list(paths(source))
            file.unlink(missing_ok=True)
            if folder.exists():
                folder.rmdir()
            return found

        return removed

    @pytest.mark.parametrize("size", [3, 400_000])
    def test_a_file_that_becomes_shorter(self, stream, here, there, monkeypatch, size):
        (here / "file").write_bytes(b"x" * size)
        (here / "other").write_text("other")
        told = tarfile.TarFile.gettarinfo

        def shrinking(self, path, name):
            member = told(self, path, name)
            if path.name == "file":
                os.truncate(path, 2)
            return member

        monkeypatch.setattr(tarfile.TarFile, "gettarinfo", shrinking)
        transfer.push(stream, here, str(there))
        assert (there / "file").read_bytes().rstrip(b"\0") == b"xx"
        assert (there / "other").read_text() == "other"

    def test_a_file_that_grows(self, stream, here, there, monkeypatch):
        (here / "log").write_text("1\n")
        (here / "other").write_text("other")
        told = tarfile.TarFile.gettarinfo

        def growing(self, path, name):
            member = told(self, path, name)
            with (here / "log").open("a") as file:
                file.write("more\n")
            return member

        monkeypatch.setattr(tarfile.TarFile, "gettarinfo", growing)
        transfer.push(stream, here, str(there))
        assert (there / "log").read_text().startswith("1\nmore\n")
        assert (there / "other").read_text() == "other"

    def test_a_link_to_a_folder(self, stream, here, there):
        make_tree(here)
        (there / "link").symlink_to(here)
        transfer.push(stream, there / "link", str(there / "copy"))
        transfer.push(stream, there / "link", f"{there}/into/")
        assert picture(there / "copy") == picture(there / "into/link") == picture(here)

    @pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1777])
    def test_special_bits(self, stream, here, there, mode):
        (here / "file").touch()
        (here / "file").chmod(mode)
        transfer.push(stream, here / "file", str(there / "file"))
        transfer.push(stream, here, str(there / "tree"))
        for path in (there / "file", there / "tree/file"):
            assert path.stat().st_mode & 0o7777 == mode

    def test_times(self, stream, here, there):
        (here / "file").touch()
        os.utime(here / "file", (1e9, 1e9))
        transfer.push(stream, here / "file", str(there / "file"))
        transfer.push(stream, here, str(there / "tree"))
        for path in (there / "file", there / "tree/file"):
            assert path.stat().st_mtime == 1e9


HOLES = {
    "in front": (MIB, [(MIB - 4096, b"end")]),
    "behind": (MIB + 5, [(0, b"begin")]),
    "in the middle": (MIB, [(0, b"begin"), (MIB - 3, b"end")]),
    "everywhere": (MIB, []),
    "odd": (5 * MIB + 1, [(2 * MIB - 1, b"abc")]),
}


def make_holes(path, size, parts):
    with path.open("wb") as file:
        for start, data in parts:
            file.seek(start)
            file.write(data)
        file.truncate(size)


def on_disk(path):
    return path.stat().st_blocks * 512


@pytest.mark.parametrize(("size", "parts"), HOLES.values(), ids=HOLES.keys())
class TestHoles:
    def test_of_a_file_survive(self, stream, here, there, size, parts):
        make_holes(here / "file", size, parts)
        transfer.push(stream, here / "file", str(there / "file"))
        transfer.pull(stream, str(there / "file"), here / "back")
        for path in (there / "file", here / "back"):
            assert path.stat().st_size == size
            assert filecmp.cmp(path, here / "file", shallow=False)
            assert on_disk(path) < size - MIB // 2

    def test_in_a_tree_survive(self, stream, here, there, size, parts):
        (here / "a/b").mkdir(parents=True)
        make_holes(here / "a/b/file", size, parts)
        os.link(here / "a/b/file", here / "a/link")
        (here / "a/b").chmod(0o555)
        transfer.push(stream, here, str(there / "tree"))
        transfer.pull(stream, str(there / "tree"), here / "back")
        for tree in (there / "tree", here / "back"):
            assert (tree / "a/b").stat().st_mode & 0o777 == 0o555
            assert (tree / "a/link").samefile(tree / "a/b/file")
            assert filecmp.cmp(tree / "a/link", here / "a/link", shallow=False)
            assert on_disk(tree / "a/link") < size - MIB // 2


def test_of_many_holes_the_largest_survive(stream, here, there, monkeypatch):
    monkeypatch.setattr(transfer, "_MAX_HOLES", 3)
    make_holes(here / "file", 16 * MIB, [(MIB << power, b"x") for power in range(4)])
    transfer.push(stream, here / "file", str(there / "file"))
    assert filecmp.cmp(there / "file", here / "file", shallow=False)
    assert on_disk(there / "file") < 3 * MIB


def test_a_file_with_holes_into_what_is_no_file(stream, here, there):
    """Where no hole can be made, zeros arrive: something else may be there."""
    make_holes(here / "file", MIB, [(0, b"begin"), (MIB - 3, b"end")])
    os.mkfifo(there / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((there / "pipe").read_bytes()))
    reader.start()
    transfer.push(stream, here / "file", str(there / "pipe"))
    reader.join()
    assert got == [(here / "file").read_bytes()]


class TestInPlace:
    def test_a_file_of_the_kernel(self, stream, here):
        """No file can be made beside it."""
        (here / "file").write_text("1000")
        with subprocess.Popen(["sleep", "60"]) as process:
            try:
                file = Path(f"/proc/{process.pid}/oom_score_adj")
                transfer.push_text(stream, "900", str(file))
                assert file.read_text(encoding="utf-8") == "900\n"
                transfer.push(stream, here / "file", str(file))
                assert file.read_text(encoding="utf-8") == "1000\n"
            finally:
                process.kill()

    def test_a_device(self, stream, here, there):
        (here / "file").write_text("x")
        before = os.stat("/dev/null")
        transfer.push_text(stream, "x", "/dev/null")
        transfer.push(stream, here / "file", "/dev/null")
        (there / "link").symlink_to("/dev/null")
        transfer.push_text(stream, "x", str(there / "link"))
        assert os.path.samestat(before, os.stat("/dev/null"))
        assert os.readlink(there / "link") == "/dev/null"

    def test_a_file_that_cannot_be_replaced(self, stream, there, monkeypatch, tmp_path):
        """As one that is a mount point of its own, which `mv` refuses."""
        programs = tmp_path / "programs"
        programs.mkdir()
        (programs / "mv").write_text("#!/bin/sh\nexit 1")
        (programs / "mv").chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        (there / "file").write_text("old and longer")
        number = (there / "file").stat().st_ino
        transfer.push_text(stream, "new", str(there / "file"))
        assert (there / "file").read_text() == "new"
        assert (there / "file").stat().st_ino == number
        assert os.listdir(there) == ["file"]


class TestThroughALink:
    @pytest.mark.parametrize("name", ["link", "chain", "absolute"])
    def test_the_file_is_written(self, stream, here, there, name):
        (there / "real\n").write_text("old")
        (there / "link").symlink_to("real\n")
        (there / "chain").symlink_to("link")
        (there / "absolute").symlink_to(there / "real\n")
        (here / "file").write_text("pushed")
        transfer.push_text(stream, "written", str(there / name))
        assert (there / "real\n").read_text() == "written"
        transfer.push(stream, here / "file", str(there / name))
        assert (there / "real\n").read_text() == "pushed"
        assert (there / name).is_symlink()

    def test_a_file_is_made_where_it_points_to(self, stream, there):
        (there / "link").symlink_to("new")
        transfer.push_text(stream, "x", str(there / "link"))
        assert (there / "new").read_text() == "x"
        assert (there / "link").is_symlink()

    @pytest.mark.parametrize("target", ["nowhere/file", "link"])
    def test_a_link_to_nowhere_is_refused(self, stream, there, target):
        (there / "link").symlink_to(target)
        with pytest.raises(CommandError, match="is a link"):
            transfer.push_text(stream, "x", str(there / "link"))
        assert os.listdir(there) == ["link"]


class TestPushText:
    def test_an_error_names_the_file(self, stream):
        with pytest.raises(CommandError, match="/proc/nothing") as caught:
            transfer.push_text(stream, "x", "/proc/nothing")
        assert "vmsandbox" not in str(caught.value.result.stderr)

    def write(self, stream, dest):
        transfer.push_text(stream, "x", str(dest))

    def test_a_file_that_is_there_keeps_its_mode(self, stream, there):
        (there / "file").write_text("old")
        (there / "file").chmod(0o4751)
        self.write(stream, there / "file")
        assert (there / "file").read_text() == "x"
        assert (there / "file").stat().st_mode & 0o7777 == 0o4751

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_a_file_that_is_there_keeps_its_owner(self, stream, there):
        (there / "file").write_text("old")
        os.chown(there / "file", 65_534, 65_533)
        self.write(stream, there / "file")
        status = (there / "file").stat()
        assert (status.st_uid, status.st_gid) == (65_534, 65_533)

    def test_without_a_name(self, stream, there):
        self.write(stream, there / "new/file")
        assert (there / "new/file").read_bytes() == b"x"
        assert (there / "new/file").stat().st_mode & 0o777 == 0o644

    @pytest.mark.parametrize("end", ["", "/", "/none/"])
    def test_without_a_name_a_folder_is_refused(self, stream, there, end):
        with pytest.raises(CommandError):
            self.write(stream, f"{there}{end}")
        assert list(there.iterdir()) == []

    def test_a_file_where_a_folder_is(self, stream, here, there):
        (here / "name").write_text("x")
        (there / "name").mkdir()
        with pytest.raises(TransferError, match="is a folder"):
            transfer.push(stream, here / "name", str(there))
        assert list((there / "name").iterdir()) == []


class TestPullOfWhatIsAlive:
    def test_a_file_that_grows(self, stream, here, there):
        script = f"while echo a line; do :; done > {shlex.quote(str(there / 'log'))}"
        with subprocess.Popen(["/bin/sh", "-c", f"ulimit -f 100000; {script}"]) as writer:
            try:
                while not (there / "log").exists():
                    time.sleep(0.01)
                for number in range(5):
                    transfer.pull(stream, str(there / "log"), here / f"{number}")
                    text = (here / f"{number}").read_text()
                    assert set(text.splitlines()[:-1]) <= {"a line"}
            finally:
                writer.kill()

    def test_files_that_do_not_say_their_size(self, stream, here):
        source = Path("/proc/sys/kernel/random")
        transfer.pull(stream, f"{source}/boot_id", here / "file")
        transfer.pull(stream, str(source), here / "tree")
        text = (source / "boot_id").read_text()
        assert (here / "file").read_text() == (here / "tree/boot_id").read_text() == text

    def test_pipes_sockets_and_devices_are_left_out(self, stream, here, there):
        (there / "sub").mkdir()
        (there / "sub/file").write_text("x")
        os.mkfifo(there / "sub/pipe")
        os.link(there / "sub/pipe", there / "sub/second")
        with closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.bind(str(there / "socket"))
            left_out = transfer.pull(stream, str(there), here / "copy")
        assert list(picture(here / "copy")) == ["sub", "sub/file"]
        assert len(left_out) == 3
        assert "pipe" in str(left_out)
        assert "socket" in str(left_out)

    def test_what_is_no_file(self, stream, here, there):
        os.mkfifo(there / "pipe")
        for path in (there / "pipe", Path("/dev/null")):
            with pytest.raises(TransferError, match="neither a file nor a folder"):
                transfer.pull(stream, str(path), here / "copy")
        assert list(here.iterdir()) == []

    CHANGES = (
        "tar: ./t/67: File removed before we read it\ntar: ./t: file changed as we read it\n",
        "tar: ./t/1: No such file or directory\ntar: error exit delayed from previous errors\n",
        "tar: ./t/1: File shrank by 10 bytes; padding with zeros\n",
        "tar: ./t/1: Cannot stat: No such file or directory\n",
        "tar: Exiting with failure status due to previous errors\n",
    )
    ERRORS = ("tar: ./t/1: Cannot open: Permission denied\n", "", "sh: tar: not found\n")

    @pytest.mark.parametrize("said", CHANGES)
    def test_a_tree_that_changes_comes_as_it_was_read(self, here, there, said):
        transfer.pull(self.complaining(there, said), "/t", here / "copy")
        assert (here / "copy/file").read_text() == "x"

    @pytest.mark.parametrize("said", [*ERRORS, CHANGES[0] + ERRORS[0]])
    def test_another_error_is_one(self, here, there, said):
        with pytest.raises(TransferError, match="could not be pulled from the guest"):
            transfer.pull(self.complaining(there, said), "/t", here / "copy")
        assert list(here.iterdir()) == []

    def test_a_tree_that_cannot_be_read_as_it_changes_is_copied_before(self, here, there):
        """As with busybox's tar, which gives up when a file becomes shorter."""
        scripts = []

        def cut_once(script, *, stdin=None, stdout=None):
            scripts.append(script)
            self.complaining(there, "tar: short read\n" if len(scripts) == 1 else self.CHANGES[0])(
                script, stdin=stdin, stdout=stdout
            )

        transfer.pull(cut_once, "/t", here / "copy")
        assert (here / "copy/file").read_text() == "x"
        assert ["in *)" in script for script in scripts] == [False, True]

    @staticmethod
    def complaining(there, said):
        (there / "t").mkdir(exist_ok=True)
        (there / "t/file").write_text("x")
        packed = subprocess.run(
            ["tar", "-C", there, "-czf", "-", "./t"], check=True, capture_output=True
        ).stdout

        def stream(script, *, stdin=None, stdout=None):
            stdout(b"tree\n" + packed)
            result = CommandResult(argv=("sh",), returncode=1, stdout="", stderr=said, duration=0)
            raise CommandError("the script failed", result=result)

        return stream


class TestSetuidOfTheGuest:
    """A program of the guest must not run as us when another user of this machine starts it."""

    @pytest.fixture
    def tree(self, there):
        (there / "program").write_text("#!/bin/sh")
        (there / "program").chmod(0o4755)
        return there

    def pulled(self, stream, tree, dest):
        dest.mkdir(exist_ok=True)
        left_out = transfer.pull(stream, f"{tree}/program", dest / "file")
        left_out += transfer.pull(stream, str(tree), dest / "tree")
        modes = [(dest / it).stat().st_mode & 0o7777 for it in ("file", "tree/program")]
        return modes, left_out

    def test_stays_where_nobody_else_comes(self, stream, tree, here):
        here.chmod(0o700)
        assert self.pulled(stream, tree, here / "deep") == ([0o4755] * 2, [])

    def test_is_left_out_where_others_come(self, stream, tree):
        with tempfile.TemporaryDirectory(dir="/tmp") as place:
            Path(place).chmod(0o711)
            modes, left_out = self.pulled(stream, tree, Path(place))
        assert modes == [0o755] * 2
        assert len(left_out) == 2
        assert all("setuid" in what for what in left_out)


class TestWords:
    def test_few_are_named(self):
        assert transfer.in_words(["a", "b"]) == "a, b"
        assert transfer.in_words(list("abcdefg")) == "a, b, c, d, e, and 2 more"

    def test_names_of_the_guest_are_made_fit(self):
        assert transfer.in_words(["\x1b[31mred (pipe)"]) == "red (pipe)"


class TestPull:
    @pytest.mark.parametrize("name", [*ODD_NAMES, RAW])
    def test_a_file_of_any_name(self, stream, here, there, name):
        (there / name).write_bytes(b"con\0tent\xff")
        transfer.pull(stream, f"{there}/{name}", here / "copy")
        assert (here / "copy").read_bytes() == b"con\0tent\xff"
        assert os.listdir(here) == ["copy"]

    @pytest.mark.parametrize("mode", [0o400, 0o644, 0o755, 0o777])
    def test_a_file_keeps_its_mode(self, stream, here, there, mode):
        (there / "file").touch()
        (there / "file").chmod(mode)
        transfer.pull(stream, f"{there}/file", here / "file")
        assert (here / "file").stat().st_mode & 0o777 == mode

    def test_a_file_into_a_folder_that_is_there(self, stream, here, there):
        (there / "file").write_text("x")
        transfer.pull(stream, f"{there}/file", here)
        assert (here / "file").read_text() == "x"

    def test_a_file_into_a_folder_that_is_made(self, stream, here, there):
        (there / "file").write_text("x")
        transfer.pull(stream, f"{there}/file", f"{here}/a/b/")
        assert (here / "a/b/file").read_text() == "x"

    def test_a_file_is_replaced(self, stream, here, there):
        (there / "file").write_text("new")
        (here / "file").write_text("old")
        transfer.pull(stream, f"{there}/file", here / "file")
        assert (here / "file").read_text() == "new"

    def test_a_tree(self, stream, here, there):
        make_tree(there)
        transfer.pull(stream, str(there), here / "copy")
        assert picture(here / "copy") == picture(there)

    def test_a_tree_is_merged(self, stream, here, there):
        make_tree(there)
        (here / "deep/er").mkdir(parents=True)
        (here / "deep/er/mine").write_text("mine")
        (here / "link").write_text("was a file")
        transfer.pull(stream, str(there), here)
        assert (here / "deep/er/mine").read_text() == "mine"
        assert (here / "deep/er/est/file").read_text() == "deep"
        assert (here / "link").is_symlink()

    def test_a_tree_is_not_merged_through_a_link(self, stream, here, there, tmp_path):
        outside = tmp_path / "outside"
        outside.mkdir()
        (here / "sub").symlink_to(outside)
        (there / "sub").mkdir()
        (there / "sub/file").write_text("x")
        transfer.pull(stream, str(there), here)
        assert (here / "sub/file").read_text() == "x"
        assert list(outside.iterdir()) == []

    def test_a_tree_through_a_link_that_the_caller_names(self, stream, here, there, tmp_path):
        (there / "file").write_text("x")
        (tmp_path / "link").symlink_to(here)
        transfer.pull(stream, str(there), tmp_path / "link")
        assert (here / "file").read_text() == "x"

    def test_a_name_alone_is_one_of_the_home(self, stream, here, tmp_path):
        home = tmp_path / "home"
        (home / "-folder").mkdir()
        (home / "-folder/-name").write_text("x")
        transfer.pull(stream, "-folder/-name", here / "file")
        transfer.pull(stream, "-folder", here / "tree")
        assert (here / "file").read_text() == (here / "tree/-name").read_text() == "x"

    def test_a_tree_into_a_folder(self, stream, here, there):
        (there / "file").write_text("x")
        transfer.pull(stream, str(there), f"{here}/a/")
        assert (here / "a/there/file").read_text() == "x"

    def test_a_tree_with_folders_that_are_read_only(self, stream, here, there):
        (there / "locked").mkdir()
        (there / "locked/file").write_text("x")
        (there / "locked").chmod(0o555)
        transfer.pull(stream, str(there), here / "copy")
        assert picture(here / "copy") == picture(there)

    def test_a_link_is_not_followed(self, stream, here, there):
        (there / "link").symlink_to("/etc/passwd")
        transfer.pull(stream, f"{there}/link", here / "copy")
        assert os.readlink(here / "copy") == "/etc/passwd"

    def test_the_folder_it_is_in(self, stream, here, tmp_path):
        (tmp_path / "home" / "file").write_text("x")
        transfer.pull(stream, ".", here / "copy")
        assert (here / "copy/file").read_text() == "x"

    def test_what_is_not_there(self, stream, here, there):
        with pytest.raises(TransferError, match="could not be pulled from the guest") as caught:
            transfer.pull(stream, f"{there}/none", here / "copy")
        assert caught.value.details
        assert list(here.iterdir()) == []

    def test_a_place_that_is_refused(self, stream, here, there):
        (there / "file").write_text("x")
        (here / "file").write_text("in the way")
        with pytest.raises(TransferError, match="could not be pulled"):
            transfer.pull(stream, f"{there}/file", here / "file/below")
        assert os.listdir(here) == ["file"]


def test_a_folder_that_is_there_keeps_its_mode(stream, here, there):
    for folder in (here, there):
        (folder / "sub").mkdir()
        folder.joinpath("sub").chmod(0o700)
    (there / "new").mkdir(mode=0o750)
    here.chmod(0o750)
    there.joinpath("sub").chmod(0o777)
    there.chmod(0o777)
    transfer.pull(stream, str(there), here)
    modes = [path.stat().st_mode & 0o777 for path in (here, here / "sub", here / "new")]
    assert modes == [0o750, 0o700, 0o750]


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    files=st.dictionaries(
        st.binary(min_size=1, max_size=20).filter(
            lambda name: not set(name) & {0, 47} and name not in {b".", b".."}
        ),
        st.binary(max_size=100),
        min_size=1,
        max_size=3,
    )
)
def test_there_and_back_again(stream, tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("round")
    source = folder / "source"
    source.mkdir()
    for name, content in files.items():
        (source / os.fsdecode(name)).write_bytes(content)
    transfer.push(stream, source, str(folder / "there"))
    transfer.pull(stream, str(folder / "there"), folder / "back")
    assert picture(folder / "back") == picture(source)


@pytest.mark.parametrize("tree", [False, True], ids=["file", "tree"])
def test_a_large_file_is_never_in_memory(stream, here, there, tree):
    size = 24 * MIB
    with (here / "large").open("wb") as file:
        for _ in range(0, size, MIB):
            file.write(bytes(MIB))  # no holes, which would not be sent
    tracemalloc.start()
    try:
        if tree:
            transfer.push(stream, here, str(there / "tree"))
            transfer.pull(stream, str(there / "tree"), here / "back")
        else:
            transfer.push(stream, here / "large", str(there / "large"))
            transfer.pull(stream, f"{there}/large", here / "back")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    back = here / "back/large" if tree else here / "back"
    assert back.stat().st_size == size
    assert peak < 6 * MIB


# -- archives that nobody sane has made -------------------------------------------------------------


def member(name, kind=tarfile.REGTYPE, link="", content=b"", mode=0o644):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(content), mode
    return info, content


def unpack(members, folder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    buffer.seek(0)
    extract(buffer, folder)


@pytest.fixture
def prison(tmp_path):
    folder = tmp_path / "outside" / "inside"
    folder.mkdir(parents=True)
    (folder.parent / "secret").write_text("secret")
    return folder


def dir_(name, mode=0o755):
    return member(name, tarfile.DIRTYPE, mode=mode)


def timed(mtime):
    info, content = member("a", content=b"x")
    info.mtime = mtime
    return info, content


def extended(headers):
    info, content = member("a", content=b"x")
    info.pax_headers = headers
    return info, content


HOSTILE = {
    "a time that no clock has": [timed(1e30)],
    "a time that is none": [extended({"mtime": "nan"})],
    "a name with a zero in it": [extended({"path": "a\0b"})],
    "a long name that is too long": [
        member("a", tarfile.GNUTYPE_LONGNAME, content=b"x" * (MIB + 1)),
        member("b"),
    ],
    "headers that are too long": [extended({"comment": "x" * MIB})],
    "headers without an end": [
        *[member("a", tarfile.GNUTYPE_LONGNAME, content=b"x")] * 2000,
        member("b"),
    ],
    "an old sparse file": [member("a", tarfile.GNUTYPE_SPARSE)],
    "a sparse file": [extended({"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"})],
    "absolute": [member("/tmp/vmsandbox-escaped", content=b"x")],
    "up": [member("../escaped", content=b"x")],
    "up in the middle": [member("a/../../escaped", content=b"x")],
    "up as a folder": [dir_("../escaped")],
    "up as a link": [member("../escaped", tarfile.SYMTYPE, "x")],
    "hard link up": [member("a", tarfile.LNKTYPE, "../secret")],
    "hard link absolute": [member("a", tarfile.LNKTYPE, "/etc/passwd")],
    "hard link to nothing": [member("a", tarfile.LNKTYPE, "none")],
    "hard link out of a pipe": [
        member("a", tarfile.FIFOTYPE),
        member("b", tarfile.LNKTYPE, "../a"),
    ],
    "a pipe and a file under it": [
        member("a", tarfile.LNKTYPE, "b"),
        member("b", tarfile.FIFOTYPE),
    ],
    "a kind that there is not": [member("a", b"Z")],
    "a name twice": [member("a", content=b"1"), member("a", content=b"2")],
    "a link and a file": [member("a", tarfile.SYMTYPE, "../secret"), member("a", content=b"x")],
    "a link and a folder": [
        member("a", tarfile.SYMTYPE, ".."),
        dir_("a"),
        member("a/escaped", content=b"x"),
    ],
    "a file under a link": [
        member("a", tarfile.SYMTYPE, ".."),
        member("a/escaped", content=b"x"),
    ],
    "a link under a link": [
        member("a", tarfile.SYMTYPE, ".."),
        member("a/escaped", tarfile.SYMTYPE, "x"),
    ],
    "a link twice": [member("a", tarfile.SYMTYPE, "x"), member("a", tarfile.SYMTYPE, "y")],
    "a file and a folder": [member("a", content=b"x"), dir_("a")],
    "a file under a file": [member("a", content=b"x"), member("a/b", content=b"x")],
    "the root as a file": [member(".", content=b"x")],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_is_refused_and_stays_inside(prison, members):
    with pytest.raises((tarfile.TarError, OSError)):
        unpack(members, prison)
    assert sorted(os.listdir(prison.parent)) == ["inside", "secret"]
    assert (prison.parent / "secret").read_text() == "secret"
    assert not Path("/tmp/vmsandbox-escaped").exists()


def test_a_hostile_archive_is_a_transfer_error(prison, here):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for info, content in HOSTILE["up"]:
            archive.addfile(info, io.BytesIO(content))

    def sends(script, *, stdin=None, stdout=None):
        stdout(b"tree\n" + buffer.getvalue())

    with pytest.raises(TransferError, match="damaged or unsafe archive"):
        transfer.pull(sends, "/x", here / "copy")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("header", [b"", b"tree\n", b"file 644\n", b"file 644 1" + b"0" * 200])
@pytest.mark.parametrize("data", [b"", b"garbage", b"\x1f\x8b\x08\0", b"\0" * 10240])
def test_a_damaged_archive_is_a_transfer_error(here, header, data):
    def sends(script, *, stdin=None, stdout=None):
        stdout(header + data)

    with pytest.raises(TransferError, match="damaged or unsafe archive"):
        transfer.pull(sends, "/x", here / "copy")
    assert list(here.iterdir()) == []


def test_an_archive_that_breaks_off_is_a_transfer_error(here, there):
    (there / "file").write_bytes(os.urandom(100_000))
    whole = subprocess.run(
        ["tar", "-C", there, "-czf", "-", "./file"], check=True, capture_output=True
    ).stdout

    def sends(script, *, stdin=None, stdout=None):
        stdout(b"tree\n" + whole[: len(whole) // 2])

    with pytest.raises(TransferError):
        transfer.pull(sends, "/file", here / "copy")
    assert list(here.iterdir()) == []


def test_what_is_meant_well_is_unpacked(prison):
    unpack(
        [
            dir_(".", 0o755),
            member("./link", tarfile.SYMTYPE, "../secret"),
            dir_("./a", 0o555),
            member("./a/file", content=b"x", mode=0o4755),
            member("./a/hard", tarfile.LNKTYPE, "./a/file"),
        ],
        prison,
    )
    assert os.readlink(prison / "link") == "../secret"
    assert (prison / "a/file").stat().st_mode & 0o7777 == 0o755
    assert (prison / "a/hard").samefile(prison / "a/file")
    assert (prison / "a").stat().st_mode & 0o777 == 0o555
