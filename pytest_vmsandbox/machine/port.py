"""Our end of a serial port of the guest. It carries bytes in both directions."""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
import threading
from collections.abc import Callable

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import GuestLost

_MAX_EARLY = 1 << 20  # bytes that we keep before there is a listener


class Port:
    """A port of the guest. It keeps what arrives before there is a listener.

    Args:
        sock: our end of a socket pair. The caller owns it, and calls `feed` with what arrives there.

    Attributes:
        gate: while it is held, nothing is sent, not even the rest of a message.
        received: the number of bytes that have arrived.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.gate = threading.Lock()
        self.received = 0
        self._listener: Callable[[bytes], object] | None = None
        self._early = b""
        self._receiving = threading.Lock()
        self._sending = threading.Lock()

    def listen(self, feed: Callable[[bytes], object]) -> None:
        """Pass what has arrived, and what will arrive, to `feed`."""
        with self._receiving:
            self._listener = feed
            early, self._early = self._early, b""
            if early:
                feed(early)

    def feed(self, data: bytes) -> None:
        """Take what the guest wrote."""
        self.received += len(data)
        with self._receiving:
            if self._listener is None:
                self._early += data[: _MAX_EARLY - len(self._early)]
            else:
                self._listener(data)

    @property
    def unread(self) -> int:
        """What we have sent and QEMU has not read, as the memory that this takes; 0 if it has read all."""
        return unread(self._sock)

    @property
    def is_still(self) -> bool:
        """Whether there is nothing that we have not read."""
        return is_empty(self._sock)

    def send(self, data: bytes, timeout: float) -> None:
        """Send all of `data`.

        Raises:
            GuestLost: the guest did not take it within `timeout` seconds, or is gone.
        """
        deadline = Deadline(timeout)
        view = memoryview(data)
        with self._sending:
            while view:
                try:
                    with self.gate:
                        view = view[self._sock.send(view) :]
                except BlockingIOError:
                    poller = select.poll()
                    poller.register(self._sock, select.POLLOUT)
                    if not poller.poll(deadline.remaining() * 1000):
                        raise GuestLost(
                            f"the helper in the guest read nothing for {timeout:g} s",
                            stage="command",
                            remedy="check whether a test stops all processes in the guest. This machine may "
                            "also be overloaded: run fewer guests or workers at a time",
                        ) from None
                except OSError as error:
                    raise GuestLost("the guest's QEMU is gone", stage="launch") from error


def is_empty(sock: socket.socket) -> bool:
    """Whether there is nothing to read from a socket now."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return not poller.poll(0)


def unread(sock: socket.socket) -> int:
    """What was sent on a Unix socket and not read, as the memory that this takes; 0 if all was read."""
    (size,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    return int(size)
