"""A kernel that panics or gets an NMI, and a hardware watchdog."""

from __future__ import annotations

from pytest_vmsandbox.guests.engine import Engine


class KernelFaults:
    """The part of `Faults` that is about its kernel."""

    engine: Engine
