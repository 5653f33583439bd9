"""A pytest session in a guest. This side tells it which item to run next.

The supervisor in the guest starts it. If its interpreter dies, the supervisor starts another one.
"""

from __future__ import annotations

import re
import secrets
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from pytest_vmsandbox.core.deadline import Deadline, monotonic
from pytest_vmsandbox.core.errors import InterpreterLost, VMSandboxError
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.inside.connection import Connection
from pytest_vmsandbox.inside.wire import Message, broken

_DUMP_SECONDS = 2.0  # before its timeout, a test is asked for all stacks
_FEW = 4  # announced tests; when a guest has fewer, we send it more, several at once
_EXIT_SECONDS = 5.0  # from a kill until the message about it
_MAX_OUTPUT = 16 << 20  # characters of live output that we keep while nobody waits for it
_MAX_ITEMS = 1_000_000
_MAX_TAIL = 64 << 10  # characters of the last output
_MAX_FRAME = 5_000  # characters of a line of a stack
_MACHINERY = re.compile(r'  File ".*/(?:_pytest|pluggy|vmsandbox/runner)\b.*", line \d+ in ')
_COLLECT, _WAKE = "the session did not collect the tests", "the session did not wake up"
_RUN, _FINISH = "the test did not end", "the session did not tear down its fixtures"
_REMEDIES = {  # of what took too long
    _COLLECT: "make test files and conftest.py files quicker to import. This timeout is fixed",
    _RUN: "give it more time: vm_test_timeout (ini file), test_timeout= of the marker vm, or the timeout "
    "of pytest-timeout",
    _FINISH: "make the teardown of session fixtures quicker. This timeout is fixed",
}


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a session has collected.

    Attributes:
        items: node id → the indices of its parameters (None for an item without any).
        details: node id → location, keywords and marks, for files where we asked for them.
        failed: node id of a file or folder that could not be collected, or was skipped as a whole → the
            serialized report.
    """

    items: dict[str, Mapping[str, int] | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, Any] = field(default_factory=dict)

    @property
    def has_errors(self) -> bool:
        """Whether there was an error. pytest ends with status 1 then."""
        return any(report.get("outcome") == "failed" for report in self.failed.values())


class How(TypedDict, total=False):
    """How to run an item.

    Attributes:
        next: the next item, whose fixtures must stay.
        more: whether more items may come.
        marks: name and reason of marks to add.
        timed: whether the session tells us when the item's function begins and ends.
        attempt: the number of earlier attempts in other guests.
    """

    next: str | None
    more: bool
    marks: list[tuple[str, str]]
    timed: bool
    attempt: int


class RunEnded(Exception):
    """A session ended the run before it had collected. The argument is its message."""


class GuestSession:
    """A pytest session in a guest that has collected, and runs the items that we name.

    Attributes:
        collected: what it has collected.
        announced: the announced items that have not run yet, in order.
    """

    def __init__(self, connection: Connection) -> None:
        self.collected = Collected()
        self._connection = connection
        self.announced: deque[str] = deque()
        self._unsent: list[Message] = []  # the last of them
        self._running = False
        self._over = False
        self._ending = False  # it is already tearing everything down
        self._dumped: Deadline | None = None
        self._output = 0

    @classmethod
    def started(
        cls, connection: Connection, config: Mapping[str, object], *, timeout: float
    ) -> tuple[GuestSession, list[Message]]:
        """Start a session and let it collect.

        Args:
            config: see ``run`` in the runner's `process.py`.
            timeout: seconds for collecting.

        Returns:
            The session, and its other messages: warnings, output.

        Raises:
            InterpreterLost: it ended before it had collected, for instance with a usage error.
            RunEnded: something in the guest ended the run.
            GuestLost: the guest is gone.
        """
        session = cls(connection)
        connection.ask({"do": "start", "config": config})
        said: list[Message] = []
        deadline = Deadline(timeout)
        while True:
            message = session._hear(deadline, _COLLECT)
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
        debugging: Mapping[str, object],
        timeout: float,
    ) -> tuple[GuestSession, list[Message]]:
        """The session that waits in a cloned guest.

        Args:
            collected: what it has collected: the attributes of `Collected`.
            environment: variables that differ in each clone.
            fixtures: values of this side's fixtures.
            debugging: the settings of the runner's `Debugging`.
            timeout: seconds for its answer.

        Returns:
            The session, and its other messages that were still in the guest when it was saved.

        Raises:
            InterpreterLost: it does not answer.
            GuestLost: the guest is gone.
        """
        session = cls(connection)
        session.collected = Collected(**collected)
        own = {"environment": environment, "fixtures": fixtures, "debugging": debugging}
        connection.ask({"do": "wake", "seed": secrets.token_hex(32), **own})
        said: list[Message] = []
        deadline = Deadline(timeout)
        while True:
            message = session._hear(deadline, _WAKE)
            if "awake" in message:
                return session, said
            if "output" not in message and "warning" not in message:
                raise broken("a session that was woken did not answer", message)
            session._note(message, said)

    def _take(self, message: Message, said: list[Message]) -> None:
        found = self.collected
        try:
            if "items" in message:
                for nodeid, indices, *details in message["items"]:
                    if printable(str(nodeid)) != str(nodeid):
                        continue  # pytest makes no such names, and we show those of this side
                    found.items[str(nodeid)] = indices if isinstance(indices, dict) else None
                    if details:
                        found.details[str(nodeid)] = details[0]
                if len(found.items) > _MAX_ITEMS:
                    raise broken(f"it collected more than {_MAX_ITEMS:,} tests")
            elif "failed" in message:
                nodeid, report = message["failed"]
                if not report or not isinstance(report, dict):
                    raise TypeError
                found.failed[str(nodeid)] = report
            else:
                self._note(message, said)
        except (TypeError, ValueError) as error:
            raise broken("it sent an invalid list of tests", message) from error

    def announce(self, nodeid: str, **how: Unpack[How]) -> None:
        """Let it run an item right after the ones before. You must call `run` afterwards, which sends this."""
        self._unsent.append({"do": "run", "id": nodeid, **how})
        self.announced.append(nodeid)

    def run(
        self,
        nodeid: str,
        *,
        limit: float,
        call_limit: float | None = None,
        if_stuck: Callable[[str], object] | None = None,
        **how: Unpack[How],
    ) -> Iterator[Message]:
        """Run one item. Yields what the session says, up to and including ``done``.

        Time does not count while you handle ``stopped`` and ``terminal``, for which the session waits.

        Args:
            nodeid: one of `collected`.
            limit: the item's timeout in seconds.
            call_limit: the timeout of its function in seconds, if the item is `timed`.
            if_stuck: is called with what happened before an interpreter is killed at its timeout.
            how: unless the item was announced.

        Raises:
            InterpreterLost: the interpreter ended in the middle, or had to be killed.
            GuestLost: the guest is gone.
        """
        if not self.announced:
            self.announce(nodeid, **how)
        if self.announced.popleft() != nodeid:
            self.kill()
            raise InterpreterLost(
                "the tests were requested in a different order than announced to the guest",
                remedy="look for a plugin that changes the order of tests while they run",
            )
        if self._unsent and len(self.announced) - len(self._unsent) < _FEW:
            self._connection.say(*self._unsent)
            self._unsent.clear()
        self._connection.expect()
        self._running = True
        deadline = whole = Deadline(limit)
        while self._running:
            message = self._hear(deadline, _RUN, if_stuck)
            if "call" in message:
                deadline = whole
                if message["call"] and call_limit is not None and call_limit < whole.remaining():
                    deadline = Deadline(call_limit)
            if "done" in message:
                if message["done"] != nodeid:
                    raise broken("it ended another test", message["done"])
                self._running = False
            begun = monotonic()
            yield message
            if "stopped" in message or "terminal" in message:
                for each in {id(it): it for it in (whole, deadline)}.values():
                    each.postpone(monotonic() - begun)

    def go_on(self) -> None:
        """Let a session go on that has stopped.

        Raises:
            GuestLost: the guest is gone.
        """
        self._connection.say({"do": "go on"})

    def debug(self) -> None:
        """Let a session that has stopped open its debugger. It asks for a terminal then.

        Raises:
            GuestLost: the guest is gone.
        """
        self._connection.say({"do": "debug"})

    def take_back(self, terminal: object) -> None:
        """Tell the session that nobody lends it the terminal any more that it asked for.

        Raises:
            GuestLost: the guest is gone.
        """
        self._connection.say({"do": "no terminal", "n": terminal})

    def interrupt(self, seconds: float) -> list[Message]:
        """Let the session tear everything down, as after Ctrl-C. Kill it after `seconds`.

        Returns:
            Its messages meanwhile.
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
            Its messages meanwhile.

        Raises:
            InterpreterLost: it did not end within `seconds`, and was killed.
            GuestLost: the guest is gone.
        """
        if self._over:
            return []
        if self._running or self.announced:  # it is in the middle of a test: do not wait for that
            return self.interrupt(seconds)
        self._connection.ask({"do": "finish"})
        try:
            return self._until_exit(Deadline(seconds))
        except TimeoutError:
            raise self._killed(_FINISH, seconds) from None

    def kill(self) -> str:
        """Kill the interpreter and its process group. Returns its last output."""
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
        """Remember a message. Output may be endless, so its size is limited."""
        if "output" in message:
            self._output += 100 + len(str(message["output"]))
        if "output" not in message or "exit" in message or self._output <= _MAX_OUTPUT:
            said.append(message)

    def _hear(
        self, deadline: Deadline, what: str, if_stuck: Callable[[str], object] | None = None
    ) -> Message:
        """The next message. After the deadline, the session is asked for its stacks and killed."""
        try:
            message = self._next(deadline)
        except TimeoutError:
            if if_stuck is not None:
                if_stuck(f"{what} within {deadline.seconds:g} s")
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
                remedy="the traceback shows which plugin or conftest.py raised the error: correct that",
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
        if deadline.expired and "output" in message:  # output may be endless
            raise TimeoutError
        return message

    def _killed(self, what: str, seconds: float) -> InterpreterLost:
        return InterpreterLost(
            f"{what} within {seconds:g} s, and its interpreter was killed",
            details=_stacks(self.kill()),
            remedy=_REMEDIES.get(what, ""),
        )

    def _ended(self, message: Message) -> InterpreterLost:
        try:
            status, tail = int(message["exit"]), printable(str(message["tail"]))
        except (KeyError, TypeError, ValueError) as error:
            raise broken("it sent an invalid exit status", message) from error
        if status == -signal.SIGKILL and (memory := self._out_of_memory()):
            return InterpreterLost(
                "the guest ran out of memory, and its kernel killed the interpreter",
                details="\n".join(filter(None, [memory, tail])),
                remedy="give it more memory: @pytest.mark.vm(memory='1GiB'), or vm_memory in the ini file",
            )
        if status < 0:
            how = f"was killed by {_signal_name(-status)}"
        else:
            how = f"ended with status {status}{'' if status else ' (os._exit?)'}"
        return InterpreterLost(f"the interpreter {how}", details=_stacks(tail))

    def _out_of_memory(self) -> str:
        """The guest kernel's last messages about a lack of memory; empty without any."""
        with suppress(VMSandboxError):
            script = "dmesg 2>/dev/null | grep -E 'Out of memory|oom-kill' | tail -n 2"
            return printable(self._connection.guest.run(["sh", "-c", script], user="root").stdout)
        return ""


def _stacks(tail: str) -> str:
    """The last output of a session. Frames of pytest and of the runner are left out of stacks."""
    lines = printable(tail[-_MAX_TAIL:]).splitlines()
    lines = [line for line in lines if len(line) > _MAX_FRAME or not _MACHINERY.match(line)]
    return "\n".join(["--- last output of the session", *lines]) if any(lines) else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
