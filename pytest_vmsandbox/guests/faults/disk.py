"""Disks that are slow, fail, are full or vanish."""

from __future__ import annotations

from pytest_vmsandbox.guests.engine import Engine


class DiskFaults:
    """The part of `Faults` that is about disks."""

    engine: Engine
