"""The connection to the supervisor in a guest. It starts sessions of pytest and relays their messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import GuestLost, VMSandboxError
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.reaching.process import RemoteProcess
from pytest_vmsandbox.inside.wire import Decoder, Message, broken, encode

PING_SECONDS = 15.0  # of silence, after which we check that the guest answers
ANSWER_SECONDS = 5.0  # for that answer; longer on a slow host
_ATTACH_SECONDS = 30.0  # for the supervisor to greet; longer on a slow host
_MAX_MESSAGES = 100_000  # in answer to one request; live output does not count
_MAX_BYTES = 256 << 20  # of these messages
# Does nothing if there is a supervisor. $0: Python, $1: the runner, $2: the folder.
_SERVE = '[ -S "$2/socket" ] || "$0" "$1" serve "$2"'


@dataclass(frozen=True, kw_only=True)
class GuestPaths:
    """Where things are in a guest.

    Attributes:
        python: the interpreter that runs tests.
        runner: the folder `runner`.
        folder: of the supervisor's socket, private to the user.
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
        self._resets = self._guest_resets()

    @classmethod
    @contextmanager
    def attached(
        cls, guest: Guest, place: GuestPaths, *, patience: float = 1.0, serve: bool = True
    ) -> Iterator[Connection]:
        """Start a supervisor in the guest unless there is one, and attach to it.

        The supervisor goes on after the context, and you can attach to it again.

        Args:
            serve: whether to start one if there is none.

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
            raise broken("its first message was no greeting", message)

    def expect(self) -> None:
        """Begin to count messages. Their number is limited until the next call."""
        self._answers, self._weight = 0, self._decoder.weight

    def ask(self, message: Mapping[str, object]) -> None:
        """Send a message that the session will answer; see `expect`.

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
            TimeoutError: no message came within `timeout` seconds, but the guest answers.
            GuestLost: the guest or the way to it is gone, or the message is invalid.
        """
        deadline = Deadline(timeout)
        while not self._waiting:
            try:
                self._receive(deadline.remaining(PING_SECONDS))
            except TimeoutError:
                if not deadline.expired:
                    self._ping()
            if deadline.expired and not self._waiting:  # pongs may have come, but no message
                raise TimeoutError
        message = self._waiting.popleft()
        self._answers += "output" not in message
        if self._answers > _MAX_MESSAGES or self._decoder.weight - self._weight > _MAX_BYTES:
            raise broken(f"it sent more than {_MAX_MESSAGES:,} messages, or {_MAX_BYTES >> 20} MiB")
        return message

    def signal(self, name: str) -> None:
        """Send a signal to the session's process group. DUMP lets it write all its stacks."""
        self.say({"do": "signal", "name": name})

    def _receive(self, timeout: float) -> bool:
        """Read the next bytes. Returns whether they completed a message."""
        data = self._process.receive(timeout)
        if not data:
            raise self._lost()
        messages = self._decoder.feed(data)
        self._waiting += [message for message in messages if "pong" not in message]
        return bool(messages)

    def _ping(self) -> None:
        """Check that the guest still answers. A test may be silent for any time."""
        self.say({"do": "ping", "n": 0})
        deadline = Deadline(ANSWER_SECONDS * self.patience)
        try:
            while not self._receive(deadline.remaining()):
                pass
        except TimeoutError:
            raise self._silent() from None

    def _silent(self) -> GuestLost:
        return GuestLost(
            f"{self.guest.name} does not answer any more",
            stage="ssh",
            remedy="check whether the test takes the guest's network down, or stops all processes",
        )

    def _lost(self) -> GuestLost:
        try:
            self.guest.run(["true"], timeout=ANSWER_SECONDS * self.patience)
        except GuestLost as lost:
            if lost.stage != "ssh":  # QEMU knows the reason
                return lost
        except VMSandboxError:
            pass
        if self._guest_resets() != self._resets:  # the call above has waited for it
            return GuestLost(
                f"{self.guest.name} has restarted by itself, and with it the process that runs the tests",
                stage="command",
                remedy="check whether the test restarts its own guest. A test that runs on this side may "
                "do that: vm.reboot()",
            )
        return self._gone()

    def _guest_resets(self) -> int:
        """How often the guest has restarted. Its helper may come back without that, if a test kills it."""
        running = self.guest.engine.running
        return 0 if running is None else running.restarts.resets

    def _gone(self) -> GuestLost:
        return GuestLost(
            f"the process in {self.guest.name} that runs the tests is gone",
            stage="command",
            remedy="check whether the test kills all processes, or deletes files that it did not make",
        )
