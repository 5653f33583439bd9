"""Too little memory."""

from __future__ import annotations

from pytest_vmsandbox.guests.engine import Engine


class MemoryFaults:
    """The part of `Faults` that is about its memory."""

    engine: Engine
