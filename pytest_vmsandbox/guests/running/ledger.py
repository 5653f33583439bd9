"""The ledger of a guest's faults: which are in force, and which were."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import ConfigError, VMSandboxError
from pytest_vmsandbox.machine.machine import Machine

FILE = "faults.log"  # in the folder for a guest's logs


class Ends(Protocol):
    """A fault, as the ledger knows it."""

    freezes: bool

    def end(self) -> None:
        """End it, and restore the guest."""

    def switched_on(self, machine: Machine) -> None:
        """The guest has a new machine. A fault of the hardware is put into it."""

    def rolled_back(self, *, was_in_force: bool) -> None:
        """A snapshot was restored: the guest is as it was when this fault was in force, or was not."""


@dataclass(eq=False)
class Entry:
    """One fault.

    Attributes:
        fault: the fault.
        text: what it does, in a few words.
        begun, ended: seconds since the epoch; None if it is still in force.
        error: what was raised while it was in force, and ended it.
    """

    fault: Ends
    text: str
    begun: float
    ended: float | None = None
    error: BaseException | None = None

    def __str__(self) -> str:
        """For people: what it was, and when."""
        until = "still in force" if self.ended is None else f"ended {_time(self.ended)}"
        return f"{self.text} (began {_time(self.begun)}, {until})"


@dataclass(eq=False)
class Ledger:
    """The faults of one guest. You may call all methods from any thread.

    Args:
        logs: the folder for the guest's logs, or None.

    Attributes:
        recorded: the disks that are recorded for crash points now: name → told of the events of QEMU
            while the next recording began.
        unrestored: what could not be restored when the guest answered again. A reader takes the lines out.
        shows_states: whether crash points use the guest or a recording now.
        is_closed: whether the guest is removed. It has no fault any more.
    """

    logs: Path | None
    recorded: dict[str, Callable[[range], None]] = field(default_factory=dict)
    unrestored: list[str] = field(default_factory=list)
    shows_states: bool = False
    is_closed: bool = False
    _entries: list[Entry] = field(default_factory=list)
    _owed: list[Callable[[], None]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def in_force(self) -> list[Entry]:
        """The faults that are in force, the first one first."""
        with self._lock:
            return [it for it in self._entries if it.ended is None and not self.is_closed]

    def hints(self) -> list[str]:
        """A line for an error of the guest: faults in force may be its cause."""
        texts = [entry.text for entry in self.in_force]
        return [f"faults in force: {'; '.join(texts)}"] if texts else []

    def refuse_recorded(self, what: str, remedy: str) -> None:
        """Refuse what QEMU or the guest would flush all disks for, or what ends a recording.

        Args:
            what: cannot be done.

        Raises:
            ConfigError: a disk is recorded.
        """
        if names := sorted(self.recorded):
            raise ConfigError(f"{what} while a disk is recorded: {', '.join(names)}", remedy=remedy)

    def begun(self, fault: Ends, text: str) -> None:
        """Note that a fault is in force from now on."""
        entry = Entry(fault, text, wall())
        with self._lock:
            self._entries.append(entry)
        self._write(entry.begun, "begin", text)

    def ended(self, fault: Ends, error: BaseException | None = None) -> None:
        """Note that a fault is not in force any more.

        Args:
            error: what ended the block that it was made for.
        """
        for entry in self.in_force:
            if entry.fault is fault:
                entry.ended, entry.error = wall(), error
                self._write(entry.ended, "end", entry.text)

    def pass_on(self, fault: Ends, other: Ledger) -> None:
        """A fault that is in force belongs to another guest from now on."""
        for entry in self.in_force:
            if entry.fault is fault:
                with self._lock:
                    self._entries.remove(entry)
                with other._lock:
                    other._entries.append(entry)
                self.note(f"goes on in another guest: {entry.text}")
                other.note(f"goes on here: {entry.text}")

    def note(self, text: str) -> None:
        """Note something that has happened at one moment, and has no end."""
        self._write(wall(), "event", text)

    def owes(self, restore: Callable[[], None]) -> None:
        """Note that the guest was gone when a fault ended. It is restored when it answers again."""
        with self._lock:
            self._owed.append(restore)

    def answered(self) -> None:
        """The guest answers after a start. What cannot be restored is noted, and raises no error."""
        with self._lock:
            owed, self._owed = self._owed, []
        for restore in owed:
            try:
                restore()
            except VMSandboxError as error:
                text = f"the guest could not be restored: {error.brief}"
                self.unrestored.append(text)
                self.note(text)

    def at_failure(self, is_cause: Callable[[BaseException], bool]) -> list[Entry]:
        """The faults that were in force when a test failed. This forgets those that are over.

        Args:
            is_cause: whether an error that a fault saw belongs to the failure.
        """
        with self._lock:
            found = [
                entry
                for entry in self._entries
                if entry.ended is None or (entry.error is not None and is_cause(entry.error))
            ]
            self._entries = [entry for entry in self._entries if entry.ended is None]
        return found

    def switched_on(self, machine: Machine) -> None:
        """The guest has a new machine."""
        for entry in self.in_force:
            entry.fault.switched_on(machine)

    def rolled_back(self, then: Collection[Entry]) -> None:
        """A snapshot was restored, and the guest answers. What was owed to it since then is not any more.

        Args:
            then: the faults that were in force when the snapshot was taken.

        Raises:
            VMSandboxError: a fault that is over came back, and could not be ended again.
        """
        with self._lock:
            self._owed.clear()
        for entry in reversed(dict.fromkeys([*then, *self.in_force])):
            entry.fault.rolled_back(was_in_force=entry in then)

    def refuse_left(self) -> None:
        """Refuse that a preparation leaves a fault in force. Nobody could end it in the saved guest.

        Raises:
            ConfigError: a fault is in force.
        """
        if texts := [entry.text for entry in self.in_force]:
            raise ConfigError(
                f"a preparation has left faults in force: {', '.join(texts)}. They cannot be part of an image",
                remedy="use a block (with vm.faults…), or call vm.faults.end_all() at the end of the "
                "preparation. Begin faults that tests need in the test, or in a fixture",
            )

    def end_all(self) -> None:
        """End all faults that are in force, the last one first."""
        for entry in reversed(self.in_force):
            entry.fault.end()

    def _write(self, when: float, what: str, text: str) -> None:
        if self.logs is not None:
            line = f"{_time(when)} {what:5} {text}\n"
            with suppress(OSError), open(self.logs / FILE, "ab", opener=_private) as file:
                file.write(line.encode(errors="replace"))


def _private(path: str, flags: int) -> int:
    """Open a file that only this user can read, if it is new."""
    return os.open(path, flags, 0o600)


def _time(seconds: float) -> str:
    """A moment in UTC, with milliseconds, as in other logs."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond // 1000:03}Z"
