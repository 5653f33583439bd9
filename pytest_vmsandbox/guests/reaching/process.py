"""A program in a guest, on a channel of its own, by helper or by SSH."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, NoReturn, Protocol, Self, cast

from pytest_vmsandbox.core.deadline import Deadline, monotonic, within
from pytest_vmsandbox.core.errors import CommandTimeout, GuestLost, VMSandboxError
from pytest_vmsandbox.guests.reaching.commands import Command, Sink, seconds

if TYPE_CHECKING:
    from _typeshed import SupportsRead

_CHUNK = 1 << 18
_ENDING_SECONDS = 0.02  # how often we look when we only wait for the ends of its streams
_CHECK_SECONDS = 0.25  # how often we check the guest while we wait
_DRAIN_SECONDS = 5.0  # the longest time that we wait for output of a program that has ended
_SLOW_SECONDS = 0.1  # the time of a slower reader of the output does not count
_KILL_SECONDS = 15.0
_ALIVE_SECONDS = 2.0  # a connection that outlives a program by this was not the cause of its end
_CAUSE_SECONDS = 10.0  # how long we wait for the cause of a broken connection
UNKNOWN_SIGNAL = 127  # the server did not say which one; OpenSSH names only some signals


STDOUT, STDERR = 1, 2


class Channel(Protocol):
    """The streams of one program in a guest, and how it ended; each way into a guest has its own.

    Attributes:
        quiet_seconds: without output, after which we stop reading a stream that another program holds
            open.
    """

    quiet_seconds: float

    @property
    def pid(self) -> int | None:
        """Its process id in the guest; None if it is unknown."""

    @property
    def output_ended(self) -> bool:
        """Whether no more output will come."""

    @property
    def ended(self) -> bool:
        """Whether the program's end is known, or will never be known."""

    @property
    def status(self) -> int | None:
        """Its exit status (−N: signal N); None if it is unknown."""

    @property
    def is_connected(self) -> bool:
        """Whether it belongs to the current connection, which works."""

    @property
    def was_left(self) -> bool:
        """Whether it belongs to a connection that this side has closed."""

    def has_output(self, stream: int) -> bool:
        """Whether `receive` has something of `STDOUT` or `STDERR` now."""

    def receive(self, stream: int, size: int) -> bytes:
        """At least a byte of a stream; nothing at its end; `TimeoutError` when none comes soon."""

    def send(self, data: memoryview) -> int:
        """Send a part of `data`. Returns the number of bytes; `TimeoutError` if none can be sent soon."""

    def end_input(self) -> None:
        """Close the program's input."""

    def wait(self, seconds: float) -> None:
        """Wait at most `seconds` for output, or for the program's end."""

    def wait_for_end(self, seconds: float) -> None:
        """Wait until the program has ended, at most `seconds`."""

    def signal(self, name: str) -> None:
        """Send a signal to the program's process group, which may be gone already."""

    def close(self) -> None:
        """Forget the program."""


