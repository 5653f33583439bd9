"""A program in a guest, on a channel of its own, whatever way it is reached."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, NoReturn, Protocol, Self, cast

from pytest_vmsandbox.core.deadline import Deadline, monotonic, within
from pytest_vmsandbox.core.errors import (
    CommandError,
    CommandTimeout,
    ConfigError,
    GuestLost,
    VMSandboxError,
)
from pytest_vmsandbox.core.transport import Command, CommandResult, RemoteProcess
from pytest_vmsandbox.guests import commands

_CHUNK = 1 << 18
_ENDING_SECONDS = 0.02  # likewise, when only the ends of its streams are awaited
_CHECK_SECONDS = 0.25  # how often the guest is looked at while something is awaited
_DRAIN_SECONDS = 5.0  # how long the output of a program that has ended is waited for, at most
_SLOW_SECONDS = 0.1  # after which whoever takes the output is slow: that time does not count then
_KILL_SECONDS = 15.0
_ALIVE_SECONDS = 2.0  # a connection that outlives a program so long was not the program's end
_CAUSE_SECONDS = 10.0  # how long the cause of a broken connection is waited for
UNKNOWN_SIGNAL = 127  # the server did not tell which; OpenSSH names only some of them


class Channel(Protocol):
    """The streams of a program, and how it ended; the names are paramiko's.

    Attributes:
        eof_received: no more output will come.
        closed: nothing will go either way.
        status_event: set when it is known how the program ended, or that nobody will know.
        exit_status: how it ended; -1 where that is unknown.
        ended_by: the number of the signal that ended it, or None.
    """

    eof_received: bool
    closed: bool
    status_event: threading.Event
    exit_status: int
    ended_by: int | None

    def recv(self, size: int) -> bytes:
        """At least a byte of its output; nothing at the end; `TimeoutError` when none comes."""

    def recv_stderr(self, size: int) -> bytes:
        """Likewise of its standard error."""

    def recv_ready(self) -> bool:
        """Whether `recv` has something now."""

    def recv_stderr_ready(self) -> bool:
        """Whether `recv_stderr` has something now."""

    def send(self, data: bytes) -> int:
        """Send a part of `data`, and tell how much; `TimeoutError` when nothing can be sent."""

    def shutdown_write(self) -> None:
        """Let it find the end of its input."""


class Carrier(Protocol):
    """What a process needs of the transport that its channel is of.

    Attributes:
        quiet_seconds: after which a stream that something else holds open is done.
    """

    quiet_seconds: float

    def wait(self, channel: Any, seconds: float) -> None:
        """Wait until something has come on a channel, or it has ended, at most `seconds`."""

    def hang_up(self, channel: Any) -> None:
        """Close a channel."""

    def send_signal(self, group: int, name: str) -> None:
        """Send a signal to a process group of the guest; it may be gone already."""

    def is_current(self, channel: Any) -> bool:
        """Whether a channel is one of the connection that is in use now."""

    def has_left(self, channel: Any) -> bool:
        """Whether a channel is one of a connection that was closed here."""


class ChannelProcess:
    """A program in a guest, on a channel of its own; see `RemoteProcess`.

    Args:
        check: called often while something is awaited; raises `GuestLost`.
        group: its process group.
        early: what of its output has come already.
    """

    def __init__(
        self,
        carrier: Carrier,
        channel: Any,  # a Channel; paramiko's own has no types
        command: Command,
        *,
        check: Callable[[], None],
        group: int,
        early: bytes = b"",
    ) -> None:
        self._carrier = carrier
        self._channel = channel
        self._command = command
        self._check = check
        self._moved = monotonic()
        self._early = early
        self.group = group

    # -- all at once ----------------------------------------------------------------------------

    def communicate(
        self,
        stdin: io.BufferedIOBase | None,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        timeout: float,
        idle: float = math.inf,
    ) -> int:
        """See `RemoteProcess.communicate`."""
        if self._early:
            stdout(self._early)
            self._early = b""
        with self._feeding(stdin) as source_errors:
            try:
                status = self._pump(stdout, stderr, Deadline(timeout), idle)
            except CommandTimeout:
                if source_errors:
                    raise source_errors[0] from None
                raise
        if source_errors:
            raise source_errors[0]
        return status

    def _pump(
        self,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        deadline: Deadline,
        idle: float,
    ) -> int:
        channel = self._channel
        quiet = self._carrier.quiet_seconds
        checked = self._moved = monotonic()
        ended: float | None = None
        while True:
            got, began = False, monotonic()
            if channel.recv_ready():
                stdout(channel.recv(_CHUNK))
                got = True
            if channel.recv_stderr_ready():
                stderr(channel.recv_stderr(_CHUNK))
                got = True
            now = monotonic()
            if got:
                self._moved = now
            if ended and now - began > _SLOW_SECONDS:
                ended += now - began
            ended = ended or (now if self._has_ended() else None)
            if ended:
                over = channel.eof_received or channel.closed or now - self._moved > quiet
                if (over and not got) or now - ended > _DRAIN_SECONDS:
                    return self._status()
            elif deadline.expired:
                self._kill(f"did not end in {deadline.seconds:g} s", deadline.seconds)
            elif now - self._moved > idle:
                self._kill(f"neither took nor gave anything for {idle:g} s", idle)
            if now - checked > _CHECK_SECONDS:
                self._check()
                checked = now
            if got:
                continue
            self._carrier.wait(
                channel, deadline.remaining(_ENDING_SECONDS if ended else _CHECK_SECONDS)
            )

    def _kill(self, why: str, seconds: float) -> NoReturn:
        self._try_to_kill()
        raise CommandTimeout(f"{self._command.argv[0]} {why} and was killed", seconds=seconds)

    def _try_to_kill(self) -> None:
        """Kill it if the guest still takes orders; if not, that is not the news."""
        with suppress(VMSandboxError, OSError):
            within(_KILL_SECONDS, lambda: self.signal("KILL"))

    @contextmanager
    def _feeding(self, stdin: io.BufferedIOBase | None) -> Iterator[list[Exception]]:
        """Send `stdin` from a thread of its own, which is gone at the end."""
        errors: list[Exception] = []
        if stdin is None:
            self._channel.shutdown_write()
            yield errors
            return

        def feed() -> None:
            while True:
                try:
                    data = stdin.read(_CHUNK)
                except Exception as error:  # noqa: BLE001  # of the caller's stream: theirs to see
                    errors.append(error)
                    self._try_to_kill()  # it must not take what came so far for all
                    return
                try:
                    if not data:
                        self._channel.shutdown_write()
                        return
                    self.send(data)
                except (OSError, EOFError, VMSandboxError):
                    return  # it ended without reading all, or is lost: whoever waits is told

        thread = threading.Thread(target=feed, name="vmsandbox-stdin", daemon=True)
        thread.start()
        try:
            yield errors
        finally:
            self._carrier.hang_up(self._channel)  # also ends a send that waits for a reader
            thread.join()

    def send(self, data: bytes, timeout: float = math.inf) -> None:
        """See `RemoteProcess.send`."""
        deadline = Deadline(timeout)
        view = memoryview(data)
        while view:
            try:
                view = view[self._channel.send(view) :]
                self._moved = monotonic()
            except TimeoutError:
                self._check()
                if self._has_ended():
                    raise BrokenPipeError("the program has ended") from None
                if deadline.expired:
                    raise

    def receive(self, timeout: float) -> bytes:
        """See `RemoteProcess.receive`."""
        if self._early:
            early, self._early = self._early, b""
            return early
        return self.read(self._channel.recv, _CHUNK, timeout)

    def read(self, recv: Callable[[int], bytes], size: int, timeout: float = math.inf) -> bytes:
        """Read what there is of a stream, at least a byte; nothing at its end.

        Raises:
            TimeoutError: nothing came within `timeout` seconds.
            GuestLost: the guest is gone.
        """
        deadline = Deadline(timeout)
        while True:
            try:
                return recv(size)
            except TimeoutError:
                self._check()
                if deadline.expired:
                    raise

    def end_input(self) -> None:
        """Let it find the end of its standard input; nothing happens if it is gone."""
        if not self._channel.closed:
            with suppress(VMSandboxError, OSError, EOFError):
                self._channel.shutdown_write()

    # -- step by step ---------------------------------------------------------------------------

    def poll(self) -> int | None:
        """See `RemoteProcess.poll`."""
        return self._status() if self._has_ended() else None

    def wait(self, timeout: float) -> int:
        """See `RemoteProcess.wait`."""
        deadline = Deadline(timeout)
        while not self._has_ended():
            self._check()
            self._channel.status_event.wait(deadline.remaining(_CHECK_SECONDS))
            if deadline.expired and not self._has_ended():
                raise CommandTimeout(
                    f"{self._command.argv[0]} still runs after {timeout:g} s",
                    seconds=timeout,
                    remedy="it was left running; .terminate() or .kill() ends it",
                )
        return self._status()

    def signal(self, name: str) -> None:
        """See `RemoteProcess.signal`."""
        if not self._has_ended():
            self._carrier.send_signal(self.group, name)

    @property
    def stdin(self) -> io.BufferedIOBase:
        """See `RemoteProcess.stdin`."""
        return _BufferedWriter(_Writer(self), _CHUNK)

    @property
    def stdout(self) -> io.BufferedIOBase:
        """See `RemoteProcess.stdout`."""
        early, self._early = self._early, b""
        return io.BufferedReader(_Reader(self, self._channel.recv, early), _CHUNK)

    @property
    def stderr(self) -> io.BufferedIOBase:
        """See `RemoteProcess.stderr`."""
        return io.BufferedReader(_Reader(self, self._channel.recv_stderr, b""), _CHUNK)

    def close(self) -> None:
        """See `RemoteProcess.close`."""
        self._carrier.hang_up(self._channel)

    def _has_ended(self) -> bool:
        return bool(self._channel.status_event.is_set())

    def _status(self) -> int:
        if self._channel.ended_by is not None:
            return -int(self._channel.ended_by)
        if self._channel.exit_status == -1:  # the channel closed without a word
            deadline = Deadline(_CAUSE_SECONDS)
            while not deadline.expired:  # a guest that goes down closes its connections first
                self._check()
                if self._carrier.has_left(self._channel):
                    break
                if self._carrier.is_current(self._channel) and deadline.elapsed > _ALIVE_SECONDS:
                    return -UNKNOWN_SIGNAL  # the connection is well: it was the program
                deadline.pause(_CHECK_SECONDS)
            raise GuestLost(
                "the connection broke while a program ran",
                stage="ssh",
                remedy="did the guest restart? Restarted by vm.reboot(), it is waited for",
            )
        return int(self._channel.exit_status)


def cannot_log_in(user: str) -> ConfigError:
    """A user of guests who does not exist in one."""
    return ConfigError(
        f"{user} cannot log in to the guest", remedy="name a user that exists in the guest"
    )


def could_not_start(
    command: Command, status: int, stdout: bytes, stderr: bytes, started: float
) -> CommandError:
    """A command whose folder or user does not exist."""
    result = CommandResult(
        argv=command.argv,
        returncode=status,
        stdout=stdout.decode(errors="replace"),
        stderr=stderr.decode(errors="replace"),
        duration=monotonic() - started,
    )
    what = f"{command.argv[0]} could not be started"
    if command.user is not None:
        what += f" as {command.user}"
    if command.cwd is not None:
        what += f" in {command.cwd}"
    return CommandError(
        what, result=result, remedy="check that the folder and the user exist in the guest"
    )


class _Reader(io.RawIOBase):
    """An output stream of a program."""

    def __init__(self, process: ChannelProcess, recv: Callable[[int], bytes], early: bytes) -> None:
        self._process = process
        self._recv = recv
        self._early = early

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._early:
            data, self._early = self._early[: len(buffer)], self._early[len(buffer) :]
        else:
            data = self._process.read(self._recv, len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Droppable(io.IOBase):
    """A stream that does nothing when it is dropped without having been closed.

    A file would write what it has buffered, and close itself. But the guest may be gone by then, and
    a finalizer must not fail; nor must it wait for a guest, on whichever thread it happens to run.
    """

    def __del__(self) -> None:
        pass


class TextWriter(_Droppable, io.TextIOWrapper):
    """The input stream of a program, as text."""


class _BufferedWriter(_Droppable, io.BufferedWriter):
    pass


class _Writer(_Droppable, io.RawIOBase):
    """The input stream of a program."""

    def __init__(self, process: ChannelProcess) -> None:
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
    """A program that was started and left running; made by `Guest.popen`.

    Attributes:
        argv: the program and its arguments.
        stdin, stdout, stderr: its streams, text or bytes as `popen` was told.
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

    def poll(self) -> int | None:
        """Its exit status (−N: signal N), or None while it runs."""
        return self._remote.poll()

    def wait(self, timeout: float) -> int:
        """Wait for its end, at most `timeout` seconds; its exit status.

        Raises:
            CommandTimeout: it still runs, and is left running.
        """
        return self._remote.wait(commands.seconds(timeout))

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
