"""The log of all that a guest writes to a disk. QEMU's block driver ``blklogwrites`` makes it.

The format is that of Linux's ``dm-log-writes``: a sector with a super block, then for each request a
sector with its header, and the data after that.

QEMU logs a request when the disk below has done it, and answers the guest only after that. So all that a
guest has seen done is in the log, and a request that follows another one's end comes later there. What
QEMU 7.2 to 11 do not log: a flush if nothing was written since the last one, and the flag FUA, which they
turn into a flush. A request to write zeros is logged as a write of zeros. Before 7.2.9, another request at
the same time could damage the log then, and `Log` says so.

A header gets its place before it is written, so several requests at once can leave a gap for a moment.
The number of entries in the super block is only right after a flush. It is not used.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import IO, Literal

from pytest_vmsandbox.core.errors import MonitorError

SECTOR = 512  # bytes
_HEADER = struct.Struct("<QQQQ")  # sector, number of sectors, flags, bytes of a mark
_FLUSH, _FUA, _DISCARD = 1, 2, 4
_MAGIC = 0x6A736677736872
_NOTHING = bytes(_HEADER.size)


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of the guest.

    Attributes:
        number: its place among all of them. The first one is 0.
        kind: what it is.
        offset, length: what it is about, in bytes of the disk; both 0 for a flush.
        data: where its data is in the log file, in bytes; None if it has none.
        is_durable: whether it was on the disk for good when it was done (FUA).
    """

    number: int
    kind: Literal["write", "flush", "discard"]
    offset: int = 0
    length: int = 0
    data: int | None = None
    is_durable: bool = False

    @property
    def end(self) -> int:
        """The byte of the disk after it."""
        return self.offset + self.length


class Log:
    """A log that is read while QEMU writes it.

    Args:
        file: the log file.
        size: bytes of the disk.

    Attributes:
        file: the log file.
        entries: what was read until now.
        is_finished: whether there will be no more.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file = file
        self.entries: list[Entry] = []
        self.is_finished = False
        self._size = size
        self._position = SECTOR  # of the next header

    def read(self) -> bool:
        """Read what was added since the last time.

        Returns:
            Whether that was all. If not, the header of a request is still being written.

        Raises:
            MonitorError: the log is damaged.
        """
        number = self.file.fileno()
        while True:
            header = os.pread(number, _HEADER.size, self._position)
            if len(header) < _HEADER.size or header == _NOTHING:
                return self._position >= os.fstat(number).st_size
            entry = self._entry(*_HEADER.unpack(header))
            self.entries.append(entry)
            self._position += SECTOR + (entry.length if entry.kind == "write" else 0)

    def finish(self) -> list[Entry]:
        """Read the rest, when the guest does not write to the disk any more. This does it once.

        Returns:
            All entries.

        Raises:
            MonitorError: the log is damaged, or its end is missing.
        """
        if self.is_finished:
            return self.entries
        is_whole = self.read()
        size = os.fstat(self.file.fileno()).st_size
        if not is_whole or size < (self._position if self.entries else 0):
            raise self._damaged("its end is missing")
        head = os.pread(self.file.fileno(), 8, 0)
        if head.strip(b"\0") and int.from_bytes(head, "little") != _MAGIC:
            raise self._damaged("it does not begin as one")
        self.is_finished = True
        return self.entries

    def _entry(self, sector: int, count: int, flags: int, extra: int) -> Entry:
        offset, length = sector * SECTOR, count * SECTOR
        if flags & ~(_FLUSH | _FUA | _DISCARD) or extra or offset + length > self._size:
            raise self._damaged(f"there is no request at byte {self._position}")
        number = len(self.entries)
        if flags & _DISCARD:
            return Entry(number, "discard", offset, length)
        if flags & _FLUSH:
            return Entry(number, "flush")
        data = self._position + SECTOR
        return Entry(number, "write", offset, length, data, bool(flags & _FUA))

    def _damaged(self, why: str) -> MonitorError:
        return MonitorError(
            f"QEMU's log of what the guest wrote is damaged: {why} ({len(self.entries)} entries are whole)",
            remedy="the disk with the cache may be full: make room there, or set the environment variable "
            "VMSANDBOX_CACHE to another folder, and record again",
        )
