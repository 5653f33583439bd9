"""The files of users' kernels, read so that no other file of this machine comes along."""

from __future__ import annotations

import bz2
import lzma
import os
import subprocess
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from pytest_vmsandbox.cache.files import open_regular
from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.core.errors import ConfigError

_PROGRAM_SECONDS = 120.0
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


@contextmanager
def opened(file: Path, below: Path | None = None) -> Iterator[BufferedReader]:
    """Open a regular file for reading.

    Args:
        below: the folder that no link may lead out of. None: any, for what guests get nothing of, and for what
            the user names.

    Raises:
        ConfigError: it is missing, cannot be read, is no regular file, or lies elsewhere.
    """
    try:
        with os.fdopen(open_regular(file, follow=True), "rb") as stream:
            if below is not None:
                # What is open counts, not what lies at the path by now.
                _check(file, Path(f"/proc/self/fd/{stream.fileno()}").readlink(), below)
            yield stream
    except OSError as error:
        raise unreadable(file, error) from error


def unreadable(path: Path, error: OSError) -> ConfigError:
    """The error for a file of a kernel that cannot be read."""
    return ConfigError(
        f"the kernel's file {path} cannot be read: {error.strerror or error}",
        remedy="check the path, and that you may read the file (Ubuntu lets only root read "
        "/boot/vmlinuz-*: name the .deb file instead)",
    )


def content(file: Path, below: Path | None = None) -> bytes:
    """The content of a regular file; see `opened`."""
    with opened(file, below) as stream:
        return stream.read()


def check_package(file: Path) -> None:
    """Check that a Debian package is a regular file, and whole: an ``ar`` archive with all of its members.

    Raises:
        ConfigError: it is not.
    """
    with opened(file) as stream:
        size, needed = os.fstat(stream.fileno()).st_size, len(_AR_MAGIC)
        is_package = stream.read(needed) == _AR_MAGIC[:size]
        while is_package and (begin := needed + needed % 2) < size:
            stream.seek(begin)
            header = stream.read(_AR_HEADER)
            length = header[48:58].strip() or b"0"
            is_package = length.isdigit() and header[58:] in b"`\n"
            needed = begin + _AR_HEADER + (int(length) if is_package else 0)
    if not is_package:
        raise ConfigError(
            f"{file} is no Debian package, by its content",
            remedy="name a file linux-image-VERSION.deb, or fetch it again",
        )
    if needed > size:
        raise ConfigError(
            f"{file} is cut short: it has {size} bytes, and needs {needed} or more",
            remedy="copy, fetch or build it again",
        )


def check_folder(folder: Path, below: Path) -> None:
    """Check that a folder is `below`, or that folder itself.

    Raises:
        ConfigError: it lies elsewhere.
    """
    _check(folder, folder.resolve(), below)


def _check(path: Path, real: Path, below: Path) -> None:
    if not real.is_relative_to(below.resolve()):
        raise ConfigError(
            f"{path} leads out of {below}, to {real}",
            remedy="guests get nothing from elsewhere: put a copy there instead of the link, remove the link, or "
            "name a folder that has both",
        )


# -- compression ---------------------------------------------------------------------------------------


def gunzip(data: bytes) -> bytes:
    """Unpack what gzip has packed. What follows it is ignored."""
    return zlib.decompressobj(31).decompress(data)


def _unzstd(data: bytes) -> bytes:
    program = programs.find("zstd")
    if program is None:
        raise ConfigError(
            "zstd, which is needed to unpack modules, is not on this machine",
            remedy=f"install it: {programs.install_line(['zstd'])}",
        )
    done = subprocess.run(
        [program, "-dcq"], input=data, capture_output=True, check=False, timeout=_PROGRAM_SECONDS
    )
    if not done.stdout:  # what follows a kernel's frame makes the status 1
        raise ValueError(done.stderr.decode(errors="replace"))
    return done.stdout


DECOMPRESSORS: Mapping[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gunzip,
    b"\xfd7zXZ": lambda data: lzma.LZMADecompressor().decompress(data),
    b"]\0\0": lambda data: lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data),
    b"BZh": lambda data: bz2.BZ2Decompressor().decompress(data),
    b"\x28\xb5\x2f\xfd": _unzstd,
}


def plain_module(file: Path, below: Path | None = None) -> bytes:
    """The content of a module, without its compression.

    Args:
        below: the folder that links must not lead out of; None for any.

    Raises:
        ConfigError: it cannot be read or unpacked, or is no module.
    """
    data = content(file, below)
    for magic, unpack in DECOMPRESSORS.items():
        if data.startswith(magic):
            try:
                data = unpack(data)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise ConfigError(f"the module {file} is damaged: {error}") from error
    if not data.startswith(b"\x7fELF"):
        raise ConfigError(
            f"{file} is no kernel module, by its content",
            remedy="build or unpack the modules again, or remove that file",
        )
    return data