class RemoteProcess:
    """A program in a guest, on a channel of its own. Its starter must close it.

    Args:
        check: called often while we wait; raises `GuestLost`.

    Attributes:
        command: what was started.
    """

    def __init__(self, channel: Channel, command: Command, *, check: Callable[[], None]) -> None:
        self._channel = channel
        self.command = command
        self._check = check
        self._moved = monotonic()

    # -- all at once ----------------------------------------------------------------------------

    def communicate(
        self,
        stdin: SupportsRead[bytes] | None,
        stdout: Sink,
        stderr: Sink,
        timeout: float,
        idle: float = math.inf,
    ) -> int:
        """Feed `stdin`, pass on the output, and return the exit status (−N: signal N).

        Raises:
            CommandTimeout: it did not end within `timeout` seconds, or there was no input or output for
                `idle` seconds. Its process group was killed.
            GuestLost: the guest or the connection to it is gone.
        """
        with self._feeding(stdin):
            return self._pump(stdout, stderr, Deadline(timeout), idle)

    def _pump(self, stdout: Sink, stderr: Sink, deadline: Deadline, idle: float) -> int:
        channel = self._channel
        checked = self._moved = monotonic()
        ended: float | None = None
        while True:
            got, began = False, monotonic()
            for stream, take in ((STDOUT, stdout), (STDERR, stderr)):
                if channel.has_output(stream):
                    take(channel.receive(stream, _CHUNK))
                    got = True
            now = monotonic()
            if got:
                self._moved = now
            if ended and now - began > _SLOW_SECONDS:
                ended += now - began
            ended = ended or (now if channel.ended else None)
            if ended:
                over = channel.output_ended or now - self._moved > channel.quiet_seconds
                if (over and not got) or now - ended > _DRAIN_SECONDS:
                    return self._status()
            elif deadline.expired:
                self._kill(f"did not end within {deadline.seconds:g} s", deadline.seconds)
            elif now - self._moved > idle:
                self._kill(f"had no input or output for {idle:g} s", idle)
            if now - checked > _CHECK_SECONDS:
                self._check()
                checked = now
            if got:
                continue
            channel.wait(deadline.remaining(_ENDING_SECONDS if ended else _CHECK_SECONDS))

    def _kill(self, why: str, seconds: float) -> NoReturn:
        self._try_to_kill()
        raise CommandTimeout(f"{self.command.argv[0]} {why} and was killed", seconds=seconds)

    def _try_to_kill(self) -> None:
        """Kill it, and ignore errors if the guest does not answer."""
        with suppress(VMSandboxError, OSError):
            within(_KILL_SECONDS, lambda: self.signal("KILL"))

    @contextmanager
    def _feeding(self, stdin: SupportsRead[bytes] | None) -> Iterator[None]:
        """Send `stdin` from a thread, which is gone at the end. An error while reading is raised then."""
        if stdin is None:
            self._channel.end_input()
            yield
            return
        errors: list[Exception] = []

        def read() -> bytes:
            try:
                return stdin.read(_CHUNK)
            except Exception as error:  # noqa: BLE001  # from the caller's stream
                errors.append(error)
                self._try_to_kill()  # it must not treat incomplete input as complete
                return b""

        def feed() -> None:
            # The program may end without reading everything, or be lost. Others report that.
            with suppress(OSError, EOFError, VMSandboxError):
                while data := read():
                    self.send(data)
                if not errors:
                    self._channel.end_input()

        thread = threading.Thread(target=feed, name="vmsandbox-stdin", daemon=True)
        thread.start()
        try:
            yield
        except CommandTimeout:
            if not errors:
                raise
        finally:
            self._channel.close()  # also ends a blocked send
            thread.join()
        if errors:
            raise errors[0]

    def send(self, data: bytes, timeout: float = math.inf) -> None:
        """Write all of `data` to its standard input.

        Raises:
            TimeoutError: it did not take all of it within `timeout` seconds.
            OSError: it ended, or the connection is gone.
            GuestLost: the guest is gone.
        """
        deadline = Deadline(timeout)
        view = memoryview(data)
        while view:
            try:
                view = view[self._channel.send(view) :]
                self._moved = monotonic()
            except TimeoutError:
                self._check()
                if self._channel.ended:
                    raise BrokenPipeError("the program has ended") from None
                if deadline.expired:
                    raise

    def receive(self, timeout: float) -> bytes:
        """Read standard output: at least one byte; nothing at its end.

        Raises:
            TimeoutError: nothing came within `timeout` seconds.
            GuestLost: the guest is gone.
        """
        return self.read(STDOUT, _CHUNK, timeout)

    def read(self, stream: int, size: int, timeout: float = math.inf) -> bytes:
        """Read a stream: at least one byte; nothing at its end.

        Raises:
            TimeoutError: nothing came within `timeout` seconds.
            GuestLost: the guest is gone.
        """
        deadline = Deadline(timeout)
        while True:
            try:
                return self._channel.receive(stream, size)
            except TimeoutError:
                self._check()
                if deadline.expired:
                    raise

    def end_input(self) -> None:
        """Close its standard input. Does nothing if it is gone."""
        with suppress(VMSandboxError, OSError, EOFError):
            self._channel.end_input()

    # -- step by step ---------------------------------------------------------------------------

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._status() if self._channel.ended else None

    def wait(self, timeout: float) -> int:
        """Wait for its end and return the exit status.

        Raises:
            CommandTimeout: it still runs after `timeout` seconds. It is left running.
        """
        deadline = Deadline(timeout)
        while not self._channel.ended:
            self._check()
            self._channel.wait_for_end(deadline.remaining(_CHECK_SECONDS))
            if deadline.expired and not self._channel.ended:
                raise CommandTimeout(
                    f"{self.command.argv[0]} still runs after {timeout:g} s",
                    seconds=timeout,
                    remedy="wait longer, or end it with .terminate() or .kill(). It was left running",
                )
        return self._status()

    @property
    def pid(self) -> int | None:
        """Its process id in the guest; None if it is unknown."""
        return self._channel.pid

    def signal(self, name: str) -> None:
        """Send a signal, such as ``"TERM"``, to its process group."""
        if not self._channel.ended:
            self._channel.signal(name)

    @property
    def stdin(self) -> io.BufferedIOBase:
        """Its standard input, to write to and close."""
        return _BufferedWriter(_Writer(self), _CHUNK)

    @property
    def stdout(self) -> io.BufferedIOBase:
        """Its standard output, to read."""
        return io.BufferedReader(_Reader(self, STDOUT), _CHUNK)

    @property
    def stderr(self) -> io.BufferedIOBase:
        """Its standard error, to read."""
        return io.BufferedReader(_Reader(self, STDERR), _CHUNK)

    def close(self) -> None:
        """Forget it. A program that still runs is left running."""
        self._channel.close()

    def _status(self) -> int:
        if (status := self._channel.status) is not None:
            return status
        deadline = Deadline(_CAUSE_SECONDS)
        while not deadline.expired:  # a guest that shuts down closes its connections first
            self._check()
            if self._channel.was_left:
                break
            if self._channel.is_connected and deadline.elapsed > _ALIVE_SECONDS:
                return -UNKNOWN_SIGNAL  # the connection works, so a signal ended the program
            deadline.pause(_CHECK_SECONDS)
        raise GuestLost(
            "the connection to the guest broke while a program ran",
            stage="ssh",
            remedy="if the program restarts the guest, use vm.reboot(), which waits for it",
        )


