"""A terminal for a session: a small program lends its own, and the session takes it for a debugger."""

from __future__ import annotations

import _socket
import json
import os
import select
import signal
import socket
import sys

from .apart import SHARED, aside, keep_apart

TYPE_CHECKING = False  # known to type checkers; importing typing takes long in a guest
if TYPE_CHECKING:
    from typing import Any

    from .wire import Wire

keep_apart(globals())

TERMINAL = "terminal"  # the name of the socket
MAX_GREETING = 4096  # bytes
VARIABLES = ("TERM", "COLORTERM")  # a session takes these from the program that lends it a terminal


class NoTerminal(RuntimeError):
    """A debugger is asked for, and there is no terminal for it."""

    __module__ = "vmsandbox"  # as tracebacks show it


class Terminal:
    """The terminal that a session has for a while, as its standard streams.

    Args:
        folder: of the supervisor's socket.
    """

    def __init__(self, folder: str, wire: Wire) -> None:
        self.path = "%s/%s" % (folder, TERMINAL)
        self.wire = wire
        self.count = 0  # how often we have asked for it
        self.lender: Any = None  # the connection to the program that lends it
        self.greeting: dict[str, Any] = {}
        self.tty = -1
        self.saved: list[int] = []  # what 0, 1 and 2 were
        self.variables: dict[str, str | None] = {}
        self.stream: Any = None  # standard output, if we have made it write line by line

    def ask(self) -> None:
        """Ask the host for a terminal, and wait until it is here.

        Raises:
            NoTerminal: there is none.
        """
        listener = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        listener.bind(self.path)
        try:
            listener.listen(1)
            self.count += 1
            self.wire.say({"terminal": self.count})
            self.wait(listener)
            fd, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001
        finally:
            listener.close()
            os.unlink(self.path)
        lender = _socket.socket(fileno=aside(fd))
        data, extras, *_ = lender.recvmsg(MAX_GREETING, socket.CMSG_SPACE(4))
        if not extras:
            lender.close()
            raise NoTerminal("the terminal went away")
        self.greeting = json.loads(data.decode())
        self.tty = aside(int.from_bytes(extras[0][2][:4], sys.byteorder))
        self.lender = lender

    def put(self) -> None:
        """Put the terminal on 0, 1 and 2."""
        environment: Any = SHARED["os"].environ
        for name in VARIABLES:
            self.variables[name] = environment.get(name)
            if isinstance(self.greeting.get(name), str):
                environment[name] = self.greeting[name]
        self.flush()
        for number in (0, 1, 2):
            self.saved.append(aside(os.dup(number)))
            os.dup2(self.tty, number)
        stream = SHARED["sys"].stdout
        if hasattr(stream, "reconfigure") and not stream.line_buffering:
            stream.reconfigure(line_buffering=True)  # it is lent for a part of its output only
            self.stream = stream

    def wait(self, listener: Any) -> None:
        """Wait until somebody connects, or the host says that nobody will."""
        poller = select.poll()
        for source in (listener, self.wire.fd):
            poller.register(source, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poller.poll()]
            if listener.fileno() in ready:
                return
            if not self.wire.pull():
                raise NoTerminal("the host is gone")
            while (message := self.wire.find("no terminal")) is not None:
                if message["n"] == self.count:
                    raise NoTerminal("the host could not open a terminal in the guest")

    def release(self) -> None:
        """Put back what was on 0, 1 and 2, unless pytest has replaced it already."""
        if self.lender is None:
            return
        self.flush()
        if self.stream is not None:
            self.stream.reconfigure(line_buffering=False)
            self.stream = None
        lent = os.fstat(self.tty)
        for number, fd in enumerate(self.saved):
            try:
                now = os.fstat(number)
                is_lent = (now.st_dev, now.st_ino) == (lent.st_dev, lent.st_ino)
            except OSError:  # somebody has closed it
                is_lent = True
            if is_lent:
                os.dup2(fd, number)
            os.close(fd)
        for name, value in self.variables.items():
            if value is None:
                SHARED["os"].environ.pop(name, None)
            else:
                SHARED["os"].environ[name] = value
        os.close(self.tty)
        self.lender.close()
        self.lender, self.tty, self.saved, self.variables = None, -1, [], {}

    @staticmethod
    def flush() -> None:
        try:
            SHARED["sys"].stdout.flush()
            SHARED["sys"].stderr.flush()
        except (OSError, ValueError):  # the terminal is gone, or a test has closed the stream
            pass


def lend(folder: str) -> None:
    """Lend our terminal to the session, until it closes the connection.

    Signals that the terminal's keys send come to us, because it is the controlling terminal of our group.
    We pass them on.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(os.path.join(folder, TERMINAL))
    except OSError as error:
        sys.exit("no debugger waits in this guest: %s" % error)
    peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    session = int.from_bytes(peer[:4], sys.byteorder)

    def pass_on(number: int, _: object) -> None:
        try:
            os.kill(session, number)
        except ProcessLookupError:
            pass

    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    environment = os.environ
    greeting = {name: environment[name] for name in VARIABLES if name in environment}
    socket.send_fds(sock, [json.dumps(greeting).encode()], [0])
    sock.recv(1)
