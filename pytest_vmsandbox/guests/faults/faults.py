"""The faults that a test can bring about in its guest."""

from __future__ import annotations

from functools import cached_property

from pytest_vmsandbox.guests.faults.clock import ClockFaults
from pytest_vmsandbox.guests.faults.disk import DiskFaults
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.faults.full import FullFaults
from pytest_vmsandbox.guests.faults.kernel import KernelFaults
from pytest_vmsandbox.guests.faults.memory import MemoryFaults
from pytest_vmsandbox.guests.faults.migration import Migration
from pytest_vmsandbox.guests.faults.power import PowerFaults
from pytest_vmsandbox.guests.faults.processors import ProcessorFaults
from pytest_vmsandbox.guests.running.engine import Engine


class Faults(
    DiskFaults,
    FullFaults,
    ClockFaults,
    ProcessorFaults,
    MemoryFaults,
    PowerFaults,
    KernelFaults,
    Migration,
):
    """The faults that a test can bring about in a guest: `Guest.faults`.

    Each method brings one about at once, and returns a `Fault`. That is a context manager: the fault ends
    with the block, and the guest is restored. Faults can be nested, and may overlap.

    The times at which faults began and ended are among the artifacts, in ``faults.log``. If a test fails
    while a fault is in force, the failure shows the fault, and the fault is ended.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def in_force(self) -> tuple[Fault, ...]:
        """The faults that are in force, the first one first."""
        faults = (entry.fault for entry in self.engine.machines.faults.in_force)
        return tuple(fault for fault in faults if isinstance(fault, Fault))

    def end_all(self) -> None:
        """End all faults that are in force, the last one first.

        Raises:
            VMSandboxError: the guest could not be restored.
        """
        self.engine.machines.faults.end_all()


class TakesFaults:
    """The part of `Guest` that is about faults."""

    engine: Engine

    @cached_property
    def faults(self) -> Faults:
        """The faults that a test can bring about in this guest."""
        return Faults(self.engine)
