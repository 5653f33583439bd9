"""Files that are the memory of guests: their holes, their copies, and what of them is compared."""

import errno
import mmap
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pytest_vmsandbox.cache import copying, integrity
from pytest_vmsandbox.cache.integrity import file_digest
from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.core.spec import KIB, MIB
from pytest_vmsandbox.machine import host, memory
from support.mounts import small_file_system

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are no memfds but on Linux")

OLD, NEW = (7, 2, 22), (8, 2, 0)
PAGE = 4 * KIB

# Where there are bytes in a file: numbers of blocks, of a size that fits no piece of a MiB.
PARTS = st.lists(
    st.tuples(st.integers(0, 3 * MIB), st.binary(min_size=1, max_size=3 * PAGE)), max_size=6
)
SIZES = st.integers(0, 1000).map(lambda odd: 4 * MIB + odd)


def sparse(path, size, parts):
    """A file with these parts and nothing else; its content."""
    content = bytearray(size)
    with memory.create(path, size) as file:
        for start, data in parts:
            os.pwrite(file.fileno(), data, start)
            content[start : start + len(data)] = data
    return bytes(content)


def opened(path):
    return path.open("r+b", buffering=0)


class TestCreate:
    def test_takes_no_room(self, tmp_path):
        with memory.create(tmp_path / "file", 512 * MIB) as file:
            status = os.fstat(file.fileno())
        assert (status.st_size, status.st_blocks) == (512 * MIB, 0)

    def test_does_not_take_a_file_that_is_there(self, tmp_path):
        (tmp_path / "file").write_bytes(b"mine")
        with pytest.raises(FileExistsError), memory.create(tmp_path / "file", MIB):
            pass
        assert (tmp_path / "file").read_bytes() == b"mine"


class TestReserved:
    """Room for all of a guest's memory, since a write that finds none would end QEMU."""

    @pytest.fixture
    def small(self, tmp_path):
        with small_file_system(tmp_path / "small", "4M") as folder:
            yield folder

    def test_what_was_not_used_is_given_back(self, tmp_path):
        with memory.reserved(tmp_path / "file", 8 * MIB) as file:
            assert os.fstat(file.fileno()).st_blocks * 512 >= 8 * MIB
            with mmap.mmap(file.fileno(), 8 * MIB) as used:
                used[MIB : MIB + 5] = b"early"
                used[5 * MIB : 5 * MIB + 4] = b"late"
        status = (tmp_path / "file").stat()
        assert status.st_size == 8 * MIB
        assert status.st_blocks * 512 < MIB
        content = (tmp_path / "file").read_bytes()
        assert content.strip(b"\0").startswith(b"early")
        assert content[5 * MIB :].startswith(b"late")

    def test_there_is_none(self, small):
        with (
            pytest.raises(
                OSError, match=r"no room for 8MiB of memory \(4MiB are free\)\. Make room"
            ),
            memory.reserved(small / "file", 8 * MIB),
        ):
            pass

    def test_it_is_kept_from_others(self, small):
        with memory.reserved(small / "file", 3 * MIB) as file:
            with pytest.raises(OSError, match="No space left"):
                (small / "other").write_bytes(b"x" * 2 * MIB)
            with mmap.mmap(file.fileno(), 3 * MIB) as used:
                used[:] = b"x" * 3 * MIB  # else this process were ended by SIGBUS

    def test_somebody_is_faster(self, small, monkeypatch):
        """It looked as if there were room."""
        full = mock.Mock(f_bavail=8 * MIB, f_frsize=1, f_blocks=8 * MIB)
        monkeypatch.setattr(os, "fstatvfs", lambda _: full)
        with (
            pytest.raises(OSError, match="no room for 8MiB of memory"),
            memory.reserved(small / "file", 8 * MIB),
        ):
            pass

    def test_a_file_system_that_reserves_nothing(self, tmp_path, monkeypatch):
        def unknown(*_):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(memory, "_fallocate", unknown)
        with memory.reserved(tmp_path / "file", MIB) as file:
            os.pwrite(file.fileno(), b"x", 0)
        assert (tmp_path / "file").stat().st_size == MIB

    def test_a_host_without_so_much_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr(host, "available_memory", lambda: 64 * MIB)
        with (
            pytest.raises(LaunchError, match="does not fit"),
            memory.reserved(tmp_path / "file", 128 * MIB),
        ):
            pass
        assert not (tmp_path / "file").exists()


class TestExtents:
    @pytest.mark.parametrize(
        ("size", "parts", "expected"),
        [
            (0, [], []),
            (MIB, [], []),
            (MIB + 1, [], []),
            (MIB, [(0, b"x")], [(0, PAGE)]),
            (MIB, [(MIB - 1, b"x")], [(MIB - PAGE, MIB)]),
            (MIB + 7, [(MIB + 6, b"x")], [(MIB, MIB + 7)]),
            (10, [(0, b"x" * 10)], [(0, 10)]),
            (
                MIB,
                [(PAGE, b"x" * PAGE), (3 * PAGE, b"y")],
                [(PAGE, 2 * PAGE), (3 * PAGE, 4 * PAGE)],
            ),
        ],
    )
    def test_are_where_data_is(self, tmp_path, size, parts, expected):
        sparse(tmp_path / "file", size, parts)
        with opened(tmp_path / "file") as file:
            if os.fstatvfs(file.fileno()).f_bsize != PAGE:
                pytest.skip("this file system has blocks of another size")
            assert list(integrity.extents(file)) == expected

    def test_an_error_of_the_disk_is_no_hole(self, tmp_path, monkeypatch):
        def lseek(fd, start, how):
            raise OSError(errno.EIO, "the disk is broken")

        sparse(tmp_path / "file", MIB, [(0, b"x")])
        monkeypatch.setattr(os, "lseek", lseek)
        with opened(tmp_path / "file") as file, pytest.raises(OSError, match="broken"):
            list(integrity.extents(file))


