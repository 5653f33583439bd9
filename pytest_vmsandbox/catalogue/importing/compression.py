"""What was compressed as a whole: a disk or an archive in gzip, bzip2, xz or zstd. Bombs are noticed early."""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pytest_vmsandbox.catalogue.importing import jail
from pytest_vmsandbox.catalogue.importing.checked import MAX_SIZE, damaged
from pytest_vmsandbox.catalogue.importing.convert import (
    GRACE,
    RATIO,
    bomb,
    check_growth,
    seconds_for,
)
from pytest_vmsandbox.catalogue.importing.source import SourceFile, opened
from pytest_vmsandbox.core.spec import MIB

_CHUNK = 1 << 20
_XZ_MEMORY = 256 * MIB
_ZSTD = b"\x28\xb5\x2f\xfd"


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Gzip:
    """zlib's decompressor, with the interface of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.needs_input = not self._zlib.unconsumed_tail and len(out) < max_length
        return out


def _xz() -> _Decompressor:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


_KINDS: tuple[tuple[bytes, Callable[[], _Decompressor]], ...] = (
    (b"\x1f\x8b", _Gzip),
    (b"BZh", bz2.BZ2Decompressor),
    (b"\xfd7zXZ\0", _xz),
)


@dataclass
class Limits:
    """How much may come out of a file.

    Attributes:
        total: bytes in all.
        ratio: how many times more than went in, beyond `grace`.
        grace: bytes that may come out in any case.
    """

    total: int = MAX_SIZE
    ratio: int = RATIO
    grace: int = GRACE

    def check(self, name: str, packed: int, unpacked: int) -> None:
        """Check what came out of a file up to now.

        Raises:
            ImageError: it is too much.
        """
        if unpacked > min(self.total, self.ratio * packed + self.grace):
            raise bomb(name, unpacked)


def is_compressed(file: SourceFile) -> bool:
    """Whether a file is compressed as a whole."""
    return file.head(4) == _ZSTD or any(file.head(len(magic)) == magic for magic, _ in _KINDS)


def unpacked(file: SourceFile, limits: Limits) -> Iterator[bytes]:
    """The content of a file, piece by piece, unpacked if it is compressed (but not by zstd).

    Raises:
        ImageError: it is damaged, or too much comes out.
    """
    make = next((make for magic, make in _KINDS if file.head(len(magic)) == magic), None)
    if make is None:
        yield from file.chunks()
        return
    done = 0
    for packed, data in _decompressed(file, make):
        done += len(data)
        limits.check(file.name, packed, done)
        yield data


def _decompressed(
    file: SourceFile, make: Callable[[], _Decompressor]
) -> Iterator[tuple[int, bytes]]:
    """Bytes read up to now, and the next piece of what they hold."""
    decompressor, packed = make(), 0
    try:
        for piece in file.chunks():
            packed += len(piece)
            data = piece
            while data or not (decompressor.eof or decompressor.needs_input):
                if decompressor.eof:
                    data = data.lstrip(b"\0")  # padding; then a further stream, or the end
                    if not data:
                        break
                    decompressor = make()
                out = decompressor.decompress(data, _CHUNK)
                data = decompressor.unused_data if decompressor.eof else b""
                yield packed, out
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise damaged(file, f"what is compressed cannot be unpacked ({error})") from error
    if not decompressor.eof:
        raise file.cut_short()


@contextmanager
def without_zstd(file: SourceFile, work: Path) -> Iterator[SourceFile]:
    """The file itself; or, if zstd has compressed it, what was in it.

    Python reads zstd from 3.14 on only, so a program does it, in the jail.

    Raises:
        ImageError: it is damaged, or too much comes out.
    """
    if file.head(4) != _ZSTD:
        yield file
        return
    target, limit = work / "unpacked", min(MAX_SIZE, RATIO * file.size + GRACE)
    try:
        with target.open("xb") as out:
            os.lseek(file.descriptor, 0, os.SEEK_SET)
            ended = jail.run(
                [jail.program("zstd"), "--decompress", "--stdout", "--memory=256MB"],
                [],
                work=work,
                seconds=seconds_for(file.size),
                file_size=limit,
                check=lambda: check_growth(target, limit),
                stdin=file.descriptor,
                stdout=out.fileno(),
            )
        if ended.status != 0:
            raise damaged(file, "what is compressed cannot be unpacked")
        with opened(target, file.name) as inner:
            yield inner
    finally:
        target.unlink(missing_ok=True)
