"""Writes frames in the format of pcap, which tcpdump and Wireshark read."""

from __future__ import annotations

import os
import struct
import time

LIMIT = 256 << 20  # bytes of a file
_HEADER = struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65_536, 1)  # nanoseconds, Ethernet
_PACKET = struct.Struct("=IIII")
_BUFFER = 1 << 16


class Capture:
    """A file with frames. It belongs to this object, and has a limit.

    Args:
        file: a descriptor.
        limit: bytes, after which no frame is added.
    """

    def __init__(self, file: int, limit: int = LIMIT) -> None:
        self._file = file
        self._left = limit - len(_HEADER)
        self._buffer = bytearray(_HEADER)
        self.flush()

    def add(self, frame: bytes) -> None:
        """Add a frame that came now."""
        size = len(frame)
        self._left -= _PACKET.size + size
        if self._left < 0:
            return
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        self._buffer += _PACKET.pack(seconds, nanoseconds, size, size)
        self._buffer += frame
        if len(self._buffer) >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        """Write what is left. After an error (the disk is full), nothing more is written."""
        try:
            while self._buffer:
                del self._buffer[: os.write(self._file, self._buffer)]
        except OSError:
            self._left = 0
            self._buffer.clear()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self.flush()
        os.close(self._file)
