"""A clock that is wrong, or runs at a wrong rate."""

from __future__ import annotations

from pytest_vmsandbox.guests.engine import Engine


class ClockFaults:
    """The part of `Faults` that is about its clock."""

    engine: Engine
