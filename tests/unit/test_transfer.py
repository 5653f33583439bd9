"""Files and trees in both directions, through real shells here, and archives that are hostile."""

import io
import os
import shutil
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pytest_vmsandbox.core.errors import CommandError, TransferError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.core.transport import CommandResult
from pytest_vmsandbox.guests import transfer

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


class TestPushStream:
    def write(self, stream, dest):
        transfer.push_stream(stream, io.BytesIO(b"x"), str(dest), name=None, mode=0o640)

    def test_without_a_name(self, stream, there):
        self.write(stream, there / "new/file")
        assert (there / "new/file").read_bytes() == b"x"
        assert (there / "new/file").stat().st_mode & 0o777 == 0o640

    @pytest.mark.parametrize("end", ["", "/", "/none/"])
    def test_without_a_name_a_folder_is_refused(self, stream, there, end):
        with pytest.raises(CommandError):
            self.write(stream, f"{there}{end}")
        assert list(there.iterdir()) == []


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
        file.truncate(size)
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
    transfer.extract(buffer, folder)


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
    "device": [member("a", tarfile.CHRTYPE)],
    "block device": [member("a", tarfile.BLKTYPE)],
    "pipe": [member("a", tarfile.FIFOTYPE)],
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
        stdout(buffer.getvalue())

    with pytest.raises(TransferError, match="damaged or unsafe archive"):
        transfer.pull(sends, "/x", here / "copy")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x1f\x8b\x08\0", b"\0" * 10240])
def test_a_damaged_archive_is_a_transfer_error(here, data):
    with pytest.raises(TransferError):
        transfer.pull(lambda _script, stdin=None, stdout=None: stdout(data), "/x", here / "copy")
    assert list(here.iterdir()) == []


def test_an_archive_that_breaks_off_is_a_transfer_error(here, there):
    (there / "file").write_bytes(os.urandom(100_000))
    whole = subprocess.run(
        ["tar", "-C", there, "-czf", "-", "./file"], check=True, capture_output=True
    ).stdout
    with pytest.raises(TransferError):
        transfer.pull(
            lambda _script, stdin=None, stdout=None: stdout(whole[: len(whole) // 2]),
            "/file",
            here / "copy",
        )
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
