"""The supervisor: it starts sessions, relays between them and the host, and reports how they end."""

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

MAX_QUEUED = 8 << 20  # bytes that wait for the host; beyond this we do not read from the session
MAX_TAIL = 16_384  # bytes of a session's last output


class Supervisor:
    """One poll loop: the host's connection, the session's, and the session's output."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.host: socket.socket | None = None
        self.from_host = Lines()
        # Each entry has whole lines. After a broken connection, the first entry is sent again.
        self.to_host: list[bytes] = []
        self.sent = 0  # bytes of the first entry
        self.pid = 0  # of the session
        self.session: socket.socket | None = None  # our end of its socket
        self.to_session = b""
        self.messages = -1  # the pipe with its messages
        self.from_session = bytearray()  # the beginning of a line
        self.has_called = False  # whether there may be something in the pipe
        self.outputs: dict[int, tuple[int, codecs.IncrementalDecoder]] = {}  # 1 or 2, of a pipe
        self.tail = b""
        self.live = False
        self.wake, awaken = os.pipe2(os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(awaken, warn_on_full_buffer=False)

    def run(self) -> None:
        while True:
            ready = self.wait()
            if self.listener in ready:
                self.attach()
            elif self.host in ready:
                self.hear_host()
            for fd in list(self.outputs):
                if fd in ready:
                    self.take_output(fd)
            if self.session in ready:
                self.hear_session()
            if self.has_called and self.has_room:
                self.take_messages()
            if self.wake in ready:
                os.read(self.wake, CHUNK)
                self.reap()
            self.flush_host()
            self.flush_session()

    def wait(self) -> list[int | socket.socket]:
        """Wait until something can be done. Returns what can be read."""
        reads: list[int | socket.socket] = [self.wake, self.listener]
        writes = [self.host] if self.host is not None and self.to_host else []
        if self.host is not None:
            reads.append(self.host)
        if self.has_room:
            reads += self.outputs
            if self.session is not None:
                reads.append(self.session)
                writes += [self.session] if self.to_session else []
        now = self.has_called and self.has_room
        return select.select(reads, writes, [], 0 if now else None)[0]

    @property
    def has_room(self) -> bool:
        return sum(map(len, self.to_host)) < MAX_QUEUED

    # -- the host -----------------------------------------------------------------------------

    def attach(self) -> None:
        connection, _ = self.listener.accept()
        self.detach()  # if there is an older connection, it is gone or forgotten
        connection.setblocking(False)
        self.host = connection
        # Before other messages that wait for the host.
        self.to_host.insert(0, line({"attached": os.getpid()}))

    def detach(self) -> None:
        if self.host is not None:
            self.host.close()
        self.host, self.sent, self.from_host = None, 0, Lines()

    def hear_host(self) -> None:
        data = receive(self.host)
        for message in self.from_host.feed(data):
            self.obey(message)
        if not data:
            self.detach()

    def flush_host(self) -> None:
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

    def obey(self, data: bytes) -> None:
        message = json.loads(data)
        what = message.get("do")
        if what == "ping":
            self.to_host.append(line({"pong": message["n"]}))
        elif what == "start":
            self.start(message["config"])
        elif what == "signal":
            self.has_called = True  # the host is impatient, so send it what there is
            if self.pid and message["name"] == "DUMP":  # only the session itself writes its stacks
                os.kill(self.pid, process.DUMP)
            elif self.pid:
                self.kill(getattr(signal, "SIG" + message["name"]))
        elif self.session is not None:
            self.to_session += data + b"\n"

    # -- the session --------------------------------------------------------------------------

    def start(self, config: dict[str, object]) -> None:
        if self.pid:
            self.kill(signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.forget()
        ours, theirs = socket.socketpair()
        pipes = [os.pipe() for _ in range(3)]
        self.tail, self.live = b"", bool(config.get("live"))
        self.pid = os.fork()
        if self.pid == 0:
            become_session(config, theirs, *(write for _, write in pipes))
        theirs.close()
        for read, write in pipes:
            os.close(write)
            os.set_blocking(read, False)
        ours.setblocking(False)
        self.session = ours
        self.messages, *outputs = (read for read, _ in pipes)
        decoder = codecs.getincrementaldecoder("utf-8")
        self.outputs = {fd: (number, decoder("replace")) for number, fd in enumerate(outputs, 1)}

    def kill(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it is not in its group yet, or has changed its group
            os.kill(self.pid, number)

    def hear_session(self) -> None:
        self.has_called = True
        if not receive(self.session):
            self.hang_up()

    def flush_session(self) -> None:
        if self.session is None or not self.to_session:
            return
        try:
            self.to_session = self.to_session[self.session.send(self.to_session) :]
        except BlockingIOError:
            pass
        except OSError:
            self.to_session = b""  # it is gone; we report its exit

    def take_messages(self) -> None:
        """Pass on messages of the session."""
        try:
            data = os.read(self.messages, CHUNK) if self.messages != -1 else b""
        except BlockingIOError:
            data = b""
        self.has_called = len(data) == CHUNK  # there may be more
        whole = data.rfind(b"\n") + 1
        if whole:
            self.to_host.append(bytes(self.from_session) + data[:whole])
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
            self.to_host.append(line({"output": decoder.decode(data), "of": number}))

    def reap(self) -> None:
        """If the session has ended, report its last messages and its end."""
        pid, status = os.waitpid(self.pid, os.WNOHANG) if self.pid else (0, 0)
        if not pid:
            return
        # Do not wait: a process that it left behind may hold the pipes open.
        self.has_called = True
        while self.has_called:
            self.take_messages()
        for fd in list(self.outputs):
            for _ in range(64):
                if fd in self.outputs:
                    self.take_output(fd)
        self.forget()
        code, tail = os.waitstatus_to_exitcode(status), self.tail.decode("utf-8", "replace")
        self.to_host.append(line({"exit": code, "tail": tail}))

    def forget(self) -> None:
        """Forget everything about a session that has ended."""
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


def become_session(config: dict[str, object], sock: socket.socket, *pipes: int) -> None:
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


def line(message: dict[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def receive(sock: socket.socket | None) -> bytes:
    """The bytes that have arrived; nothing at the end."""
    assert sock is not None
    try:
        return sock.recv(CHUNK)
    except OSError:
        return b""


def serve(folder: str) -> None:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, SOCKET))
    listener.listen(4)
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    process.protect("-900")  # if memory runs out, the session is killed before its supervisor
    if os.geteuid() == 0:  # only root can give a session its normal priority back
        os.nice(NICE)
    Supervisor(listener).run()


def attach(folder: str) -> None:
    """Relay standard input and output, for a host that cannot connect to sockets in the guest."""
    os.nice(NICE)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.path.join(folder, SOCKET))
    ends: list[int | socket.socket] = [0, sock]
    while True:
        for end in select.select(ends, [], [])[0]:
            if end == 0:
                data = os.read(0, CHUNK)
                sock.sendall(data)
            else:
                data = sock.recv(CHUNK)
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            if not data:
                return
