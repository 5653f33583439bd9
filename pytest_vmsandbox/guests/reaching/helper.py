"""Our side of the resident helper in a guest. It starts programs without the network.

The helper waits on a serial port of the guest (``images/helper/helper.c``, which describes the protocol).
So the first program needs no connection, and we can talk to a clone at once. The guest is not trusted:
we check what it sends, and limit its size.
"""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import signal
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pytest_vmsandbox.core.deadline import Deadline, wall
from pytest_vmsandbox.core.errors import CommandError, CommandResult, GuestLost, VMSandboxError
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.reaching import commands
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.reaching.process import STDERR, STDOUT, UNKNOWN_SIGNAL, RemoteProcess
from pytest_vmsandbox.machine.port import Port

VERSION = 1
_HEAD = struct.Struct("<IBI")  # length of what follows it, kind, channel
_MAX_PAYLOAD = 65_536
_WINDOW = 1 << 20  # bytes of an output stream that may be on their way
_TELL = 1 << 18  # bytes of output that we read before we tell the helper
_INPUT_WINDOW = 65_536
_MAX_SKIPPED = 4 << 20
_LOOK_SECONDS = 0.25  # how often we check the guest while we wait
_SEND_SECONDS = 30.0
_SILENT_SECONDS = 3.0
_NO_USER, _NO_FOLDER, _NO_PROGRAM, _NO_ROOM = 1, 2, 3, 4  # stages of a start that failed
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # what shells return
_NONSENSE = "the helper in the guest sent an invalid answer"
_LATEST = 1 << 34  # seconds since 1970; no clock of Linux goes so far


