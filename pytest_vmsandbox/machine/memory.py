"""A guest's memory in a file, and the file that clones see it in."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from pytest_vmsandbox.cache.integrity import chunks, extents
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.cmdline import can_map_read_only

_SEALS = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # modes of Linux's fallocate
_PIECE = 1 << 16  # bytes that are given back together


@contextmanager
def create(path: Path, size: int) -> Iterator[IO[bytes]]:
    """A new file for a guest's memory; what the guest never touches takes no room."""
    with path.open("x+b", buffering=0) as file:
        os.ftruncate(file.fileno(), size)
        yield file


@contextmanager
def reserved(path: Path, size: int) -> Iterator[IO[bytes]]:
    """A new file for a guest's memory, on a file system that has room for all of it.

    QEMU maps the file, and a write to a page that finds no room ends QEMU with SIGBUS. So the room is
    taken before, and what the guest did not use is given back at the end.

    Args:
        size: bytes.

    Raises:
        LaunchError: this host has not so much memory left.
        OSError: the file system has no room.
    """
    host.require_memory(size)
    with create(path, size) as file:
        _reserve(file, size)
        yield file
        with suppress(OSError):  # then it takes more room than it needs
            _give_back(file, size)


def _reserve(file: IO[bytes], size: int) -> None:
    status = os.fstatvfs(file.fileno())
    free = status.f_bavail * status.f_frsize
    no_room = OSError(
        f"the cache has no room for {format_size(size)} of memory, {format_size(free)} are free; "
        f"make room there, or name another folder in {paths.CACHE}"
    )
    # Asked first: a reservation that fails would take all that is left, for a moment.
    if status.f_blocks and free < size:  # no blocks at all: this file system does not count them
        raise no_room
    try:
        _fallocate(file, 0, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room from error
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):  # here, nothing can be reserved
            raise


def _give_back(file: IO[bytes], size: int) -> None:
    """Make holes where there is nothing but zeros.

    What counts is what is read: a file system may call a page used that was reserved and only read.
    """
    zero, done = bytes(_PIECE), 0
    for start, data in chunks(file):
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            if piece != zero[: len(piece)]:
                _make_hole(file, done, start + at)
                done = start + at + len(piece)
    _make_hole(file, done, size)


def _make_hole(file: IO[bytes], start: int, end: int) -> None:
    if end > start:
        _fallocate(file, _KEEP_SIZE | _PUNCH_HOLE, start, end - start)


def _fallocate(file: IO[bytes], mode: int, start: int, length: int) -> None:
    """Linux's own: `os.posix_fallocate` makes no holes, and writes where it cannot reserve.

    Raises:
        OSError: the file system cannot.
    """
    while _libc().fallocate(file.fileno(), mode, start, length):
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))


@cache
def _libc() -> ctypes.CDLL:
    """The C library, opened once: a large memory has thousands of holes."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc


@contextmanager
def for_clones(path: Path, version: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """An open file with that memory which a clone's QEMU cannot change.

    A QEMU that insists on opening it for writing gets a copy of ours, in a sealed memfd.
    """
    with path.open("rb", buffering=0) as file:
        if can_map_read_only(version):
            yield file
            return
        number = os.memfd_create("vmsandbox-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(number, "r+b", buffering=0) as sealed:
            copy(file, sealed)
            fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, sum(getattr(fcntl, name) for name in _SEALS))
            yield sealed


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
