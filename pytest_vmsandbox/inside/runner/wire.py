"""The connection between a supervisor and its session."""

from __future__ import annotations

import _thread
import json
import os
import select
import socket

from .apart import aside, keep_apart

TYPE_CHECKING = False  # known to type checkers; importing typing takes long in a guest
if TYPE_CHECKING:
    from typing import Any

keep_apart(globals())

SOCKET = "socket"
CHUNK = 1 << 16
NICE = 5  # of what stands between tests and host: several messages then go in one


class Lines:
    """Lines that arrive in pieces."""

    def __init__(self) -> None:
        self.rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(self.rest) + lines[0]
            self.rest.clear()
        self.rest += rest
        return lines


class Wire:
    """The session's end.

    What it says goes to a pipe, where the supervisor looks when it is called, and when the session has
    ended: to let it run for each message costs more than the message.

    Args:
        sock: what it is told comes from here, and calls go there.
        pipe: the end to write to.
    """

    def __init__(self, sock: socket.socket, pipe: int) -> None:
        sock = socket.socket(fileno=aside(sock.detach()))
        # Bound now: a test may patch the methods of sockets.
        self.call, self.receive = sock.send, sock.recv
        self.pipe = aside(pipe)
        os.set_blocking(self.pipe, False)
        self.poller = select.poll()
        self.poller.register(self.pipe, select.POLLOUT)
        self.lines = Lines()
        self.waiting: list[bytes] = []
        self.owner = os.getpid()
        self.lock = _thread.RLock()  # threads of tests log, too

    def say(self, message: dict[str, Any]) -> None:
        """Say something that the host should hear now."""
        self.note(message)
        if os.getpid() == self.owner:
            self.ring()

    def note(self, message: dict[str, Any]) -> None:
        """Say something that the host may hear with what comes next."""
        if os.getpid() != self.owner:  # a test has forked, and its child reports: not to us
            return
        data = json.dumps(message).encode() + b"\n"
        with self.lock:
            while data:
                data = data[self.write(data) :]

    def write(self, data: bytes) -> int:
        """Write what there is room for, and tell how much that was."""
        try:
            return os.write(self.pipe, data)
        except BlockingIOError:
            self.ring()
            self.poller.poll()
            return 0
        except BrokenPipeError:  # the supervisor is gone
            return len(data)

    def ring(self) -> None:
        try:
            self.call(b"!")
        except (BrokenPipeError, ConnectionResetError):
            pass

    def hear(self) -> dict[str, Any] | None:
        """The next message; None when there will be none."""
        if os.getpid() != self.owner:  # the child of a test came back: what comes is not for it
            os._exit(0)
        while not self.waiting:
            data = self.receive(CHUNK)
            if not data:
                return None
            self.waiting += self.lines.feed(data)
        message: dict[str, Any] = json.loads(self.waiting.pop(0).decode())
        return message
