"""Puts files into the cache: as links where nobody changes them, or as copies that keep their holes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

from pytest_vmsandbox.cache.integrity import extents


def copy(source: IO[bytes], dest: IO[bytes]) -> None:
    """Copy a file and keep its holes."""
    os.ftruncate(dest.fileno(), os.fstat(source.fileno()).st_size)
    for start, end in extents(source):
        os.lseek(dest.fileno(), start, os.SEEK_SET)
        at = start
        while at < end:
            if not (sent := os.sendfile(dest.fileno(), source.fileno(), at, end - at)):
                raise OSError(errno.EIO, "the file has become shorter")
            at += sent


def copy_to(source: IO[bytes], dest: Path) -> None:
    """Copy a file to a new one, which only this user can read."""
    with dest.open("x+b", buffering=0) as file:
        os.fchmod(file.fileno(), 0o600)
        copy(source, file)


def link(source: Path, dest: Path) -> None:
    """Link a file that nobody changes, or copy it."""
    with source.open("rb", buffering=0) as file:
        link_open(file, dest)


def link_open(source: IO[bytes], dest: Path) -> None:
    """Link an open file that nobody changes, or copy it: it may have no name, or be on another disk."""
    name, number = f"/proc/self/fd/{source.fileno()}", source.fileno()
    try:
        # It follows only with a folder.
        os.link(name, dest, src_dir_fd=number, follow_symlinks=True)
    except OSError:
        copy_to(source, dest)
