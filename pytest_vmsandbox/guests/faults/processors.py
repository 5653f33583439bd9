"""CPUs that stand still, or get too little time."""

from __future__ import annotations

from pytest_vmsandbox.guests.engine import Engine


class ProcessorFaults:
    """The part of `Faults` that is about its CPUs."""

    engine: Engine
