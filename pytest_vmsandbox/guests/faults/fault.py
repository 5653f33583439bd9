"""What all faults have in common."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.guests.engine import Engine
from pytest_vmsandbox.machine.machine import Machine


class Fault(ABC):
    """A fault that is in force. It is a context manager, and ends with its block.

    A method of `Faults` makes it, and it is in force when that method returns. Without a block, it is in
    force until `end`, or until the guest is gone.

    Attributes:
        text: what it does, in a few words.
    """

    def __init__(self, engine: Engine, text: str) -> None:
        self.text = text
        self._engine = engine
        self._ending = threading.Lock()
        self._is_over = False

    def __repr__(self) -> str:
        state = "over" if self._is_over else "in force"
        return f"<Fault {self.text} ({state})>"

    @property
    def in_force(self) -> bool:
        """Whether it is still in force."""
        return not self._is_over

    def __enter__(self) -> Self:
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
            self._is_over = True
            try:
                with self._engine.explained():
                    self._stop()
            finally:
                self._engine.machines.faults.ended(self, error)

    def begin(self) -> Self:
        """Bring it about. The methods of `Faults` call this."""
        with self._engine.explained():
            self._engine.machines.faults.begun(self, self.text)
            try:
                self._start()
            except BaseException:
                self._is_over = True
                self._engine.machines.faults.ended(self)
                raise
        return self

    def lapse(self) -> None:
        """Note that it is over by itself, so nothing is left to restore."""
        if not self._is_over:
            self._is_over = True
            self._engine.machines.faults.ended(self)

    @abstractmethod
    def _start(self) -> None:
        """Bring it about. If this raises, nothing is left of it."""

    @abstractmethod
    def _stop(self) -> None:
        """Restore the guest, in whatever state it is. It may be switched off, lost or restored."""

    def switched_on(self, machine: Machine) -> None:  # noqa: B027  # most faults need nothing
        """The guest has a new machine: it was switched on, or a snapshot was restored.

        A machine that was restored does not run yet.

        A fault of the hardware is put into the new machine. Others need nothing, because what was in the
        guest's memory is gone.
        """
