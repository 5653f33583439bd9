"""A pytest session in a guest, driven item by item from here.

A `Keeper` is the process in the guest that is talked to; it starts a `GuestSession`, and another
one when the interpreter of the first has died.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import (
    CommandTimeout,
    GuestLost,
    InterpreterLost,
    VMSandboxError,
)
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.core.transport import Command, CommandResult, RemoteProcess
from pytest_vmsandbox.inside.wire import Decoder, Message, broken, encode

_PING_SECONDS = 15.0  # of silence, after which it is asked whether the guest is still there
_ANSWER_SECONDS = 30.0  # that it then has, and again on another way
_DUMP_SECONDS = 2.0  # before a test is killed, all its stacks are asked for
_EXIT_SECONDS = 5.0  # from a kill until it is told
_MAX_MESSAGES = 100_000  # of one test
_MAX_ITEMS = 1_000_000


class Host(Protocol):
    """What is needed of a guest; `Guest` has it."""

    @property
    def name(self) -> str:
        """Who it is."""

    def run(self, argv: Sequence[str], **how: Any) -> CommandResult[Any]:
        """Run a program to its end."""

    def start(self, command: Command) -> RemoteProcess:
        """Start a program, on streams that its starter reads and closes."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where things lie in a guest.

    Attributes:
        python: the interpreter that runs tests.
        runner: the file `runner.py`.
        folder: of the keeper's socket, for the user alone.
    """

    python: str
    runner: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a session has found.

    Attributes:
        items: node id → the indices of its parameters (None for an item without any).
        details: node id → location, keywords and marks, for files of which they were asked for.
        failed: node id of a file or folder → the serialized report of why it could not be
            collected, or was skipped as a whole.
        pytest: the version of the guest's pytest.
    """

    items: dict[str, Mapping[str, int] | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, Any] = field(default_factory=dict)
    pytest: str = ""


class Keeper:
    """A connection to the keeper of a guest.

    Args:
        patience: by how much the guest is slower than one on real hardware.
    """

    def __init__(self, guest: Host, process: RemoteProcess, *, patience: float) -> None:
        self.guest = guest
        self.patience = patience
        self._process = process
        self._decoder = Decoder()
        self._waiting: list[Message] = []

    @classmethod
    @contextmanager
    def attached(cls, guest: Host, place: Place, *, patience: float = 1.0) -> Iterator[Keeper]:
        """Start a keeper in the guest unless there is one, and attach to it.

        At the end it is let go of; it goes on, and can be attached to again.

        Raises:
            GuestLost: the guest is gone.
            CommandError: the keeper cannot be started.
        """
        guest.run(["sh", "-c", _SERVE, place.python, place.runner, place.folder])
        attach = (place.python, "-I", "-S", place.runner, "attach", place.folder)
        process = guest.start(Command(argv=attach))
        try:
            keeper = cls(guest, process, patience=patience)
            keeper.hear(_ANSWER_SECONDS * patience)
            yield keeper
        finally:
            process.close()

    def say(self, message: Mapping[str, object]) -> None:
        """Send a message.

        Raises:
            GuestLost: the guest, or the way to it, is gone.
        """
        try:
            self._process.send(encode(message))
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
            silent = Deadline(_PING_SECONDS)
            try:
                self._fill(deadline.remaining(silent.seconds))
            except TimeoutError:
                if deadline.expired:
                    raise
                self._ping()
        return self._waiting.pop(0)

    def signal(self, name: str) -> None:
        """Send a signal to the session's process group; DUMP lets it write all its stacks."""
        self.say({"do": "signal", "name": name})

    def _fill(self, timeout: float) -> None:
        data = self._process.receive(timeout)
        if not data:
            raise self._lost()
        self._waiting += [it for it in self._decoder.feed(data) if "pong" not in it]

    def _ping(self) -> None:
        """Look whether the guest still answers; a test may be silent for as long as it likes."""
        self.say({"do": "ping", "n": 0})
        deadline = Deadline(_ANSWER_SECONDS * self.patience)
        while True:
            try:
                data = self._process.receive(deadline.remaining())
            except TimeoutError:
                raise self._silent() from None
            if not data:
                raise self._lost()
            messages = self._decoder.feed(data)
            self._waiting += [it for it in messages if "pong" not in it]
            if messages:
                return

    def _silent(self) -> GuestLost:
        try:
            self.guest.run(["true"], timeout=_ANSWER_SECONDS * self.patience)
        except CommandTimeout:
            pass
        except GuestLost as lost:
            return lost
        else:
            return self._lost()
        return GuestLost(
            f"{self.guest.name} does not answer any more, neither its test session nor SSH",
            stage="ssh",
            remedy="did the test take the guest's network down, or stop all of its processes?",
        )

    def _lost(self) -> GuestLost:
        try:
            self.guest.run(["true"], timeout=_ANSWER_SECONDS * self.patience)
        except GuestLost as lost:
            return lost
        except VMSandboxError:
            pass
        return GuestLost(
            f"the keeper of the test session in {self.guest.name} is gone",
            stage="command",
            remedy="did the test kill all processes, or delete what it did not make?",
        )