class Helper:
    """The helper of one machine.

    Args:
        port: the guest's port that the helper listens on.
        check: called often while we wait; raises `GuestLost` if the guest is gone.
        patience: seconds for an answer.
        quiet_seconds: see `Channel`.

    Attributes:
        lead: by how much the guest's clock must be ahead of this host's.
        is_frozen: whether a fault keeps the guest's CPUs from running, so no answer comes.
        sleeps: whether the guest is suspended, so no answer comes either.
        changed: is notified when anything arrives.
        returned: called when another one says hello in the same machine.
    """

    def __init__(
        self, port: Port, *, check: Callable[[], None], patience: float, quiet_seconds: float
    ) -> None:
        self.quiet_seconds = quiet_seconds
        self.check = check
        self.patience = patience
        self.lead = Lead()
        self.is_frozen = False
        self.sleeps: Callable[[], bool] = lambda: False
        self._port = port
        self.changed = threading.Condition()
        self.returned: Callable[[], None] = lambda: None
        self._numbers = itertools.count(1)
        self._rest = bytearray()
        self._generation = 0  # grows with each start of the helper in the guest
        self._channels: dict[int, HelperChannel] = {}
        self._replies: dict[int, tuple[int, bytes] | None] = {}
        self._broken: str = ""
        self._awaited = b""  # the answer after which all that arrives is for us
        port.listen(self._feed)

    # -- what it can do ---------------------------------------------------------------------------

    @property
    def is_there(self) -> bool:
        """Whether it has said hello, or was there when the guest was saved."""
        return self._generation > 0

    @property
    def is_away(self) -> bool:
        """Whether a fault keeps the guest from answering."""
        return self.is_frozen or self.sleeps()

    def assume(self) -> None:
        """Note that the helper is there: it said hello before the guest was saved.

        What it was sending to another process at that time is skipped.
        """
        with self.changed:
            self._generation = 1
            self._numbers = itertools.count(1 + secrets.randbits(30))  # it may know low ones
            self._awaited = secrets.token_bytes(16)
        self.post(b"p", 0, self._awaited)

    def ping(self, timeout: float | None = None) -> None:
        """Wait until it answers.

        Raises:
            GuestLost: it does not answer within `timeout` seconds.
        """
        self._await(self._send_request(b"p", b"vmsandbox"), timeout)

    def is_silent(self) -> bool:
        """Whether it was there, and does not answer within a few seconds, without a fault."""
        if not self.is_there or self.is_away:
            return False
        try:
            self.ping(_SILENT_SECONDS)
        except GuestLost:
            return True
        return False

    def set_clock(self) -> float:
        """Set the guest's clock to this host's time plus the lead.

        Returns:
            The largest possible error of the guest's clock, in seconds.

        Raises:
            GuestLost: the helper could not set it.
        """
        started, number = wall(), self.send_clock()
        return self.clock_error(number, started)

    def send_clock(self) -> int:
        """Ask to set the clock, without waiting. `clock_error` reads the answer."""
        now = wall()
        now += self.lead.at(now)
        return self._send_request(b"c", struct.pack("<qq", int(now), int(now % 1 * 1e9)))

    def clock_error(self, number: int, started: float) -> float:
        """The error of the guest's clock, in seconds, after `send_clock` at the time `started`."""
        least, most = self._await_lead(number, started, None)
        lead = self.lead.at(started)
        return max(0.0, lead - least) if least < lead else max(0.0, most - lead)

    def read_lead(self, timeout: float | None = None) -> tuple[float, float]:
        """The seconds by which the guest's clock is ahead of this host's: at least, and at most.

        Raises:
            GuestLost: it does not answer within `timeout` seconds.
        """
        started, number = wall(), self._send_request(b"c", b"")
        return self._await_lead(number, started, timeout)

    def _await_lead(
        self, number: int, started: float, timeout: float | None
    ) -> tuple[float, float]:
        seconds, nanoseconds = self._answer("set the clock", number, "qq", timeout)
        now = wall()
        if not 0 <= seconds < _LATEST:
            raise GuestLost(_NONSENSE)
        theirs = float(seconds + nanoseconds / 1e9)
        # The guest has read it between `started` and `now`. We do not know more.
        return theirs - now, theirs - started

    def seed(self, data: bytes) -> None:
        """Mix bytes into the kernel's random numbers, and reseed it.

        Raises:
            GuestLost: the helper could not do it.
        """
        self._do("reseed the random numbers", b"s", data)

    def set_hostname(self, name: str) -> None:
        """Set the hostname, until the next boot.

        Raises:
            GuestLost: the helper could not do it.
        """
        self._do("set the hostname", b"h", name.encode())

    def write_file(self, path: str, data: bytes) -> None:
        """Write a file. Everybody can read a new file.

        Raises:
            GuestLost: the helper could not do it.
        """
        self._do(f"write {path}", b"f", os.fsencode(path) + b"\0" + data)

    def start(self, command: Command, login: str = "root") -> RemoteProcess:
        """Start a program.

        Args:
            login: the user, if the command names none.

        Raises:
            ConfigError: `login` does not exist in the guest.
            OSError: the command is too long (E2BIG).
        """
        commands.check_command(command)
        strings = [command.user or login, command.cwd or ""]
        env = [f"{name}={value}" for name, value in command.env.items()]
        payload = b"".join(os.fsencode(word) + b"\0" for word in strings)
        for words in (command.argv, env):
            payload += struct.pack("<H", len(words))
            payload += b"".join(os.fsencode(word) + b"\0" for word in words)
        return self._open(b"x", payload, command, login)

    def connect(self, path: str) -> RemoteProcess:
        """Connect to a Unix socket in the guest. The connection is like a program with streams.

        Raises:
            CommandError: nothing listens there.
            GuestLost: the guest is gone.
        """
        return self._open(b"u", os.fsencode(path), Command(argv=(path,)), "root")

    # -- for channels ------------------------------------------------------------------------------

    def is_current(self, generation: int) -> bool:
        """Whether a program of this generation belongs to the current helper."""
        return generation == self._generation and not self._broken

    def forget(self, number: int) -> bool:
        """Forget a channel. Returns whether it was known."""
        with self.changed:
            return self._channels.pop(number, None) is not None

    def close(self) -> None:
        """Forget all programs, and let the helper forget them. The guest restarts, or is saved."""
        with self.changed:
            numbers = list(self._channels)
            for channel in self._channels.values():
                channel.was_left = True
            self._lose_channels()
            self._generation = 0
        if self.is_away:  # nobody would read it
            return
        with suppress(VMSandboxError):  # the guest may be down already
            for number in numbers:
                self.post(b"d", number)

    # -- frames ------------------------------------------------------------------------------------

    def post(self, kind: bytes, channel: int, payload: bytes = b"") -> None:
        """Send a frame.

        Raises:
            GuestLost: the guest does not take it, or is gone.
        """
        head = _HEAD.pack(len(payload) + _HEAD.size - 4, kind[0], channel)
        self._port.send(head + payload, _SEND_SECONDS)

    def _send_request(self, kind: bytes, payload: bytes) -> int:
        number = next(self._numbers)
        self._replies[number] = None
        self.post(kind, number, payload)
        return number

    def _await(self, number: int, timeout: float | None) -> tuple[int, bytes]:
        deadline = Deadline(self.patience if timeout is None else timeout)
        try:
            while True:
                with self.changed:
                    if (reply := self._replies[number]) is not None:
                        return reply
                    self.changed.wait(deadline.remaining(_LOOK_SECONDS))
                if self._replies[number] is None:
                    self._look(deadline)
        finally:
            del self._replies[number]

    def _look(self, deadline: Deadline) -> None:
        self.check()
        if self._broken:
            raise GuestLost(
                f"the helper in the guest cannot be used any more: {self._broken}",
                remedy="check whether a test writes to the guest's virtio-serial port or kills the helper",
            )
        if deadline.expired:
            raise GuestLost(
                f"the helper in the guest did not answer within {deadline.seconds:g} s",
                remedy="a fault keeps the guest from answering: end the fault first"
                if self.is_away
                else "check whether a test stops all processes in the guest. This machine may also be "
                "overloaded: run fewer guests or workers at a time",
            )

    def _do(self, what: str, kind: bytes, payload: bytes) -> None:
        self._answer(what, self._send_request(kind, payload))

    def _answer(
        self, what: str, number: int, form: str = "", timeout: float | None = None
    ) -> list[Any]:
        """The values in the answer to a request."""
        kind, payload = self._await(number, timeout)
        try:
            status, *values = struct.unpack(f"<i{form}", payload)
        except struct.error as error:
            raise GuestLost(_NONSENSE) from error
        if kind != ord("R") or status:
            raise GuestLost(f"the helper in the guest could not {what}: {os.strerror(status)}")
        return values

    def _open(self, kind: bytes, payload: bytes, command: Command, login: str) -> RemoteProcess:
        number = next(self._numbers)
        with self.changed:
            channel = HelperChannel(self, number, self._generation)
            self._channels[number] = channel
        try:
            while len(payload) > _MAX_PAYLOAD:
                self.post(kind.upper(), number, payload[:_MAX_PAYLOAD])
                payload = payload[_MAX_PAYLOAD:]
            self.post(kind, number, payload)
            deadline = Deadline(self.patience)
            while not channel.is_open:
                if self.is_away and kind == b"x" and channel.starts_later():
                    break
                channel.wait(_LOOK_SECONDS)
                if channel.failure is not None:
                    self._failed(kind, channel, command, login)
                elif channel.closed or not channel.is_open:
                    self._look(deadline)
                    if channel.closed:
                        raise GuestLost("the helper restarted while a program was started")
        except BaseException:
            self.forget(number)
            raise
        return RemoteProcess(channel, command, check=self.check)

    def _failed(self, kind: bytes, channel: HelperChannel, command: Command, login: str) -> None:
        """Report why nothing was started. A missing program ends with the same status as in a shell."""
        assert channel.failure is not None
        stage, number = channel.failure
        self.forget(channel.number)
        if number == errno.E2BIG and stage in (_NO_PROGRAM, _NO_ROOM):
            raise commands.too_long(command)
        why = os.strerror(number)
        if stage == _NO_USER and command.user is None and login != "root":
            raise commands.cannot_log_in(login)
        if stage == _NO_PROGRAM and kind == b"u":
            what = f"nothing listens at {command.argv[0]} in the guest"
            result = CommandResult(
                argv=command.argv, returncode=_NOT_FOUND, stdout="", stderr=why, duration=0.0
            )
            raise CommandError(what, result=result)
        if stage == _NO_PROGRAM:
            status = _NOT_FOUND if number == errno.ENOENT else _NOT_EXECUTABLE
            why = "not found" if number == errno.ENOENT else why
            channel.end_at_once(status, f"{command.argv[0]}: {why}\n".encode())
        elif stage in (_NO_USER, _NO_FOLDER):
            text = "no such user" if stage == _NO_USER else why
            raise commands.could_not_start(command, _NOT_EXECUTABLE, text)
        else:
            raise GuestLost(
                f"the guest cannot start another program: {why}",
                remedy="end programs that a test has left running in the guest, or give it more memory",
            )

    def _feed(self, data: bytes) -> None:
        """Take the bytes that have arrived. Called on the thread that reads."""
        if self._broken:
            return
        with self.changed:
            self._rest += data
            if self._awaited:
                self._skip()
            try:
                while not self._awaited and len(self._rest) >= _HEAD.size:
                    length, kind, number = _HEAD.unpack_from(self._rest)
                    if not _HEAD.size - 4 <= length <= _MAX_PAYLOAD + _HEAD.size - 4:
                        raise ValueError("a frame with an invalid length")
                    if len(self._rest) < length + 4:
                        break
                    payload = bytes(self._rest[_HEAD.size : length + 4])
                    del self._rest[: length + 4]
                    self._take(chr(kind), number, payload)
            except (ValueError, IndexError, struct.error) as error:
                self._broken = f"it sent invalid data ({error})"
                self._lose_channels()
            self.changed.notify_all()

    def _skip(self) -> None:
        """Skip everything before the answer that we wait for."""
        before, found, after = self._rest.partition(self._awaited)
        if found:
            self._rest, self._awaited = after, b""
        elif len(before) > _MAX_SKIPPED:
            self._broken = "it did not answer, but went on sending old data"

    def _take(self, kind: str, number: int, payload: bytes) -> None:
        if kind == "H":
            (version,) = struct.unpack("<I", payload)
            if version != VERSION:
                raise ValueError(f"version {version}")
            self._lose_channels()
            self._generation += 1
            if self._generation > 1:
                self.returned()
        elif kind in "PR":
            if number in self._replies:
                self._replies[number] = ord(kind), payload
        elif channel := self._channels.get(number):
            channel.take(kind, payload)
            if channel.is_done:
                del self._channels[number]

    def _lose_channels(self) -> None:
        for channel in self._channels.values():
            channel.lose()
        self._channels.clear()
        self.changed.notify_all()


