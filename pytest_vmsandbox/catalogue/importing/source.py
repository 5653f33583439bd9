"""Files from elsewhere, opened once: what is checked is what is read."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.cache.files import NotRegularError, open_regular
from pytest_vmsandbox.core.errors import ImageError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """A regular file that is open for reading.

    Attributes:
        name: how it is called in messages, and in the descriptors of split disks.
        path: where it is.
        descriptor: of the open file.
        status: its `os.stat_result` when it was opened.
    """

    name: str
    path: Path
    descriptor: int
    status: os.stat_result

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self.status.st_size

    def at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on.

        Raises:
            ImageError: the file does not have them.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self.cut_short()
        data = self._read(length, offset)
        if len(data) != length:
            raise self.cut_short()
        return data

    def head(self, length: int) -> bytes:
        """The first bytes: `length`, or as many as there are."""
        return self._read(length, 0)

    def _read(self, length: int, offset: int) -> bytes:
        try:
            return os.pread(self.descriptor, length, offset)
        except OSError as error:
            raise ImageError(
                f"{self.name} cannot be read: {error.strerror}",
                remedy=f"check the disk that {self.path} is on, and copy the file to another one",
            ) from error

    def chunks(self) -> Iterator[bytes]:
        """The whole content, piece by piece."""
        offset = 0
        while data := self._read(_CHUNK, offset):
            yield data
            offset += len(data)

    def digest(self, kind: str = "sha256") -> str:
        """A digest of the content, in hex."""
        total = hashlib.new(kind, usedforsecurity=False)
        for data in self.chunks():
            total.update(data)
        return total.hexdigest()

    def check_unchanged(self) -> None:
        """Check that nobody has written to the file since it was opened.

        Raises:
            ImageError: somebody has.
        """
        now, then = os.fstat(self.descriptor), self.status
        if (now.st_size, now.st_mtime_ns, now.st_ctime_ns) != (
            then.st_size,
            then.st_mtime_ns,
            then.st_ctime_ns,  # programs that copy set the former one back
        ):
            raise ImageError(
                f"{self.name} was changed while it was imported",
                remedy="import it again when nothing writes to it; stop the machine that uses it",
            )

    def cut_short(self) -> ImageError:
        """The error for a file that refers to what is behind its end."""
        return ImageError(
            f"{self.name} is cut short or damaged: it refers to what is behind its end",
            remedy="fetch or copy it again, and compare its digest",
        )


@contextmanager
def opened(path: Path, name: str = "") -> Iterator[SourceFile]:
    """Open a regular file. No link is followed, and nothing else is opened, not even for a moment.

    Raises:
        ImageError: it cannot be read, or is something else.
    """
    name = name or path.name or str(path)
    descriptor = _open(path, name)
    try:
        yield SourceFile(name, path, descriptor, os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _open(path: Path, name: str) -> int:
    try:
        return open_regular(path, follow=False)
    except NotRegularError as error:
        raise ImageError(
            f"{name} is not a regular file, but {error.kind}",
            remedy="name the file that has the disk itself",
        ) from error
    except OSError as error:
        why = "it does not exist" if error.errno == errno.ENOENT else error.strerror
        raise ImageError(
            f"{name} cannot be read: {why}", remedy=f"check the path {path}"
        ) from error
