"""What all faults have in common."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from pytest_vmsandbox.core.errors import ConfigError, VMSandboxError
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.machine.machine import Machine


class Fault(ABC):
    """A fault that is in force. It is a context manager, and ends with its block.

    A method of `Faults` makes it, and it is in force when that method returns. Without a block, it is in
    force until `end`, or until the guest is gone.

    Attributes:
        text: what it does, in a few words.
    """

    freezes = False  # whether the guest answers nothing meanwhile
    needs_answers = True  # whether the guest must answer when it begins

    def __init__(self, engine: Engine, text: str) -> None:
        self.text = text
        self._engine = engine
        self._ending = threading.Lock()
        self._is_ending = self._is_over = False
        self._was_entered = self._has_lapsed = False

    def __repr__(self) -> str:
        state = "in force" if self.in_force else "over"
        return f"<Fault {self.text} ({state})>"

    @property
    def in_force(self) -> bool:
        """Whether it is still in force. In a guest that is removed, none is."""
        return not (self._is_over or self._is_ending or self._engine.machines.faults.is_closed)

    def __enter__(self) -> Self:
        if self._is_over and (self._was_entered or not self._has_lapsed):
            raise ConfigError(
                f"this fault is over, and cannot be used again: {self.text}",
                remedy="call the method of vm.faults again: with vm.faults.… as fault:",
            )
        self._was_entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._finish(error)
        except VMSandboxError as failed:
            if error is None:
                raise
            error.add_note(f"the fault could not be ended: {failed.brief}")

    def end(self) -> None:
        """End it, and restore the guest. A fault that is over stays so.

        Raises:
            VMSandboxError: the guest could not be restored.
        """
        self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        with self._ending:
            if self._is_over:
                return
            self._is_ending = True
            try:
                with self._engine.explained():
                    self._stop()
            except VMSandboxError:
                self._note_end(error)
                raise
            finally:  # after Ctrl-C, or what a handler of a signal raises, it can be ended again
                self._is_ending = False
            self._note_end(error)

    def begin(self) -> Self:
        """Bring it about. The methods of `Faults` call this.

        After Ctrl-C, or what the handler of a signal raises, nobody knows how far it has come. So it counts
        as in force, and can be ended.
        """
        with self._engine.explained():
            self._check_guest()
            self._engine.machines.faults.begun(self, self.text)
            try:
                self._start()
            except VMSandboxError:
                self._note_end()
                raise
        return self

    def _check_guest(self) -> None:
        """Check that no other fault keeps the guest from answering, if this one needs answers.

        Raises:
            ConfigError: one does. Without this, the test would wait for a guest that cannot answer.
        """
        running = self._engine.running
        if self.needs_answers and running is not None and running.resident.is_away:
            raise ConfigError(
                f"this fault cannot begin now: {self.text}. Another one keeps {self._engine.name} from answering",
                remedy="end the other fault first, or begin this one before it",
            )

    def lapse(self) -> None:
        """Note that it is over by itself, so nothing is left to restore."""
        if self.in_force:
            self._has_lapsed = True
            self._note_end()

    def _note_end(self, error: BaseException | None = None) -> None:
        self._engine.machines.faults.ended(self, error)
        self._is_over = True

    @abstractmethod
    def _start(self) -> None:
        """Bring it about. If this raises a `VMSandboxError`, nothing is left of it."""

    @abstractmethod
    def _stop(self) -> None:
        """Restore the guest, in whatever state it is. It may be switched off, lost or restored.

        Any other error, such as Ctrl-C, may have interrupted `_start`, or an earlier call of this.
        """

    def switched_on(self, machine: Machine) -> None:  # noqa: B027  # most faults need nothing
        """The guest has a new machine: it was switched on, or a snapshot was restored.

        A machine that was restored does not run yet.

        A fault of the hardware is put into the new machine. Others need nothing, because what was in the
        guest's memory is gone.
        """

    def rolled_back(self, *, was_in_force: bool) -> None:
        """A snapshot was restored: the guest is as it was when this fault was in force, or was not.

        A fault of the hardware stays as it is. The others are in the guest's memory or on its disks: so
        one that was in force is back, and is ended again if it is over. One that was not is gone.

        Raises:
            VMSandboxError: it could not be ended again.
        """
        if not was_in_force:
            self.lapse()
        elif not self.in_force:
            self._engine.machines.faults.note(f"ended again after a rollback: {self.text}")
            with self._ending, self._engine.explained():
                self._stop()