class HelperChannel:
    """The streams of a program that the helper has started: a `Channel`.

    Attributes:
        number: of the channel.
        generation: of the helper that has it.
        failure: stage and number of the error, if the program could not be started.
        is_awaited: whether somebody waits for its start.
        was_left: whether we closed it because the guest goes down.
        ended: whether the program's end is known, or will never be known.
    """

    def __init__(self, helper: Helper, number: int, generation: int) -> None:
        self.quiet_seconds = helper.quiet_seconds
        self.number = number
        self.generation = generation
        self.group = 0
        self.is_open = False
        self.is_awaited = True
        self.failure: tuple[int, int] | None = None
        self.was_left = False
        self.closed = False
        self.ended = False
        self.status: int | None = None
        self._helper = helper
        self._changed = helper.changed
        self._streams = {STDOUT: bytearray(), STDERR: bytearray()}
        self._open_streams = {STDOUT, STDERR}
        self._taken = {STDOUT: 0, STDERR: 0}  # bytes read that the helper does not know of yet
        self._room = _INPUT_WINDOW
        self._broken = False
        self._moved = False

    # -- for readers and writers --------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Its process id in the guest; None before it has started."""
        return self.group or None

    @property
    def output_ended(self) -> bool:
        """Whether no more output will come."""
        return not self._open_streams

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return not self._open_streams and self.ended

    @property
    def is_connected(self) -> bool:
        """Whether the helper that has it is still there."""
        return self._helper.is_current(self.generation)

    def starts_later(self) -> bool:
        """Do not wait for its start any more. Returns whether it has not failed yet."""
        with self._changed:
            self.is_awaited = self.failure is not None
            return not self.is_awaited

    def wait(self, seconds: float) -> None:
        """Wait until something has changed."""
        with self._changed:
            self._changed.wait_for(lambda: self._moved, seconds)
            self._moved = False

    def wait_for_end(self, seconds: float) -> None:
        """Wait until the program has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended, seconds)

    def has_output(self, stream: int) -> bool:
        """Whether `receive` has something of a stream now."""
        return bool(self._streams[stream])

    def receive(self, stream: int, size: int) -> bytes:
        """At least a byte of a stream; nothing at its end."""
        buffer = self._streams[stream]
        with self._changed:
            if not self._changed.wait_for(
                lambda: buffer or stream not in self._open_streams, _LOOK_SECONDS
            ):
                raise TimeoutError
            data = bytes(buffer[:size])
            del buffer[:size]
            self._taken[stream] += len(data)
            tell = self._taken[stream]
            if tell < _TELL or stream not in self._open_streams:
                return data
            self._taken[stream] = 0
        self._helper.post(b"w", self.number, struct.pack("<BI", stream, tell))
        return data

    def send(self, data: memoryview) -> int:
        """Send a part of `data`. Returns the number of bytes."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._room or self._broken, _LOOK_SECONDS):
                raise TimeoutError
            if self._broken:
                raise BrokenPipeError("the program does not read its input any more")
            piece = bytes(data[: self._room])
            self._room -= len(piece)
        self._helper.post(b"i", self.number, piece)
        return len(piece)

    def end_input(self) -> None:
        """Close the program's input."""
        if not self.is_done:
            self._helper.post(b"e", self.number)

    def signal(self, name: str) -> None:
        """Send a signal to the program's process group."""
        if not self.is_done:
            number = signal.Signals[f"SIG{name}"]
            self._helper.post(b"k", self.number, struct.pack("<i", number))

    def close(self) -> None:
        """Forget the program, and let the helper forget it."""
        known = self._helper.forget(self.number)
        with self._changed:
            self.lose()
            self._changed.notify_all()
        if known:
            with suppress(VMSandboxError):  # the guest is gone, and its helper with it
                self._helper.post(b"d", self.number)

    # -- from the helper; the condition is held ------------------------------------------------------

    def take(self, kind: str, payload: bytes) -> None:
        """Take a frame.

        Raises:
            ValueError, IndexError, struct.error: the frame is invalid now.
        """
        if kind == "S":
            (self.group,) = struct.unpack("<I", payload)
            self.is_open = True
            if not self.group:  # a connection to a socket
                self._open_streams.discard(STDERR)
        elif kind == "F":
            stage, number = struct.unpack("<Bi", payload)
            self.failure = stage, number
            if not self.is_awaited:
                self.end_at_once(_NOT_EXECUTABLE, f"{os.strerror(number)}\n".encode())
        elif kind == "o":
            stream, data = payload[0], payload[1:]
            if stream not in self._open_streams or (
                self._taken[stream] + len(self._streams[stream]) + len(data) > _WINDOW
            ):
                raise ValueError("output beyond the window")
            self._streams[stream] += data
        elif kind == "q":
            self._open_streams.discard(payload[0])
            if self.is_open and not self.group:
                self._end(0)
        elif kind == "a":
            (size,) = struct.unpack("<I", payload)
            self._room = min(self._room + size, _INPUT_WINDOW)
        elif kind == "b":
            self._broken = True
        elif kind == "z":
            (status,) = struct.unpack("<i", payload)
            self._end(status)
        else:
            raise ValueError(f"a frame of kind {kind!r}")
        self._moved = True

    def _end(self, status: int) -> None:
        self.status = status if -status <= signal.NSIG else -UNKNOWN_SIGNAL
        self.ended = True

    def lose(self) -> None:
        """The helper is gone, and with it everything about the program."""
        self.closed = self._broken = self._moved = True
        self._open_streams.clear()
        self.ended = True

    def end_at_once(self, status: int, stderr: bytes) -> None:
        """Become the channel of a program that has ended."""
        self.is_open = True
        self._streams[STDERR] += stderr
        self._open_streams.clear()
        self._end(status)
