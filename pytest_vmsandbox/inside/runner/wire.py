"""The connection between a supervisor and its session, and the JSON values that it carries."""

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
NICE = 5  # for the relays between tests and host, so they send several messages at once
MAX_TEXT = 4 << 20  # characters of one string in a message
MAX_VALUES = 100_000  # in a value from a plugin
MAX_DEPTH = 20  # levels of lists and objects in such a value
JSON = (bool, int, float, str, list, tuple, dict, type(None))


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

    Its messages go to a pipe. The supervisor reads the pipe when it is called, and when the session has
    ended. Waking it for each message would cost more than the message.

    Args:
        sock: receives messages, and sends calls.
        pipe: the end to write to.
    """

    def __init__(self, sock: socket.socket, pipe: int) -> None:
        sock = socket.socket(fileno=aside(sock.detach()))
        # Bind them now, because a test may patch the methods of sockets.
        self.call, self.receive = sock.send, sock.recv
        self.fd = sock.fileno()
        self.pipe = aside(pipe)
        os.set_blocking(self.pipe, False)
        self.poller = select.poll()
        self.poller.register(self.pipe, select.POLLOUT)
        self.lines = Lines()
        self.waiting: list[bytes] = []
        self.owner = os.getpid()
        self.child_has_failed = False  # in the child of a test that has forked
        self.lock = _thread.RLock()  # threads of tests log, too

    def say(self, message: dict[str, Any]) -> None:
        """Send a message at once."""
        self.note(message)
        if os.getpid() == self.owner:
            self.ring()

    def note(self, message: dict[str, Any]) -> None:
        """Send a message together with the next one."""
        if (
            os.getpid() != self.owner
        ):  # a test has forked, and its child says how it ended by its exit status
            self.child_has_failed |= message.get("report", {}).get("outcome") == "failed"
            return
        data = json.dumps(message).encode() + b"\n"
        with self.lock:
            while data:
                data = data[self.write(data) :]

    def write(self, data: bytes) -> int:
        """Write as much as there is room for. Returns the number of bytes."""
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

    def hear(self, *wanted: str) -> dict[str, Any] | None:
        """The next message; None at the end.

        Args:
            wanted: what it must tell us to do. Other messages wait.
        """
        if os.getpid() != self.owner:  # the child of a test came back: messages are not for it
            os._exit(int(self.child_has_failed))  # as pytest ends
        while (message := self.find(*wanted)) is None:
            if not self.pull():
                return None
        return message

    def find(self, *wanted: str) -> dict[str, Any] | None:
        """The first message that waits and is wanted; None without one."""
        for place, data in enumerate(self.waiting):
            message: dict[str, Any] = json.loads(data.decode())
            if not wanted or message["do"] in wanted:
                del self.waiting[place]
                return message
        return None

    def pull(self) -> bool:
        """Receive messages, which wait from now on. Returns False at the end."""
        data = self.receive(CHUNK)
        self.waiting += self.lines.feed(data)
        return bool(data)


def clean(value: Any, depth: int = 0) -> Any:
    """A value that JSON can carry. Other values become their repr, and long ones are cut."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            gone = len(value) - MAX_TEXT
            half = MAX_TEXT // 2
            value = "%s\n[%d characters left out]\n%s" % (value[:half], gone, value[-half:])
        return str.encode(value, "utf-8", "backslashreplace").decode()
    if isinstance(value, int) and abs(value) < 1 << 64:
        return value
    if isinstance(value, float):
        return value if value - value == 0 else repr(value)
    if depth > 40:
        return "…"
    if isinstance(value, dict):
        return {clean(str(key)): clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(item, depth + 1) for item in value]
    try:
        if hasattr(value, "__fspath__"):
            return clean(os.fspath(value), depth)
        return clean(repr(value), depth)
    except Exception as error:
        return "<%s whose repr() fails: %s>" % (type(value).__name__, type(error).__name__)


class Plain:
    """Makes a JSON value. Members that JSON cannot carry become texts."""

    def __init__(self) -> None:
        self.values = 0
        self.texts = False  # whether a member became a text

    def of(self, value: Any, depth: int = 0) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            raise OverflowError
        if isinstance(value, dict):
            self.texts = self.texts or not all(isinstance(key, str) for key in value)
            return {clean(str(key)): self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item, depth + 1) for item in value]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "backslashreplace")
        elif not isinstance(value, JSON):
            self.texts = self.texts or not hasattr(value, "__fspath__")
            value = str(value)
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise OverflowError
        return clean(value)


def portable(value: Any) -> Any:
    """A value that JSON keeps unchanged. For another value, its text as in junit's file."""
    try:
        if json.loads(json.dumps(value)) == value:
            return value
    except Exception:  # noqa: S110  # then as text
        pass
    try:
        return str(value)
    except Exception:
        return value
