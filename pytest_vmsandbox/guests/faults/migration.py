"""A guest that moves to another QEMU while it runs."""

from __future__ import annotations

from pytest_vmsandbox.guests.engine import Engine


class Migration:
    """The part of `Faults` that is about where it runs."""

    engine: Engine
