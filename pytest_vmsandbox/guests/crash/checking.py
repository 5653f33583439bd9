"""Shows one state of a disk after another to a check that runs in the guest.

The guest is the one that wrote to the disk. It is saved before and rolled back afterwards, so the check
finds all that the test has installed, and nothing is left of the states.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import ConfigError, GuestLost, VMSandboxError
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.guests.commands import Command
from pytest_vmsandbox.guests.crash import checker
from pytest_vmsandbox.guests.crash.building import Builder
from pytest_vmsandbox.guests.crash.checker import Program
from pytest_vmsandbox.guests.crash.mounts import Place, release
from pytest_vmsandbox.guests.crash.states import State
from pytest_vmsandbox.guests.engine import Engine
from pytest_vmsandbox.guests.machines import Running, Saved
from pytest_vmsandbox.guests.process import STDERR, RemoteProcess
from pytest_vmsandbox.machine import filters
from pytest_vmsandbox.machine.disk import empty_overlay
from pytest_vmsandbox.machine.filters import Filter

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


class _Broken(Exception):
    """The guest is of no use after this state.

    Args:
        verdict: of the state.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.kind)
        self.verdict = verdict


class Bench:
    """A running guest that looks at one state after another. A context manager.

    Args:
        disk: the name of the disk.
        place: where it was mounted when the recording ended.
        check: what runs for each state.
        seconds: for each state.
    """

    def __init__(
        self,
        engine: Engine,
        disk: str,
        place: Place,
        builder: Builder,
        check: Program,
        seconds: float,
    ) -> None:
        self._engine, self._disk, self._place = engine, disk, place
        self._builder, self._check, self._seconds = builder, check, seconds
        self._saved: Saved
        self._process: RemoteProcess | None = None
        self._running: Running
        self._received = bytearray()
        self._shown: Filter | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        refuse_faults(self._engine)
        self._saved = self._engine.save()
        try:
            self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _begin(self) -> None:
        """Free the disk, and start the check."""
        release(self._engine, self._place)
        self._running = self._stack.enter_context(self._engine.use())
        if self._check.is_python:
            self._require_python()
        self._process = self._running.start(self._check.command, self._engine.spec.user)
        self._stack.callback(self._process.close)
        self._received.clear()
        if self._check.opening:
            self._process.send(self._check.opening, self._seconds)
        try:
            word, _, text = self._answer(Deadline(self._engine.stretch(_START_SECONDS)))
        except TimeoutError:
            word, text = "", "it does not answer"
        if word != "ready":
            raise ConfigError(
                "the check cannot run in the guest",
                details=text,
                remedy="use what this Python knows",
            )

    def _require_python(self) -> None:
        argv = ("/bin/sh", "-c", "command -v python3")
        if self._engine.run(Command(argv=argv, user="root")).returncode:
            raise ConfigError(
                f"a function cannot check states in {self._engine.name}: there is no python3",
                remedy="pass a program as a list of words, such as ['/bin/sh', '-c', 'cmp old new'], or install "
                "Python in the guest",
            )

    def _end(self) -> None:
        """Roll the guest back."""
        self._shown = None
        self._process = None
        with suppress(VMSandboxError, OSError, EOFError):  # the guest may be gone
            self._stack.close()
        self._engine.roll_back(self._saved)

    def verdict(self, state: State, acknowledged: Sequence[object]) -> Verdict:
        """See `Looks`. A state on which the guest panics or hangs is broken. The guest is rolled back then."""
        line = checker.line(acknowledged, is_python=self._check.is_python)
        with self._builder.state(state):
            if self._process is None:
                self._begin()
            try:
                self._show()
                return self._look(line)
            except _Broken as broken:
                self._end()
                return broken.verdict

    def _show(self) -> None:
        """Let the disk have the state that was built."""
        drives = self._running.machine.drives
        if self._shown is not None:
            drives.remove(self._disk, self._shown)
        with shown(self._builder, self._engine) as self._shown:
            drives.insert(self._disk, self._shown)

    def _look(self, line: bytes) -> Verdict:
        assert self._process is not None
        try:
            self._process.send(line, self._seconds)
            word, status, text = self._answer(Deadline(self._seconds))
        except TimeoutError:
            text = f"the check and its mounts did not end within {self._seconds:g} s"
            raise _Broken(Verdict(kind="the check does not end", reason=text)) from None
        except GuestLost as lost:
            if not panicked(self._running):
                raise
            verdict = Verdict(
                kind="the guest's kernel panics", reason=printable(f"{lost.brief}\n{lost.details}")
            )
            raise _Broken(verdict) from lost
        if word == "ok":
            return Verdict()
        self._running.machine.check_disks()  # an error of this host's disk is no fault of a state
        verdict = judged(word, status, text)
        if word == "busy":
            raise _Broken(verdict)
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
        assert self._process is not None
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


def refuse_faults(engine: Engine) -> None:
    """Refuse to look at states while a fault is in force: the state would be blamed for it.

    Raises:
        ConfigError: there is one.
    """
    if found := engine.machines.faults.in_force:
        raise ConfigError(
            f"check() cannot tell a fault that is in force from a power cut: {found[0].text}",
            remedy="end the faults before: vm.faults.end_all()",
        )


@contextmanager
def shown(builder: Builder, engine: Engine) -> Iterator[Filter]:
    """What lets a disk have the state that was built. It is put under the disk while this lasts.

    What the guest writes goes into an overlay.
    """

    def device(place: filters.Place) -> Mapping[str, object]:
        base, top = place.files
        file = {"driver": "file", "filename": base, "read-only": True}
        return {
            "driver": "qcow2",
            "cache": {"no-flush": True},
            "file": {"driver": "file", "filename": top, "discard": "unmap"},
            "backing": {"driver": "raw", "file": file, "read-only": True},
        }

    with (
        empty_overlay(builder.size, engine.machines.hypervisor.cache) as overlay,
        Path(f"/proc/self/fd/{builder.file.fileno()}").open("rb") as content,
    ):
        yield Filter(order=filters.RECORDER, device=device, files=(content, overlay))


def panicked(running: Running) -> bool:
    """Whether the guest's kernel has panicked."""
    events = running.machine.monitor.events()
    return any(event["event"] == "GUEST_PANICKED" for event in events)


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
            remedy="the device must be there, and the check must not change the guest's system",
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


@contextmanager
def mounted(
    engine: Engine, disk: str, place: Place, builder: Builder, state: State
) -> Iterator[str]:
    """The guest with one state on the disk, mounted. Afterwards it is as before.

    Raises:
        ConfigError: the state cannot be mounted, or the disk is used.
    """
    refuse_faults(engine)
    saved = engine.save()
    try:
        release(engine, place)
        with builder.state(state):
            with shown(builder, engine) as content, engine.use() as running:
                running.machine.drives.insert(disk, content)
            _mount(engine, place, state)
            yield place.folder
    finally:
        engine.roll_back(saved)


def _mount(engine: Engine, place: Place, state: State) -> None:
    script = f"{checker.drop_script(place)}\n{checker.mount_script(place)}"
    done = engine.run(Command(argv=("/bin/sh", "-c", script), user="root"))
    if done.returncode:
        raise ConfigError(
            f"the state {state.name} cannot be mounted",
            details=printable((done.stdout + done.stderr).decode(errors="replace")),
            remedy="write it into a file with write_state(), and attach that with vm.attach_disk()",
        )