# A keeper that is there already is left alone. $0: Python, $1: the runner, $2: the folder.
_SERVE = '[ -S "$2/socket" ] || "$0" "$1" serve "$2"'


class GuestSession:
    """A pytest session in a guest that has collected, and runs what it is told to.

    Attributes:
        collected: what it has found.
    """

    def __init__(self, keeper: Keeper) -> None:
        self.collected = Collected()
        self._keeper = keeper
        self._over = False

    @classmethod
    def started(
        cls, keeper: Keeper, config: Mapping[str, object], *, timeout: float
    ) -> tuple[GuestSession, list[Message]]:
        """Start a session and let it collect.

        Args:
            config: see the runner's ``Session``.
            timeout: seconds until it has collected.

        Returns:
            The session, and what it said besides: warnings, output.

        Raises:
            InterpreterLost: it ended before it had collected, as it does after a usage error.
            GuestLost: the guest is gone.
        """
        session = cls(keeper)
        keeper.say({"do": "start", "config": config})
        said: list[Message] = []
        deadline = Deadline(timeout)
        while True:
            message = session._hear(deadline, "collect the tests")
            if "ready" in message:
                return session, said
            session._take(message, said)

    def _take(self, message: Message, said: list[Message]) -> None:
        found = self.collected
        try:
            if "items" in message:
                for nodeid, indices, *details in message["items"]:
                    found.items[str(nodeid)] = indices if isinstance(indices, dict) else None
                    if details:
                        found.details[str(nodeid)] = details[0]
                if len(found.items) > _MAX_ITEMS:
                    raise broken(f"more than {_MAX_ITEMS} tests")
            elif "failed" in message:
                nodeid, report = message["failed"]
                found.failed[str(nodeid)] = report
            elif "pytest" in message:
                self.collected = Collected(
                    items=found.items,
                    details=found.details,
                    failed=found.failed,
                    pytest=str(message["pytest"]),
                )
            else:
                said.append(message)
        except (TypeError, ValueError) as error:
            raise broken("a list of tests that is none", message) from error

    def run(
        self,
        nodeid: str,
        *,
        following: str | None,
        more: bool,
        marks: Sequence[tuple[str, str]],
        limit: float,
    ) -> Iterator[Message]:
        """Run one item; what the session says until it is done, ``done`` included.

        Args:
            nodeid: one of `collected`.
            following: the item that comes next, for whose sake fixtures stay.
            more: whether any may come.
            marks: name and reason of marks to add.
            limit: seconds that it has.

        Raises:
            InterpreterLost: the interpreter ended in the middle, or had to be killed.
            GuestLost: the guest is gone.
        """
        self._keeper.say(
            {"do": "run", "id": nodeid, "next": following, "more": more, "marks": list(marks)}
        )
        deadline = Deadline(limit)
        for _ in range(_MAX_MESSAGES):
            message = self._hear(deadline, "end")
            if "begin" in message:
                continue
            yield message
            if "done" in message:
                return
        raise broken(f"more than {_MAX_MESSAGES} messages for one test")

    def interrupt(self, seconds: float) -> None:
        """Let the session tear all down, as after Ctrl-C; kill it if it takes longer."""
        if self._over:
            return
        with suppress(VMSandboxError, TimeoutError):
            self._keeper.signal("INT")
            self._until_exit(Deadline(seconds))
        self.kill()

    def finish(self, seconds: float) -> list[Message]:
        """Let the session tear down what is left, and end.

        Returns:
            What it said meanwhile.

        Raises:
            InterpreterLost: it did not end in `seconds`, and was killed.
            GuestLost: the guest is gone.
        """
        if self._over:
            return []
        self._keeper.say({"do": "finish"})
        try:
            return self._until_exit(Deadline(seconds))
        except TimeoutError:
            raise self._killed("tear down", seconds) from None

    def kill(self) -> str:
        """End the interpreter and all of its process group; what it had written last."""
        tail = ""
        if not self._over:
            with suppress(VMSandboxError, TimeoutError):
                self._keeper.signal("KILL")
                tail = str(self._until_exit(Deadline(_EXIT_SECONDS * self._keeper.patience))[-1]["tail"])
        self._over = True
        return tail

    def _until_exit(self, deadline: Deadline) -> list[Message]:
        said = []
        while True:
            message = self._keeper.hear(deadline.remaining())
            said.append(message)
            if "exit" in message:
                self._over = True
                return said
            if len(said) > _MAX_MESSAGES:
                raise broken("no end")

    def _hear(self, deadline: Deadline, what: str) -> Message:
        """The next message; a session that is late is asked for its stacks and killed."""
        try:
            try:
                message = self._keeper.hear(deadline.remaining() - _DUMP_SECONDS)
            except TimeoutError:
                self._keeper.signal("DUMP")
                message = self._keeper.hear(deadline.remaining())
        except TimeoutError:
            raise self._killed(what, deadline.seconds) from None
        if "exit" in message:
            self._over = True
            raise self._ended(message)
        if "internal" in message:
            self.kill()
            raise InterpreterLost(
                "pytest in the guest failed: INTERNALERROR",
                details=printable(str(message["internal"])),
            )
        return message

    def _killed(self, what: str, seconds: float) -> InterpreterLost:
        return InterpreterLost(
            f"it did not {what} within {seconds:g} s, and its interpreter was killed",
            details=_stacks(self.kill()),
            remedy="give it more time: vm_test_timeout, or test_timeout= of the marker vm",
        )

    def _ended(self, message: Message) -> InterpreterLost:
        try:
            status, tail = int(message["exit"]), printable(str(message["tail"]))
        except (KeyError, TypeError, ValueError) as error:
            raise broken("an end that is none", message) from error
        if status < 0:
            how = f"was ended by {_signal_name(-status)}"
            if memory := self._out_of_memory() if status == -signal.SIGKILL else "":
                return InterpreterLost(
                    "the guest ran out of memory, and its kernel ended the interpreter",
                    details="\n".join(filter(None, [memory, tail])),
                    remedy="give it more: @pytest.mark.vm(memory='1GiB'), or vm_memory",
                )
        else:
            how = f"ended with status {status}"
            if status == 0:
                how += " (os._exit?)"
        return InterpreterLost(f"the interpreter {how}", details=_stacks(tail))

    def _out_of_memory(self) -> str:
        """What the guest's kernel tells of a lack of memory; empty where it tells of none."""
        with suppress(VMSandboxError):
            script = "dmesg 2>/dev/null | grep -E 'Out of memory|oom-kill' | tail -n 2"
            return printable(self._keeper.guest.run(["sh", "-c", script], user="root").stdout)
        return ""


def _stacks(tail: str) -> str:
    return f"--- what it wrote last\n{printable(tail)}" if tail.strip() else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def parse_probe(text: str) -> dict[str, Any]:
    """What ``runner.py probe`` has printed.

    Raises:
        GuestLost: it is anything else.
    """
    try:
        facts = json.loads(text)
        return {
            "version": tuple(int(it) for it in facts["version"])[:3],
            "machine": str(facts["machine"]),
            "libc": str(facts["libc"][1]),
            "executable": str(facts["executable"]),
        }
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise broken("no facts about its Python", text) from error
