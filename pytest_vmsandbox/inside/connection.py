"""The connection to the supervisor in a guest, which starts sessions of pytest and passes on what they say."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import GuestLost, VMSandboxError
from pytest_vmsandbox.guests.commands import Command
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.process import RemoteProcess
from pytest_vmsandbox.inside.wire import Decoder, Message, broken, encode

_PING_SECONDS = 15.0  # of silence, after which it is asked whether the guest is still there
_ANSWER_SECONDS = 5.0  # that it then has; scaled
_ATTACH_SECONDS = 30.0  # for the supervisor to greet; scaled
_MAX_MESSAGES = 100_000  # that answer one request; live output does not count
_MAX_BYTES = 256 << 20  # of them
# A supervisor that is there already is left alone. $0: Python, $1: the runner, $2: the folder.
_SERVE = '[ -S "$2/socket" ] || "$0" "$1" serve "$2"'


@dataclass(frozen=True, kw_only=True)
class GuestPaths:
    """Where things lie in a guest.

    Attributes:
        python: the interpreter that runs tests.
        runner: the folder `runner`.
        folder: of the supervisor's socket, for the user alone.
    """

    python: str
    runner: str
    folder: str


class Connection:
    """A connection to the supervisor of a guest.

    Args:
        patience: by how much the guest is slower than one on real hardware.
    """

    def __init__(self, guest: Guest, process: RemoteProcess, *, patience: float) -> None:
        self.guest = guest
        self.patience = patience
        self._process = process
        self._decoder = Decoder()
        self._waiting: deque[Message] = deque()
        self._answers, self._weight = 0, 0

    @classmethod
    @contextmanager
    def attached(
        cls, guest: Guest, place: GuestPaths, *, patience: float = 1.0, serve: bool = True
    ) -> Iterator[Connection]:
        """Start a supervisor in the guest unless there is one, and attach to it.

        Args:
            serve: start one; else there is one.

        At the end it is let go of; it goes on, and can be attached to again.

        Raises:
            GuestLost: the guest is gone.
            CommandError: the supervisor cannot be started.
        """
        if serve:
            guest.run(["sh", "-c", _SERVE, place.python, place.runner, place.folder])
        process = guest.engine.connect(f"{place.folder}/socket")
        if process is None:
            attach = (place.python, "-I", "-S", place.runner, "attach", place.folder)
            process = guest.engine.start(Command(argv=attach))
        try:
            connection = cls(guest, process, patience=patience)
            connection._greeting()
            yield connection
        finally:
            process.close()

    def _greeting(self) -> None:
        try:
            message = self.hear(_ATTACH_SECONDS * self.patience)
        except TimeoutError:
            raise self._silent() from None
        if "attached" not in message:
            raise broken("no greeting", message)

    def expect(self) -> None:
        """From here on, so many messages are heard, and no more, until this is called again."""
        self._answers, self._weight = 0, self._decoder.weight

    def ask(self, message: Mapping[str, object]) -> None:
        """Send a message that others answer; see `expect`.

        Raises:
            GuestLost: the guest, or the way to it, is gone.
        """
        self.expect()
        self.say(message)

    def say(self, *messages: Mapping[str, object]) -> None:
        """Send messages, all at once.

        Raises:
            GuestLost: the guest, or the way to it, is gone.
        """
        try:
            self._process.send(b"".join(map(encode, messages)), _ATTACH_SECONDS * self.patience)
        except TimeoutError:
            raise self._silent() from None
        except OSError as error:
            raise self._lost() from error

    def hear(self, timeout: float) -> Message:
        """The next message.

        Raises:
            TimeoutError: none came within `timeout` seconds, but the guest is there.
            GuestLost: the guest, or the way to it, is gone, or what came is no message.
        """
        deadline = Deadline(timeout)
        while not self._waiting:
            try:
                self._receive(deadline.remaining(_PING_SECONDS))
            except TimeoutError:
                if not deadline.expired:
                    self._ping()
            if deadline.expired and not self._waiting:  # it may speak, but says nothing
                raise TimeoutError
        message = self._waiting.popleft()
        self._answers += "output" not in message
        if self._answers > _MAX_MESSAGES or self._decoder.weight - self._weight > _MAX_BYTES:
            raise broken("more messages than there can be")
        return message

    def signal(self, name: str) -> None:
        """Send a signal to the session's process group; DUMP lets it write all its stacks."""
        self.say({"do": "signal", "name": name})

    def _receive(self, timeout: float) -> bool:
        """Take what comes next; whether that were messages, or only a part of one."""
        data = self._process.receive(timeout)
        if not data:
            raise self._lost()
        messages = self._decoder.feed(data)
        self._waiting += [message for message in messages if "pong" not in message]
        return bool(messages)

    def _ping(self) -> None:
        """Look whether the guest still answers; a test may be silent for as long as it likes."""
        self.say({"do": "ping", "n": 0})
        deadline = Deadline(_ANSWER_SECONDS * self.patience)
        try:
            while not self._receive(deadline.remaining()):
                pass
        except TimeoutError:
            raise self._silent() from None

    def _silent(self) -> GuestLost:
        return GuestLost(
            f"{self.guest.name} does not answer any more",
            stage="ssh",
            remedy="did the test take the guest's network down, or stop all of its processes?",
        )

    def _lost(self) -> GuestLost:
        try:
            self.guest.run(["true"], timeout=_ANSWER_SECONDS * self.patience)
        except GuestLost as lost:
            if lost.stage != "ssh":  # the machine itself tells why
                return lost
        except VMSandboxError:
            pass
        return GuestLost(
            f"the process in {self.guest.name} that runs the tests is gone",
            stage="command",
            remedy="did the test kill all processes, or delete what it did not make?",
        )
