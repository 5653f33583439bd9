"""A pytest session in a guest, driven item by item from here.

The supervisor in the guest starts it, and another one when the interpreter of the first has died.
"""

from __future__ import annotations

import re
import secrets
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import InterpreterLost, VMSandboxError
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.inside.connection import Connection
from pytest_vmsandbox.inside.wire import Message, broken

_DUMP_SECONDS = 2.0  # before a test is killed, all its stacks are asked for
_FEW = 4  # tests that a guest has before it: it is told of more, several at once
_EXIT_SECONDS = 5.0  # from a kill until it is told
_MAX_OUTPUT = 16 << 20  # characters of live output that are kept, of what nobody waits for
_MAX_ITEMS = 1_000_000
_MAX_TAIL = 64 << 10  # characters of what was written last
_MAX_FRAME = 5_000  # characters of a line of a stack
_MACHINERY = re.compile(r'  File ".*/(?:_pytest|pluggy|vmsandbox/runner)\b.*", line \d+ in ')


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a session has found.

    Attributes:
        items: node id → the indices of its parameters (None for an item without any).
        details: node id → location, keywords and marks, for files of which they were asked for.
        failed: node id of a file or folder → the serialized report of why it could not be
            collected, or was skipped as a whole.
    """

    items: dict[str, Mapping[str, int] | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, Any] = field(default_factory=dict)

    @property
    def has_errors(self) -> bool:
        """Whether there was an error, for which pytest ends with status 1."""
        return any(report.get("outcome") == "failed" for report in self.failed.values())


class How(TypedDict, total=False):
    """How an item is run.

    Attributes:
        next: the item that comes next, for whose sake fixtures stay.
        more: whether any may come.
        marks: name and reason of marks to add.
        timed: whether the session is to tell when the item's function begins and ends.
        attempt: how many attempts at it there were in other guests.
    """

    next: str | None
    more: bool
    marks: list[tuple[str, str]]
    timed: bool
    attempt: int


class RunEnded(Exception):
    """A session has said that its run is to end before it had collected: its argument is the message."""


class GuestSession:
    """A pytest session in a guest that has collected, and runs what it is told to.

    Attributes:
        collected: what it has found.
        announced: the items that are announced and not run yet, in order.
    """

    def __init__(self, connection: Connection) -> None:
        self.collected = Collected()
        self._connection = connection
        self.announced: deque[str] = deque()
        self._unsent: list[Message] = []  # the last of them
        self._running = False
        self._over = False
        self._ending = False  # it tears all down already
        self._dumped: Deadline | None = None
        self._output = 0

    @classmethod
    def started(
        cls, connection: Connection, config: Mapping[str, object], *, timeout: float
    ) -> tuple[GuestSession, list[Message]]:
        """Start a session and let it collect.

        Args:
            config: see ``run`` in the runner's `process.py`.
            timeout: seconds until it has collected.

        Returns:
            The session, and what it said besides: warnings, output.

        Raises:
            InterpreterLost: it ended before it had collected, as it does after a usage error.
            RunEnded: something there has ended the run.
            GuestLost: the guest is gone.
        """
        session = cls(connection)
        connection.ask({"do": "start", "config": config})
        said: list[Message] = []
        deadline = Deadline(timeout)
        while True:
            message = session._hear(deadline, "collect the tests")
            if "ready" in message:
                return session, said
            if "interrupted" in message:
                raise RunEnded(message)
            session._take(message, said)

    @classmethod
    def woken(
        cls,
        connection: Connection,
        collected: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        fixtures: Mapping[str, str | None],
        timeout: float,
    ) -> tuple[GuestSession, list[Message]]:
        """The session that waits in a guest that was cloned.

        Args:
            collected: what it has found, the attributes of `Collected`.
            environment: variables that differ in each clone.
            fixtures: values of those that are this side's.
            timeout: seconds that it has to answer.

        Returns:
            The session, and what it said besides: what had not left the guest when that was saved.

        Raises:
            InterpreterLost: it does not answer.
            GuestLost: the guest is gone.
        """
        session = cls(connection)
        session.collected = Collected(**collected)
        own = {"environment": environment, "fixtures": fixtures}
        connection.ask({"do": "wake", "seed": secrets.token_hex(32), **own})
        said: list[Message] = []
        deadline = Deadline(timeout)
        while True:
            message = session._hear(deadline, "wake up")
            if "awake" in message:
                return session, said
            if "output" not in message and "warning" not in message:
                raise broken("no answer of a session that wakes up", message)
            session._note(message, said)

    def _take(self, message: Message, said: list[Message]) -> None:
        found = self.collected
        try:
            if "items" in message:
                for nodeid, indices, *details in message["items"]:
                    if printable(str(nodeid)) != str(nodeid):
                        continue  # pytest gives no such names, and those of this side are shown
                    found.items[str(nodeid)] = indices if isinstance(indices, dict) else None
                    if details:
                        found.details[str(nodeid)] = details[0]
                if len(found.items) > _MAX_ITEMS:
                    raise broken(f"more than {_MAX_ITEMS} tests")
            elif "failed" in message:
                nodeid, report = message["failed"]
                if not report or not isinstance(report, dict):
                    raise TypeError
                found.failed[str(nodeid)] = report
            else:
                self._note(message, said)
        except (TypeError, ValueError) as error:
            raise broken("a list of tests that is none", message) from error

    def announce(self, nodeid: str, **how: Unpack[How]) -> None:
        """Let it run an item as soon as it is done with those before; `run` has to follow, and sends this."""
        self._unsent.append({"do": "run", "id": nodeid, **how})
        self.announced.append(nodeid)

    def run(
        self, nodeid: str, *, limit: float, call_limit: float | None = None, **how: Unpack[How]
    ) -> Iterator[Message]:
        """Run one item; what the session says until it is done, ``done`` included.

        Args:
            nodeid: one of `collected`.
            limit: seconds that it has.
            call_limit: seconds that its function has, if it tells that.
            how: unless it was announced.

        Raises:
            InterpreterLost: the interpreter ended in the middle, or had to be killed.
            GuestLost: the guest is gone.
        """
        if not self.announced:
            self.announce(nodeid, **how)
        if self.announced.popleft() != nodeid:
            self.kill()
            raise InterpreterLost(
                "it was to run the tests in another order", remedy="which plugin changes the order?"
            )
        if self._unsent and len(self.announced) - len(self._unsent) < _FEW:
            self._connection.say(*self._unsent)
            self._unsent.clear()
        self._connection.expect()
        self._running = True
        deadline = whole = Deadline(limit)
        while self._running:
            message = self._hear(deadline, "end")
            if "call" in message:
                deadline = whole
                if message["call"] and call_limit is not None and call_limit < whole.remaining():
                    deadline = Deadline(call_limit)
            if "done" in message:
                if message["done"] != nodeid:
                    raise broken("the end of a test that was not asked for", message["done"])
                self._running = False
            yield message

    def interrupt(self, seconds: float) -> list[Message]:
        """Let the session tear all down, as after Ctrl-C; kill it if it takes longer.

        Returns:
            What it said meanwhile.
        """
        said: list[Message] = []
        with suppress(VMSandboxError, TimeoutError):
            if not self._over:
                if not self._ending:
                    self._connection.signal("INT")
                said = self._until_exit(Deadline(seconds))
        self.kill()
        return said

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
        if self._running or self.announced:  # nobody waits for what is in the middle of it
            return self.interrupt(seconds)
        self._connection.ask({"do": "finish"})
        try:
            return self._until_exit(Deadline(seconds))
        except TimeoutError:
            raise self._killed("tear down", seconds) from None

    def kill(self) -> str:
        """End the interpreter and all of its process group; what it had written last."""
        tail = ""
        if not self._over:
            with suppress(VMSandboxError, TimeoutError):
                self._connection.signal("KILL")
                *_, end = self._until_exit(Deadline(_EXIT_SECONDS * self._connection.patience))
                tail = str(end.get("tail", ""))
        self._over = True
        return tail

    def _until_exit(self, deadline: Deadline) -> list[Message]:
        said: list[Message] = []
        while True:
            message = self._connection.hear(deadline.remaining())
            self._note(message, said)
            if "exit" in message:
                self._over = True
                return said
            if deadline.expired:
                raise TimeoutError

    def _note(self, message: Message, said: list[Message]) -> None:
        """Remember what was said; of output, which may have no end, so much and no more."""
        if "output" in message:
            self._output += 100 + len(str(message["output"]))
        if "output" not in message or "exit" in message or self._output <= _MAX_OUTPUT:
            said.append(message)

    def _hear(self, deadline: Deadline, what: str) -> Message:
        """The next message; a session that is late is asked for its stacks and killed."""
        try:
            message = self._next(deadline)
        except TimeoutError:
            raise self._killed(what, deadline.seconds) from None
        if "exit" in message:
            self._over = True
            raise self._ended(message)
        self._ending = self._ending or "interrupted" in message
        if "internal" in message:
            self.kill()
            raise InterpreterLost(
                "pytest in the guest failed: INTERNALERROR",
                details=printable(str(message["internal"])),
            )
        return message

    def _next(self, deadline: Deadline) -> Message:
        early = min(_DUMP_SECONDS, deadline.seconds / 2)
        if (left := deadline.remaining() - early) > 0:
            try:
                return self._connection.hear(left)
            except TimeoutError:
                pass
        if self._dumped is not deadline:
            self._dumped = deadline
            self._connection.signal("DUMP")
        message = self._connection.hear(deadline.remaining())
        if deadline.expired and "output" in message:  # there may be no end of it
            raise TimeoutError
        return message

    def _killed(self, what: str, seconds: float) -> InterpreterLost:
        return InterpreterLost(
            f"it did not {what} within {seconds:g} s, and its interpreter was killed",
            details=_stacks(self.kill()),
            remedy="give it more time: vm_test_timeout, test_timeout= of the marker vm, or what "
            "pytest-timeout is told",
        )

    def _ended(self, message: Message) -> InterpreterLost:
        try:
            status, tail = int(message["exit"]), printable(str(message["tail"]))
        except (KeyError, TypeError, ValueError) as error:
            raise broken("an end that is none", message) from error
        if status == -signal.SIGKILL and (memory := self._out_of_memory()):
            return InterpreterLost(
                "the guest ran out of memory, and its kernel ended the interpreter",
                details="\n".join(filter(None, [memory, tail])),
                remedy="give it more: @pytest.mark.vm(memory='1GiB'), or vm_memory",
            )
        if status < 0:
            how = f"was ended by {_signal_name(-status)}"
        else:
            how = f"ended with status {status}{'' if status else ' (os._exit?)'}"
        return InterpreterLost(f"the interpreter {how}", details=_stacks(tail))

    def _out_of_memory(self) -> str:
        """What the guest's kernel tells of a lack of memory; empty where it tells of none."""
        with suppress(VMSandboxError):
            script = "dmesg 2>/dev/null | grep -E 'Out of memory|oom-kill' | tail -n 2"
            return printable(self._connection.guest.run(["sh", "-c", script], user="root").stdout)
        return ""


def _stacks(tail: str) -> str:
    """What a session wrote last; of stacks, the lines that are no affair of the test are left out."""
    lines = printable(tail[-_MAX_TAIL:]).splitlines()
    lines = [line for line in lines if len(line) > _MAX_FRAME or not _MACHINERY.match(line)]
    return "\n".join(["--- what it wrote last", *lines]) if any(lines) else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
