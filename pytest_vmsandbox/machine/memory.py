"""A guest's memory in a file, and the file that clones see it in."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from pytest_vmsandbox.core.integrity import extents
from pytest_vmsandbox.machine.cmdline import can_map_read_only

_SEALS = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")


def create(path: Path, size: int) -> IO[bytes]:
    """A new file for a guest's memory; what the guest never touches takes no room."""
    file = path.open("x+b", buffering=0)
    try:
        os.ftruncate(file.fileno(), size)
    except BaseException:
        file.close()
        raise
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
