"""A guest's memory in a file, and the file that clones map."""

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

from pytest_vmsandbox.cache.copying import copy
from pytest_vmsandbox.cache.integrity import chunks
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.cmdline import can_map_read_only

_SEALS = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # modes of Linux's fallocate
_PIECE = 1 << 16  # bytes; the unit in which we free space


@contextmanager
def create(path: Path, size: int) -> Iterator[IO[bytes]]:
    """A new file for a guest's memory. Untouched memory takes no space."""
    with path.open("x+b", buffering=0) as file:
        os.ftruncate(file.fileno(), size)
        yield file


@contextmanager
def reserved(path: Path, size: int) -> Iterator[IO[bytes]]:
    """A new file for a guest's memory, on a file system with room for all of it.

    QEMU maps the file. If a write to a page finds no room, SIGBUS kills QEMU. So we reserve the room
    before, and free at the end what the guest did not use.

    Args:
        size: bytes.

    Raises:
        LaunchError: this host does not have that much memory left.
        OSError: the file system has no room.
    """
    host.require_memory(size)
    with create(path, size) as file:
        _reserve(file, size)
        yield file
        with suppress(OSError):  # the file is larger then
            free_zeros(file)


def _reserve(file: IO[bytes], size: int) -> None:
    status = os.fstatvfs(file.fileno())
    free = status.f_bavail * status.f_frsize
    no_room = OSError(
        f"the cache has no room for {format_size(size)} of memory ({format_size(free)} are free). Make "
        f"room there, or set the environment variable {paths.CACHE} to another folder"
    )
    # Check first: a reservation that fails would use up the disk for a moment.
    if status.f_blocks and free < size:  # without blocks: this file system does not count them
        raise no_room
    try:
        _fallocate(file, 0, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room from error
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):  # reserving is not supported
            raise


def free_zeros(file: IO[bytes]) -> None:
    """Make holes where there are only zeros.

    We read the content, because a file system may count a reserved page as used when it was only read.

    Raises:
        OSError: the file system cannot do it.
    """
    zero, done = bytes(_PIECE), 0
    for start, data in chunks(file):
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            if piece != zero[: len(piece)]:
                make_hole(file, done, start + at)
                done = start + at + len(piece)
    make_hole(file, done, os.fstat(file.fileno()).st_size)


def make_hole(file: IO[bytes], start: int, end: int) -> None:
    """Make a hole, which reads as zeros, from one byte to another.

    Raises:
        OSError: the file system cannot do it.
    """
    if end > start:
        _fallocate(file, _KEEP_SIZE | _PUNCH_HOLE, start, end - start)


def _fallocate(file: IO[bytes], mode: int, start: int, length: int) -> None:
    """Linux's fallocate. `os.posix_fallocate` makes no holes, and writes if it cannot reserve.

    Raises:
        OSError: the file system cannot do it.
    """
    while _libc().fallocate(file.fileno(), mode, start, length):
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))


@cache
def _libc() -> ctypes.CDLL:
    """The C library. It is opened once, because a large memory has thousands of holes."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc


@contextmanager
def for_clones(path: Path, version: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """An open file with that memory, which a clone's QEMU cannot change.

    A QEMU that always opens it for writing gets a copy in a sealed memfd.
    """
    with path.open("rb", buffering=0) as file:
        if can_map_read_only(version):
            yield file
            return
        with sealable(os.fstat(file.fileno()).st_size) as sealed:
            copy(file, sealed)
            seal(sealed)
            yield sealed


@contextmanager
def sealable(size: int) -> Iterator[IO[bytes]]:
    """A new file in this host's memory, for a guest's memory.

    Args:
        size: bytes.

    Raises:
        LaunchError: this host does not have that much memory left.
    """
    host.require_memory(size)
    number = os.memfd_create("vmsandbox-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(number, "r+b", buffering=0) as file:
        os.ftruncate(number, size)
        yield file


def seal(file: IO[bytes]) -> None:
    """Let nobody change a file of `sealable` any more. No QEMU may map it for writing."""
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, sum(getattr(fcntl, name) for name in _SEALS))


@contextmanager
def in_memory(source: IO[bytes]) -> Iterator[IO[bytes]]:
    """A copy of a file in memory. Every user can read it, also the one that QEMU runs as."""
    number = os.memfd_create("vmsandbox-copy", os.MFD_CLOEXEC)
    with os.fdopen(number, "r+b", buffering=0) as dest:
        copy(source, dest)
        os.fchmod(number, 0o444)
        yield dest
