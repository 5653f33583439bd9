"""Processes that the launcher starts and owns. It outlives this process, and ends them then."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import LaunchError, TeardownError

_STDERR_TAIL = 8_192  # bytes
_MAX_DESCRIPTORS = 253  # of one message
_REAP_SECONDS = 10.0  # a killed process that is not gone by then is stuck in the kernel


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The user that a process runs as: ids of user, group and further groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class LauncherError(LaunchError):
    """The launcher is gone, or could not start a program. The program is not to blame."""


def was_killed(status: int) -> bool:
    """Whether a signal from outside of the guest killed QEMU. Its own sandbox does not count."""
    return status < 0 and -status != signal.SIGSYS


def status_text(status: int) -> str:
    """How a process ended, for people."""
    if status >= 0:
        return f"exit status {status}"
    hint = " (its -sandbox forbids a system call)" if -status == signal.SIGSYS else ""
    name = signal.Signals(-status).name
    hint = " (an out-of-memory kill, or a kill from outside)" if name == "SIGKILL" else hint
    return f"signal {name}{hint}"


@dataclass(eq=False, repr=False)
class OwnedProcess:
    """A process that the launcher has started. `Launcher.spawn` makes and ends it.

    Attributes:
        argv: its command line.
        pid: its process id.
    """

    argv: tuple[str, ...]
    _launcher: Launcher
    _parent: subprocess.Popen[bytes]  # a launcher; the next process may have another one
    _number: int
    _status: int
    _stderr: IO[bytes]
    pid: int = 0
    _lines: bytes = b""
    _tail: str | None = None  # known at the end; until then it is in the file
    _returncode: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stops: int = 0
    _stopping: threading.Lock = field(default_factory=threading.Lock)

    def _await_start(self) -> None:
        message = self._read(Deadline(_REAP_SECONDS))
        if message is None or "pid" not in message:
            reason = "did not answer" if message is None else "is gone"
            raise LauncherError(
                f"{self.argv[0]} could not be started: the launcher process {reason}",
                remedy="this machine may be overloaded, or something killed the launcher: look for an "
                "out-of-memory kill",
                transient=True,
            )
        self.pid = int(message["pid"])

    def wait(self, timeout: float) -> int | None:
        """The exit status (−N: signal N), or None if it still runs after `timeout` seconds."""
        deadline = Deadline(timeout)
        if not self._lock.acquire(timeout=deadline.remaining()):  # another thread is waiting
            return self._returncode
        try:
            while self._returncode is None and self._tail is None:
                message = self._read(deadline)
                if message is None:
                    return None
                self._returncode = int(message["exit"])
            return self._returncode
        finally:
            self._lock.release()

    def _read(self, deadline: Deadline) -> dict[str, Any] | None:
        while b"\n" not in self._lines:
            poller = select.poll()
            poller.register(self._status, select.POLLIN)
            if not poller.poll(deadline.remaining() * 1000):
                return None
            data = os.read(self._status, 4096)
            if not data:  # the launcher is gone, and its children with it
                # Its descriptors close a moment before it ends. Wait for its end, or the next process
                # would still be sent to it.
                with suppress(subprocess.TimeoutExpired):
                    self._parent.wait(_REAP_SECONDS)
                return {"exit": -9}
            self._lines += data
        line, _, self._lines = self._lines.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise LauncherError(f"{self.argv[0]} could not be started: {message['error']}")
        return message

    def signal(self, number: int) -> None:
        """Send a signal. Does nothing if the process is gone."""
        with suppress(LaunchError):  # the launcher is gone, and took the process with it
            self._launcher.send({"id": self._number, "signal": number})

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop it while this lasts. If several do so, it goes on when the last one has ended."""
        with self._stopping:
            self._stops += 1
            if self._stops == 1:
                self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            with self._stopping:
                self._stops -= 1
                if self._stops == 0:
                    self.signal(signal.SIGCONT)

    @property
    def stderr_tail(self) -> str:
        """The last lines of what it wrote to its standard error (and output)."""
        if self._tail is not None:
            return self._tail
        fd = self._stderr.fileno()
        start = max(0, os.fstat(fd).st_size - _STDERR_TAIL)
        # The process shares this file's position, so we must not move it.
        return os.pread(fd, _STDERR_TAIL, start).decode(errors="replace")


