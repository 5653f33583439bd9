"""The plug, the power button, reset and suspend."""

from __future__ import annotations

from pytest_vmsandbox.guests.engine import Engine


class PowerFaults:
    """The part of `Faults` that is about its power."""

    engine: Engine
