"""Makes the content of a disk in any state of a recording."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.errors import CacheError
from pytest_vmsandbox.guests.crash.states import Extent, History, State
from pytest_vmsandbox.machine.memory import make_hole

_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class _Step:
    """What one extent has overwritten.

    Attributes:
        extent: of the disk.
        parts: where there was data, as first byte and the byte after the last one. The rest was a hole.
        saved: where that data is in the file of the past.
    """

    extent: Extent
    parts: list[tuple[int, int]]
    saved: int


class Builder:
    """Gives a file the content of one state after the other. Each step costs what it changes.

    It is a context manager. At its end, the file is as it was before.

    Args:
        base: the content of the disk before the recording, a raw file. It becomes `file`.
        log: the log file.
        history: of the recording.
        folder: for a file without a name, with what was overwritten.

    Attributes:
        file: has the content of the state. Nobody else may write to it.
        size: bytes of the disk.
        history: of the recording.
    """

    def __init__(self, base: IO[bytes], log: IO[bytes], history: History, folder: Path) -> None:
        self.file = base
        self.size = os.fstat(base.fileno()).st_size
        self._log, self.history = log, history
        self._past = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # see __exit__
        self._steps: list[_Step] = []
        self._durable = 0  # how many steps are for durable entries: one for each

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._past, _explained():
            self._undo(0)

    @contextmanager
    def state(self, state: State) -> Iterator[None]:
        """While this lasts, the file has the content of a state.

        Raises:
            ConfigError: no power cut in this recording leaves that state.
            CacheError: the disk with the cache is full.
        """
        self.history.check(state)
        floor = self.history.floor(state.point)
        with _explained():
            self._undo(min(floor, self._durable))
            for entry in self.history.entries[len(self._steps) : floor]:
                self._do(Extent(entry.offset, entry.length, entry.data))
            self._durable = floor
            for extent in self.history.extents(state):
                self._do(extent)
        yield

    def write(self, state: State, path: Path) -> None:
        """Write the content of a state into a new raw file, which has holes where there are zeros.

        Raises:
            ConfigError: no power cut in this recording leaves that state.
            FileExistsError: the file exists.
            OSError: it cannot be written.
        """
        with self.state(state), path.open("xb", buffering=0) as target:
            os.ftruncate(target.fileno(), self.size)
            for start, end in parts(self.file, 0, self.size):
                copy(self.file, start, target, start, end - start)

    def _do(self, extent: Extent) -> None:
        saved = self._steps[-1].saved + _length(self._steps[-1].parts) if self._steps else 0
        end = extent.offset + extent.length
        step = _Step(extent, list(parts(self.file, extent.offset, end)), saved)
        for first, last in step.parts:
            copy(self.file, first, self._past, saved, last - first)
            saved += last - first
        self._steps.append(step)
        data = extent.data
        filled = [] if data is None else list(parts(self._log, data, data + extent.length))
        if _length(filled) < extent.length:  # QEMU logs zeros as a hole
            _clear(self.file, extent.offset, end)
        for first, last in filled:
            assert data is not None
            copy(self._log, first, self.file, extent.offset + first - data, last - first)

    def _undo(self, number: int) -> None:
        """Take all steps back but a number of them."""
        while len(self._steps) > number:
            step = self._steps[-1]
            saved, extent = step.saved, step.extent
            if _length(step.parts) < extent.length:
                _clear(self.file, extent.offset, extent.offset + extent.length)
            for first, last in step.parts:
                copy(self._past, saved, self.file, first, last - first)
                saved += last - first
            self._steps.pop()
        self._durable = min(self._durable, number)


def _length(ranges: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def parts(file: IO[bytes], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a range of a file that are no holes."""
    while start < end:
        try:
            first = os.lseek(file.fileno(), start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: only a hole is left
                raise
            return
        if first >= end:
            return
        start = min(end, os.lseek(file.fileno(), first, os.SEEK_HOLE))
        yield first, start


def _clear(file: IO[bytes], start: int, end: int) -> None:
    """Let a range of a file read as zeros."""
    try:
        make_hole(file, start, end)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        while start < end:
            start += os.pwrite(file.fileno(), bytes(min(_CHUNK, end - start)), start)


def copy(source: IO[bytes], at: int, target: IO[bytes], to: int, length: int) -> None:
    """Copy a part of a file into another one.

    Raises:
        OSError: the file ends before, or there is no room.
    """
    while length:
        piece = os.pread(source.fileno(), min(_CHUNK, length), at)
        if not piece:
            raise OSError(errno.EIO, "a file of the recording was cut short")
        written = os.pwrite(target.fileno(), piece, to)
        at, to, length = at + written, to + written, length - written


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"a state of the disk cannot be made in the cache: {error.strerror}",
            remedy=f"make room there, or set the environment variable {paths.CACHE} to another folder",
        ) from error
