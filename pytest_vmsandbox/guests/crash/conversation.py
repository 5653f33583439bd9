"""The check in the guest: how it is started, asked and understood. What it says is not trusted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import ConfigError, GuestLost
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.guests.crash import checker
from pytest_vmsandbox.guests.crash.checker import Program
from pytest_vmsandbox.guests.crash.states import State
from pytest_vmsandbox.guests.reaching.process import STDERR, RemoteProcess
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Running
from pytest_vmsandbox.guests.running.root_programs import run_as_root

NO_END = "the check does not end"
_MAX_LINE = 200  # bytes of the first line of an answer
_START_SECONDS = 60.0
_WORDS = re.compile(r"(ready|refused|ok|unmountable|busy|broken)(?:-(\d{1,3}))?")
_NUMBER = re.compile(r"(?:0x)?[0-9a-f]*\d[0-9a-f]*")
_NUMBERS = re.compile(r"N(?:, N)+")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check says of one state.

    Attributes:
        kind: why it is broken, in a line without numbers; empty if it is not.
        reason: the same in detail.
    """

    kind: str = ""
    reason: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether the state breaks the promise."""
        return bool(self.kind)


class Looks(Protocol):
    """Shows states to a check."""

    def verdict(self, state: State, acknowledged: Sequence[object]) -> Verdict:
        """What the check says of a state.

        Raises:
            ConfigError: the check cannot run in the guest.
            GuestLost: the guest is gone, and no state is to blame.
        """


class Unusable(Exception):  # it is no error of ours
    """The guest is of no use after this state.

    Args:
        verdict: of the state.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.kind)
        self.verdict = verdict


@contextmanager
def conversation(engine: Engine, program: Program) -> Iterator[Conversation]:
    """Start a check in a guest, which is rolled back afterwards.

    Raises:
        ConfigError: it cannot run there.
    """
    with engine.use() as running:
        if program.is_python:
            _require_python(engine)
        process = running.start(program.command, engine.spec.user)
        try:
            talk = Conversation(running, process)
            talk.open(program.opening, engine.stretch(_START_SECONDS))
            yield talk
        finally:
            process.close()  # it is left running: the guest is rolled back


class Conversation:
    """A check that runs in a guest. `conversation` makes it."""

    def __init__(self, running: Running, process: RemoteProcess) -> None:
        self._running, self._process = running, process
        self._received = bytearray()

    def open(self, data: bytes, seconds: float) -> None:
        """Send what the check reads first, and wait until it is ready.

        Raises:
            ConfigError: it cannot run in the guest.
        """
        deadline = Deadline(seconds)
        try:
            if data:
                self._process.send(data, seconds)
            word, _, text = self._answer(deadline)
        except TimeoutError:
            word, text = "", f"it does not answer within {seconds:g} s"
        if word != "ready":
            raise ConfigError(
                "the check cannot run in the guest",
                details=text,
                remedy="use only what the guest's Python knows",
            )

    def ask(self, line: bytes, seconds: float) -> Verdict:
        """What the check says of the state that is there.

        Args:
            line: what was acknowledged.
            seconds: how long it may take.

        Raises:
            Unusable: the state is broken, and so is the guest now.
            ConfigError: the check cannot run in the guest.
            GuestLost: the guest is gone, and no state is to blame.
        """
        try:
            self._process.send(line, seconds)
            word, status, text = self._answer(Deadline(seconds))
        except TimeoutError:
            text = f"the check and its mounts did not end within {seconds:g} s"
            raise Unusable(Verdict(kind=NO_END, reason=text)) from None
        except GuestLost as lost:
            events = self._running.machine.monitor.events()
            if not any(event["event"] == "GUEST_PANICKED" for event in events):
                raise
            text = printable(f"{lost.brief}\n{lost.details}")
            raise Unusable(Verdict(kind="the guest's kernel panics", reason=text)) from lost
        if word == "ok":
            return Verdict()
        self._running.machine.check_disks()  # an error of this host's disk is no fault of a state
        verdict = judged(word, status, text)
        if word == "busy":
            raise Unusable(verdict)
        return verdict

    def _answer(self, deadline: Deadline) -> tuple[str, int, str]:
        """A word, a status and a text from the guest, which is not trusted.

        Raises:
            TimeoutError: none came in time.
            ConfigError: the check has ended, or what came is none.
        """
        while b"\n" not in self._received:
            if len(self._received) > _MAX_LINE:
                raise self._nonsense()
            self._receive(deadline)
        head, _, _ = self._received.partition(b"\n")
        word, _, size = head.decode("ascii", "replace").partition(" ")
        match = _WORDS.fullmatch(word)
        if match is None or not re.fullmatch(r"\d{1,6}", size) or int(size) > checker.LIMIT:
            raise self._nonsense()
        end = len(head) + 1 + int(size)
        while len(self._received) < end:
            self._receive(deadline)
        text = printable(self._received[len(head) + 1 : end].decode(errors="replace"))
        del self._received[:end]
        return match[1], int(match[2] or 0), text

    def _receive(self, deadline: Deadline) -> None:
        if deadline.expired:
            raise TimeoutError
        data = self._process.receive(deadline.remaining())
        if not data:
            said = b""
            with suppress(TimeoutError):
                said = self._process.read(STDERR, checker.LIMIT, 1.0)
            raise ConfigError(
                "the program that runs the check has ended in the guest",
                details=printable(said.decode(errors="replace")),
                remedy="the check must not kill other programs, nor use up the guest's memory",
            )
        self._received += data

    def _nonsense(self) -> ConfigError:
        return ConfigError(
            "the program that runs the check sends something that is no answer",
            details=printable(bytes(self._received[:_MAX_LINE]).decode(errors="replace")),
            remedy="the check must not write to the connections of other programs",
        )


def _require_python(engine: Engine) -> None:
    if run_as_root(engine, "command -v python3", check=False).returncode:
        raise ConfigError(
            f"a function cannot check states in {engine.name}: there is no python3",
            remedy="pass a program as a list of words, such as ['/bin/sh', '-c', 'cmp old new'], or install "
            "Python in the guest",
        )


def judged(word: str, status: int, text: str) -> Verdict:
    """The verdict that a check's answer means.

    Args:
        word, status: what the program has said.
        text: for people. The first line of an exception is its kind.
    """
    if word == "unmountable":
        return Verdict(kind="the file system cannot be mounted", reason=text)
    if word == "busy":
        return Verdict(kind="the file system cannot be unmounted after the check", reason=text)
    if word in {"refused", "ready"}:
        raise ConfigError(
            "the check cannot run in the guest",
            details=text,
            remedy="the device must be there, the check must not change the guest's system, and it must raise "
            "an error instead of returning a value",
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if status:
        kind = ": ".join(filter(None, [f"status {status}", _normal(first)]))
        return Verdict(kind=kind, reason=f"it returned {status}\n{text}".strip())
    return Verdict(kind=_normal(first or "broken"), reason=text)


def _normal(line: str) -> str:
    """A line without what differs between states of one kind."""
    return _NUMBERS.sub("N", _NUMBER.sub("N", line))[:200]
