"""A guest's memory in a file, and the file that clones see it in."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pytest_vmsandbox.machine.cmdline import can_map_read_only

_SEALS = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")
_CHUNK = 1 << 20


def create(path: Path, size: int) -> IO[bytes]:
    """A new file for a guest's memory; what the guest never touches takes no room."""
    file = path.open("x+b", buffering=0)
    os.ftruncate(file.fileno(), size)
    return file


def for_clones(path: Path, version: tuple[int, ...]) -> IO[bytes]:
    """An open file with that memory which a clone's QEMU cannot change.

    A QEMU that insists on opening it for writing gets a copy of ours, in memory and sealed.
    """
    file = path.open("rb", buffering=0)
    if can_map_read_only(version):
        return file
    with file:
        sealed = os.fdopen(
            os.memfd_create("vmsandbox-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING),
            "r+b",
            buffering=0,
        )
        try:
            copy(file, sealed)
            seals = sum(getattr(fcntl, name) for name in _SEALS)
            fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, seals)
        except BaseException:
            sealed.close()
            raise
    return sealed


def copy(source: IO[bytes], dest: IO[bytes]) -> None:
    """Copy a file with holes; the holes stay."""
    os.ftruncate(dest.fileno(), os.fstat(source.fileno()).st_size)
    for start, end in extents(source):
        os.lseek(dest.fileno(), start, os.SEEK_SET)
        at = start
        while at < end:
            if not (sent := os.sendfile(dest.fileno(), source.fileno(), at, end - at)):
                raise OSError(errno.EIO, "the file has become shorter")
            at += sent


def extents(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """The parts of a file that are there: where each begins and ends, in bytes."""
    fd, end = file.fileno(), 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # that is: nothing but a hole is left
                raise
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def chunks(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """All of a file but what is zero: where each piece, of at most a MiB, begins, and its bytes.

    The pieces are the same however the file's holes lie.
    """
    zero = bytes(_CHUNK)
    done = 0
    for begin, end in extents(file):
        start = max(done, begin - begin % _CHUNK)
        while start < end:
            data = os.pread(file.fileno(), _CHUNK, start)
            if data != zero[: len(data)]:
                yield start, data
            start += _CHUNK
        done = start