class _Reader(io.RawIOBase):
    """An output stream of a program."""

    def __init__(self, process: RemoteProcess, stream: int) -> None:
        self._process = process
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._process.read(self._stream, len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Droppable(io.IOBase):
    """A stream that does nothing when it is garbage-collected without being closed.

    Other files write their buffer and close themselves. But the guest may be gone by then. A finalizer
    must neither fail nor wait for a guest.
    """

    def __del__(self) -> None:
        pass


class TextWriter(_Droppable, io.TextIOWrapper):
    """The input stream of a program, as text."""


class _BufferedWriter(_Droppable, io.BufferedWriter):
    pass


class _Writer(_Droppable, io.RawIOBase):
    """The input stream of a program."""

    def __init__(self, process: RemoteProcess) -> None:
        self._process = process

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._process.send(bytes(data))
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._process.end_input()


class Process:
    """A program that was started and left running. `Guest.popen` makes it.

    As a context manager it kills the program at its end, if it still runs.

    Attributes:
        argv: the program and its arguments.
        stdin: its standard input, to write to and close; text, or bytes with ``text=False``.
        stdout: its standard output, to read.
        stderr: its standard error, to read.
    """

    def __init__(self, remote: RemoteProcess, argv: tuple[str, ...], *, text: bool) -> None:
        self._remote = remote
        self.argv = argv
        self.stdin = cast("IO[Any]", remote.stdin)
        self.stdout = cast("IO[Any]", remote.stdout)
        self.stderr = cast("IO[Any]", remote.stderr)
        if text:
            self.stdin = TextWriter(self.stdin, encoding="utf-8", write_through=True)
            self.stdout = io.TextIOWrapper(self.stdout, encoding="utf-8", errors="replace")
            self.stderr = io.TextIOWrapper(self.stderr, encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int | None:
        """Its process id in the guest; None without a helper in the guest."""
        return self._remote.pid

    def poll(self) -> int | None:
        """Its exit status (−N: signal N), or None while it runs."""
        return self._remote.poll()

    def wait(self, timeout: float) -> int:
        """Wait until it ends, at most ``timeout`` seconds, and return its exit status.

        Raises:
            CommandTimeout: it still runs, and is left running.
        """
        return self._remote.wait(seconds(timeout))

    def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        self._remote.signal("TERM")

    def kill(self) -> None:
        """Send SIGKILL to its process group."""
        self._remote.signal("KILL")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            self.kill()
        self._remote.close()
