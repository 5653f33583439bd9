"""The supervisor: it starts sessions, stands between them and the host, and tells how they end."""

from __future__ import annotations

import codecs
import json
import os
import select
import signal
import socket
import sys
import traceback

from . import process
from .wire import CHUNK, NICE, SOCKET, Lines

TYPE_CHECKING = False  # known to type checkers; importing typing takes long in a guest
if TYPE_CHECKING:
    from typing import Any, NoReturn

MAX_QUEUED = 8 << 20  # bytes for the host that wait; more is not read from the session
MAX_TAIL = 16_384  # bytes of what a session wrote last


class Supervisor:
    """One poll loop: the host's connection, the session's, and the session's output."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.host: socket.socket | None = None
        self.from_host = Lines()
        # Each of whole lines; a connection that breaks gets the first one again.
        self.to_host: list[bytes] = []
        self.sent = 0  # bytes of the first one
        self.pid = 0  # of the session
        self.session: socket.socket | None = None  # our end of its socket
        self.to_session = b""
        self.messages = -1  # the pipe with what it says
        self.from_session = bytearray()  # the beginning of a line
        self.has_called = False  # there may be something in the pipe
        self.outputs: dict[int, tuple[int, codecs.IncrementalDecoder]] = {}  # 1 or 2, of a pipe
        self.tail = b""
        self.live = False
        self.wake, awaken = os.pipe()
        for fd in (self.wake, awaken):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(awaken, warn_on_full_buffer=False)

    def run(self) -> NoReturn:
        while True:
            ready = self.wait()
            if self.listener.fileno() in ready:
                self.attach()
            elif self.host is not None and self.host.fileno() in ready:
                self.serve_host(ready[self.host.fileno()])
            for fd in list(self.outputs):
                if fd in ready:
                    self.take_output(fd)
            if self.session is not None and self.session.fileno() in ready:
                self.serve_session(ready[self.session.fileno()])
            if self.has_called and self.has_room:
                self.take_messages()
            if self.wake in ready:
                os.read(self.wake, CHUNK)
                self.reap()

    def wait(self) -> dict[int, int]:
        """Wait until something can be done: descriptor → events."""
        poller = select.poll()
        poller.register(self.wake, select.POLLIN)
        poller.register(self.listener, select.POLLIN)
        if self.host is not None:
            poller.register(self.host, select.POLLIN | (select.POLLOUT if self.to_host else 0))
        if self.has_room:
            for fd in self.outputs:
                poller.register(fd, select.POLLIN)
            if self.session is not None:
                events = select.POLLIN | (select.POLLOUT if self.to_session else 0)
                poller.register(self.session, events)
        return dict(poller.poll(0 if self.has_called and self.has_room else None))

    @property
    def has_room(self) -> bool:
        return sum(map(len, self.to_host)) < MAX_QUEUED

    # -- the host -----------------------------------------------------------------------------

    def attach(self) -> None:
        connection, _ = self.listener.accept()
        self.detach()  # if somebody else attaches, the former one is gone or forgotten
        connection.setblocking(False)
        self.host = connection
        # Before what waits for whoever attaches.
        self.to_host.insert(0, line({"attached": os.getpid()}))
        self.flush()

    def detach(self) -> None:
        if self.host is not None:
            self.host.close()
        self.host, self.sent, self.from_host = None, 0, Lines()

    def serve_host(self, events: int) -> None:
        if events & ~select.POLLOUT:
            data = receive(self.host)
            if data == b"":
                self.detach()
            elif data:
                for message in self.from_host.feed(data):
                    self.obey(message)
                self.flush_session()
        self.flush()

    def flush(self) -> None:
        while self.host is not None and self.to_host:
            try:
                self.sent += self.host.send(memoryview(self.to_host[0])[self.sent :])
            except BlockingIOError:
                return
            except OSError:
                self.detach()
                return
            if self.sent == len(self.to_host[0]):
                del self.to_host[0]
                self.sent = 0

    def queue(self, data: bytes) -> None:
        self.to_host.append(data)
        self.flush()

    def obey(self, data: bytes) -> None:
        message = json.loads(data)
        what = message.get("do")
        if what == "ping":
            self.queue(line({"pong": message["n"]}))
        elif what == "start":
            self.start(message["config"])
        elif what == "signal":
            self.has_called = True  # whoever is impatient hears what there is
            if self.pid and message["name"] == "DUMP":  # all stacks are the session's own affair
                os.kill(self.pid, process.DUMP)
            elif self.pid:
                self.kill(getattr(signal, "SIG" + message["name"]))
        elif self.session is not None:
            self.to_session += data + b"\n"

    # -- the session --------------------------------------------------------------------------

    def start(self, config: dict[str, Any]) -> None:
        if self.pid:
            self.kill(signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.forget()
        ours, theirs = socket.socketpair()
        messages, *pipes = os.pipe(), os.pipe(), os.pipe()
        self.tail, self.live = b"", bool(config.get("live"))
        self.pid = os.fork()
        if self.pid == 0:
            become_session(config, theirs, *(write for _, write in (messages, *pipes)))
        try:  # both do it, so that it is done
            os.setpgid(self.pid, self.pid)
        except OSError:
            pass
        theirs.close()
        for read, write in (messages, *pipes):
            os.close(write)
            os.set_blocking(read, False)
        ours.setblocking(False)
        self.session, self.messages = ours, messages[0]
        decoder = codecs.getincrementaldecoder("utf-8")
        self.outputs = {
            read: (number, decoder("replace")) for number, (read, _) in enumerate(pipes, 1)
        }

    def kill(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has gone into another group
            os.kill(self.pid, number)

    def serve_session(self, events: int) -> None:
        if events & select.POLLOUT:
            self.flush_session()
        if events & ~select.POLLOUT:
            data = receive(self.session)
            self.has_called |= data is not None
            if data == b"":
                self.hang_up()

    def flush_session(self) -> None:
        if self.session is None:
            return
        try:
            self.to_session = self.to_session[self.session.send(self.to_session) :]
        except BlockingIOError:
            pass
        except OSError:
            self.to_session = b""  # it is gone; its exit is told

    def take_messages(self) -> None:
        """Pass on what the session has said."""
        try:
            data = os.read(self.messages, CHUNK) if self.messages != -1 else b""
        except BlockingIOError:
            data = b""
        self.has_called = len(data) == CHUNK  # there may be more
        whole = data.rfind(b"\n") + 1
        if whole:
            self.queue(bytes(self.from_session) + data[:whole])
            self.from_session.clear()
        self.from_session += data[whole:]

    def take_output(self, fd: int) -> None:
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        if not data:
            os.close(fd)
            del self.outputs[fd]
            return
        self.tail = (self.tail + data)[-MAX_TAIL:]
        if self.live:
            number, decoder = self.outputs[fd]
            self.queue(line({"output": decoder.decode(data), "of": number}))

    def reap(self) -> None:
        """Tell the end of the session, if it has ended, and before that what it has said last."""
        pid, status = os.waitpid(self.pid, os.WNOHANG) if self.pid else (0, 0)
        if not pid:
            return
        # A process that it left behind may hold the ends open: no waiting.
        self.has_called = True
        while self.has_called:
            self.take_messages()
        for fd in list(self.outputs):
            for _ in range(64):
                if fd in self.outputs:
                    self.take_output(fd)
        self.forget()
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self.queue(line({"exit": code, "tail": self.tail.decode("utf-8", "replace")}))

    def forget(self) -> None:
        """Let go of all that belongs to a session that has ended."""
        self.hang_up()
        for fd in (*self.outputs, self.messages):
            if fd != -1:
                os.close(fd)
        self.outputs, self.messages = {}, -1
        self.pid, self.to_session, self.from_session = 0, b"", bytearray()

    def hang_up(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None


def become_session(config: dict[str, Any], sock: socket.socket, *pipes: int) -> NoReturn:
    """Run a session in a child of the supervisor, and end."""
    status = 70
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        status = process.run(config, sock, *pipes)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def receive(sock: socket.socket | None) -> bytes | None:
    """What has come; nothing at the end; None if there is just nothing now."""
    if sock is None:
        return None
    try:
        return sock.recv(CHUNK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def serve(folder: str) -> None:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, SOCKET)
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(4)
    print("listening", flush=True)
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    process.protect("-900")  # a session that takes all memory is killed before its supervisor
    if os.geteuid() == 0:  # who else could not give a session its share back
        os.nice(NICE)
    Supervisor(listener).run()
