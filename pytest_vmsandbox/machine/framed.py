"""Frames on a stream, as QEMU sends and takes them: each comes after its length, in four bytes."""

from __future__ import annotations

from collections.abc import Iterator

_LENGTH = 4
_MOST_OF_FRAME = 65_536 + 4096


def framed(frame: bytes) -> bytes:
    """A frame after its length."""
    return len(frame).to_bytes(_LENGTH) + frame


class Frames:
    """Cuts a stream into frames. After what cannot be the length of one, there are none any more."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._is_over = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are complete now."""
        if self._is_over:
            return
        self._rest += data
        while len(self._rest) >= _LENGTH:
            size = int.from_bytes(self._rest[:_LENGTH])
            if size > _MOST_OF_FRAME:  # never sent by QEMU
                self._is_over = True
                self._rest.clear()
                return
            end = _LENGTH + size
            if len(self._rest) < end:
                return
            frame = bytes(self._rest[_LENGTH:end])
            del self._rest[:end]  # before it is used: that may fail
            yield frame
