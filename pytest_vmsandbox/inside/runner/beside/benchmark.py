"""What pytest-benchmark measures."""

from __future__ import annotations

import sys
from typing import Any

from ..apart import keep_apart
from ..values import Plain, clean
from ..wire import Wire

keep_apart(globals())

MAX_ROUNDS = 500_000
KEPT = ("group", "param", "params", "extra_info", "iterations", "has_error")


def send_benchmarks(config: Any, wire: Wire, *, about_machine: bool) -> None:
    """Send what pytest-benchmark has measured since.

    Args:
        about_machine: whether the host will save it, with what it was measured on.
    """
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    name_of = sys.modules["pytest_benchmark.utils"].funcname
    measured, session.benchmarks[:] = list(session.benchmarks), []
    for one in measured:
        if len(one.stats.data) > MAX_ROUNDS:
            wire.note({"note": "rounds", "name": str(len(one.stats.data))})
            continue
        found: dict[str, Any] = {name: Plain().of(getattr(one, name)) for name in KEPT}
        found["data"] = one.stats.data
        found["options"] = {
            name: Plain().of(name_of(value) if callable(value) else value)
            for name, value in one.options.items()
        }
        machine = machine_of(session) if about_machine else None
        wire.note({"benchmark": clean(found), "machine": machine})


def machine_of(session: Any) -> Any:
    """What pytest-benchmark tells of this machine; that takes long, and is found out once."""
    if not hasattr(session, "vmsandbox_machine"):
        session.vmsandbox_machine = Plain().of(session.get_machine_info())
    return session.vmsandbox_machine