class Launcher:
    """This process's side of the launcher. Each process that runs guests has one.

    The launcher runs as long as the context. At the end, it and everything that it owns is killed. If
    something kills it, its guests die, too, and the next guest gets a new launcher.

    Args:
        folder: of the run. The launcher removes it when this process is gone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._count = 0
        self._control, self._process = self._start()

    def __enter__(self) -> Self:
        return self

    def _start(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = Path(__file__).with_name("launcher.py")
        arguments = [str(theirs.fileno()), str(os.getpid()), str(self._folder)]
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(program), *arguments],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C in our terminal is not for it
                    cwd="/",
                )
            except BaseException:
                ours.close()
                raise
        return ours, process

    def __exit__(self, *_: object) -> None:
        with self._control:
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            self._process.wait()
            raise TeardownError(
                f"the launcher process did not end within {_REAP_SECONDS:g} s, and was killed",
                remedy="run 'vmsandbox clean' to remove what may be left",
            ) from error

    @contextmanager
    def spawn(
        self,
        argv: Sequence[str],
        *,
        fds: Mapping[int, int],
        env: Mapping[str, str],
        identity: Identity | None = None,
        small_pages: bool = False,
    ) -> Iterator[OwnedProcess]:
        """Start a process. At the end it is killed, if it still runs, and reaped.

        Args:
            argv: absolute path of the program, and its arguments.
            fds: its descriptors: its number → ours.
            env: its whole environment.
            identity: the user that it runs as; None for this process's user.
            small_pages: whether to turn off huge pages, which take more memory than it uses.

        Raises:
            LaunchError: it could not be started.
            TeardownError: it could not be killed.
        """
        status_read, status_write = os.pipe2(os.O_CLOEXEC)
        with tempfile.TemporaryFile() as stderr, os.fdopen(status_read, "rb", buffering=0):
            given = {1: stderr.fileno(), 2: stderr.fileno(), **fds}
            with self._lock:
                if self._process.poll() is not None:  # something has killed it
                    self._control.close()
                    self._control, self._process = self._start()
                self._count += 1
                number, parent = self._count, self._process
            process = OwnedProcess(tuple(argv), self, parent, number, status_read, stderr)
            try:
                self.send(
                    {
                        "spawn": number,
                        "argv": list(argv),
                        "fds": list(given),
                        "env": dict(env),
                        "identity": asdict(identity) if identity else None,
                        "small_pages": small_pages,
                    },
                    [status_write, *given.values()],
                )
            finally:
                os.close(status_write)
            try:
                process._await_start()  # noqa: SLF001  # ours, just above
                yield process
            finally:
                process.signal(9)
                try:
                    if process.pid and process.wait(_REAP_SECONDS) is None:
                        raise TeardownError(
                            f"process {process.pid} ({argv[0]}) does not end after SIGKILL",
                            remedy="it is stuck in the kernel: check this machine's disks, or restart it",
                        )
                finally:
                    # Its files are closed next: keep the end of its output.
                    process._tail = process.stderr_tail  # noqa: SLF001  # likewise

    def check(self) -> None:
        """Check that the launcher is still there.

        Raises:
            LauncherError: it is gone.
        """
        self.send({"id": 0, "signal": 0})  # ids of processes begin at 1

    def send(self, message: object, fds: Sequence[int] = ()) -> None:
        """Send a message and descriptors, in the protocol of `launcher.py`.

        Raises:
            LauncherError: the launcher is gone.
        """
        with self._lock:
            try:
                while len(fds) > _MAX_DESCRIPTORS:
                    socket.send_fds(self._control, [b'{"more": true}'], fds[:_MAX_DESCRIPTORS])
                    fds = fds[_MAX_DESCRIPTORS:]
                socket.send_fds(self._control, [json.dumps(message).encode()], fds)
            except OSError as error:
                raise LauncherError(
                    "the launcher process is gone, and with it all guests",
                    details=str(error),
                    remedy="something killed the launcher process: look for an out-of-memory kill",
                    transient=True,
                ) from error