class TestCopy:
    @given(size=SIZES, parts=PARTS)
    @settings(
        deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30
    )
    def test_is_the_same(self, tmp_path, size, parts):
        for name in ("source", "dest"):
            (tmp_path / name).unlink(missing_ok=True)
        content = sparse(tmp_path / "source", size, parts)
        with opened(tmp_path / "source") as source, memory.create(tmp_path / "dest", 0) as dest:
            copying.copy(source, dest)
        assert (tmp_path / "dest").read_bytes() == content

    def test_keeps_holes(self, tmp_path):
        sparse(
            tmp_path / "source", 64 * MIB, [(0, b"x"), (40 * MIB + 5, b"y"), (64 * MIB - 1, b"z")]
        )
        with opened(tmp_path / "source") as source, memory.create(tmp_path / "dest", 0) as dest:
            copying.copy(source, dest)
            assert os.fstat(dest.fileno()).st_blocks * 512 <= 16 * PAGE

    def test_does_not_depend_on_where_the_source_was_read(self, tmp_path):
        content = sparse(tmp_path / "source", MIB, [(0, b"first"), (MIB // 2, b"second")])
        with opened(tmp_path / "source") as source, memory.create(tmp_path / "dest", 0) as dest:
            os.lseek(source.fileno(), 0, os.SEEK_END)
            copying.copy(source, dest)
        assert (tmp_path / "dest").read_bytes() == content


class TestForClones:
    @pytest.fixture
    def file(self, tmp_path):
        sparse(tmp_path / "memory", 3 * MIB, [(MIB, b"content")])
        return tmp_path / "memory"

    def test_a_new_qemu_gets_the_file_itself(self, file):
        with memory.for_clones(file, NEW) as shared:
            assert os.fstat(shared.fileno()).st_ino == file.stat().st_ino
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(shared.fileno(), b"x", 0)

    def test_an_old_one_gets_a_copy_that_nobody_can_change(self, file):
        """Neither through our descriptor nor through one that is opened anew for writing."""
        with memory.for_clones(file, OLD) as shared:
            number = shared.fileno()
            assert Path(f"/proc/self/fd/{number}").read_bytes() == file.read_bytes()
            for change in (
                lambda fd: os.pwrite(fd, b"x", 0),
                lambda fd: os.ftruncate(fd, MIB),
                lambda fd: os.ftruncate(fd, 4 * MIB),
                lambda fd: mmap.mmap(fd, PAGE, mmap.MAP_SHARED),
            ):
                with (
                    Path(f"/proc/self/fd/{number}").open("r+b", buffering=0) as again,
                    pytest.raises(PermissionError),
                ):
                    change(again.fileno())
            with mmap.mmap(number, PAGE, mmap.MAP_PRIVATE) as own:  # what a clone does
                own[0] = 255
            assert Path(f"/proc/self/fd/{number}").read_bytes() == file.read_bytes()

    def test_the_copy_has_the_holes(self, file):
        with memory.for_clones(file, OLD) as shared:
            assert os.fstat(shared.fileno()).st_blocks * 512 <= PAGE

    @pytest.mark.parametrize("version", [OLD, NEW])
    def test_one_that_is_gone(self, tmp_path, version):
        with pytest.raises(FileNotFoundError), memory.for_clones(tmp_path / "none", version):
            pass

    def test_nothing_stays_open_when_it_cannot_be_copied(self, file, monkeypatch):
        def copy(source, dest):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(memory, "copy", copy)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="full"), memory.for_clones(file, OLD):
            pass
        assert os.listdir("/proc/self/fd") == before


class TestChunks:
    @given(size=SIZES, parts=PARTS, holes=PARTS)
    @settings(
        deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30
    )
    def test_are_all_that_is_not_zero_wherever_holes_are(self, tmp_path, size, parts, holes):
        """A file with other holes, or with none, has the same pieces."""
        for name in ("a", "b"):
            (tmp_path / name).unlink(missing_ok=True)
        content = sparse(tmp_path / "a", size, parts)
        (tmp_path / "b").write_bytes(content)
        with opened(tmp_path / "a") as file:
            for start, data in holes:  # zeros that were written are no holes
                if not any(content[start : start + len(data)]):
                    os.pwrite(file.fileno(), bytes(len(data)), start)
            pieces = list(integrity.chunks(file))
        with opened(tmp_path / "b") as file:
            assert list(integrity.chunks(file)) == pieces
        again = bytearray(size)
        for start, data in pieces:
            assert start % MIB == 0
            assert 0 < len(data) <= MIB
            again[start : start + len(data)] = data
        assert again == content
        assert len({start for start, _ in pieces}) == len(pieces)

    @given(
        size=SIZES, parts=PARTS, place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255)
    )
    @settings(
        deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50
    )
    def test_the_digest_sees_any_byte(self, tmp_path, size, parts, place, bits):
        """Also one in a hole."""
        file = tmp_path / "file"
        file.unlink(missing_ok=True)
        content = sparse(file, size, parts)
        before = file_digest(file)
        at = int(place * size)
        with opened(file) as changed:
            os.pwrite(changed.fileno(), bytes([content[at] ^ bits]), at)
        assert file_digest(file) != before
        with opened(file) as changed:
            os.pwrite(changed.fileno(), content[at : at + 1], at)
        assert file_digest(file) == before

    @pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1])
    def test_the_digest_sees_the_size(self, tmp_path, size):
        sparse(tmp_path / "file", size, [])
        before = file_digest(tmp_path / "file")
        os.truncate(tmp_path / "file", size + 1)
        assert file_digest(tmp_path / "file") != before
