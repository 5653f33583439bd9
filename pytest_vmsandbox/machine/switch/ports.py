"""One port of the switch: a stream socket to QEMU, whose frames have their length before them.

The guest is not trusted: what it sends has limits, and if it takes nothing, little waits for it.
"""

from __future__ import annotations

import socket
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from itertools import islice
from time import monotonic

from .timetable import Entry

MOST_OF_FRAME = 65_536  # bytes
_LEAST_OF_FRAME = 14  # bytes: two addresses and a type
_LENGTH = 4  # bytes before a frame
_CHUNK = 1 << 16  # bytes that are read from one port before the next one has its turn
_AT_ONCE = 256  # frames that are written by one call
QUEUE_IS_LONG = 1 << 19  # bytes that wait for a guest before those who send to it have to wait
QUEUE_IS_SHORT = 1 << 17  # bytes, at which they go on
QUEUE_IS_FULL = 1 << 22  # bytes; what comes on top is dropped
MOST_UNDERWAY = 1 << 23  # bytes of a guest's frames that conditions may hold
OVERHEAD = 512  # bytes of memory for a frame that waits, besides its content
READING, WRITING = 1, 2  # what a port waits for, as `selectors` has it


class ProtocolError(Exception):
    """A guest's QEMU sends what is no frame."""


class Counts:
    """What has gone through a port, and through former ones of its label. The names are those of `PortStatistics`."""

    def __init__(self) -> None:
        self.received = self.received_bytes = self.sent = self.sent_bytes = 0
        self.dropped: Counter[str] = Counter()


class Port:
    """A port. It owns its socket.

    Attributes:
        number: of the port, in the whole switch.
        label: its name in its network.
        place: what stands for it where chance comes from.
        waits: what it waits for: `READING`, `WRITING`, both, or none.
        awaited: ports whose guests cannot take what it sends. Meanwhile nothing is read from it.
        awaiting: ports that wait for it, until its `patience` ends.
        is_deaf: whether its guest took too little for too long. Then what is for it is dropped.
        queued: bytes that wait for its guest.
        waiting_since: when the guest has last taken something, or the first frame began to wait.
        underway: bytes of its own frames that conditions hold.
        addresses: that were seen behind it, the oldest first.
        counts: of its label.
    """

    def __init__(
        self, number: int, label: str, place: str, channel: socket.socket, counts: Counts
    ) -> None:
        channel.setblocking(False)
        self.number = number
        self.label = label
        self.place = place
        self.socket = channel
        self.waits = 0
        self.is_deaf = self.is_closed = False
        self.awaited: set[Port] = set()
        self.awaiting: set[Port] = set()
        self.patience: Entry | None = None
        self.queued = self.underway = 0
        self.waiting_since = 0.0
        self.addresses: OrderedDict[bytes, float] = OrderedDict()
        self.counts = counts
        self._rest = b""
        self._queue: deque[bytes | memoryview] = deque()

    def wanted(self) -> int:
        """What it should wait for now."""
        return READING * (not self.awaited) | WRITING * bool(self._queue)

    def read(self) -> Iterator[bytes]:
        """The frames that have arrived, each with its length before it.

        Raises:
            ProtocolError: something else has arrived.
            OSError: the other end is gone.
        """
        try:
            data = self.socket.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        if not data:
            raise ConnectionResetError
        if self._rest:
            data = self._rest + data
        start, end = 0, len(data)
        while end - start >= _LENGTH:
            size = int.from_bytes(data[start : start + _LENGTH], "big")
            if size > MOST_OF_FRAME:
                raise ProtocolError(f"a frame of {size} bytes")
            stop = start + _LENGTH + size
            if stop > end:
                break
            if size < _LEAST_OF_FRAME:
                self.counts.dropped["short"] += 1
            else:
                self.counts.received += 1
                self.counts.received_bytes += size
                yield data[start:stop]
            start = stop
        self._rest = data[start:]

    def put(self, frame: bytes) -> bool:
        """Add a frame to what waits for the guest. Returns False if its sender should wait."""
        if self.is_deaf or self.queued >= QUEUE_IS_FULL:
            self.counts.dropped["unread"] += 1
            return True
        if not self._queue:
            self.waiting_since = monotonic()
        self._queue.append(frame)
        self.queued += len(frame) + OVERHEAD
        return self.queued < QUEUE_IS_LONG

    def write(self) -> None:
        """Send what waits, as far as the guest takes it.

        Raises:
            OSError: the other end is gone.
        """
        queue = self._queue
        while queue:
            try:
                count = self.socket.sendmsg(list(islice(queue, _AT_ONCE)))
            except (BlockingIOError, InterruptedError):
                return
            self.waiting_since = monotonic()
            while queue and count >= len(queue[0]):
                frame = queue.popleft()
                count -= len(frame)
                self._was_sent(frame)
            if count:
                self._rest_of_first(count)

    def _was_sent(self, frame: bytes | memoryview) -> None:
        size = len(frame if isinstance(frame, bytes) else bytes(frame.obj))
        self.queued -= size + OVERHEAD
        self.counts.sent += 1
        self.counts.sent_bytes += size - _LENGTH

    def _rest_of_first(self, count: int) -> None:
        self._queue[0] = memoryview(self._queue[0])[count:]

    def has_caught_up(self) -> bool:
        """Whether its guest has taken most of what waited."""
        return self.queued < QUEUE_IS_SHORT

    def close(self) -> None:
        """Close its socket, and forget what waits."""
        self.is_closed = True
        self._queue.clear()
        self.queued = 0
        self.socket.close()
