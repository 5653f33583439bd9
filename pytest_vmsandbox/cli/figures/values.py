"""The figures: what they are called, what they mean, and how they are made of samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

COLD = "cold_boot_s"
P99_SAMPLES = 100  # fewer have no 99th percentile

MEANINGS = {  # what each figure is, for people
    COLD: "a guest is booted, to the end of its first command",
    "clone_on_demand_ms": "nothing is armed: a guest is cloned, to the end of its first command",
    "armed_noop_ms": "an armed guest is leased, to the answer of its helper",
    "armed_run_ms": 'an armed guest is leased, to the end of run(["true"]), its clock set',
    "guests_per_s": "fresh guests, one after the other, each with a command, the pool never full",
    "cpu_ms_per_guest": "processor time of each of those, arming included",
    "pss_mib_per_clone": "memory of an armed clone, shared pages in proportion",
    "leased_at_once": "guests held at a time, each of which answers within 2 s",
    "running_at_once": "likewise, in each of which a program runs all the time",
    "push_mib_s": "a file of random bytes is pushed",
    "second_run_s": "pytest is started where templates are there, until its first test has its guest",
    "in_guest_overhead_ms": "what a test inside a guest takes more than by plain pytest there",
    "in_guest_isolated_s": 'a test inside a guest of its own (isolation="test")',
    "idle_cost_ms": "what the plugin costs a suite that does not use it",
}
KEYS = tuple(MEANINGS)


class CannotMeasureError(Exception):
    """A figure cannot be had here; the text tells why."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure.

    Attributes:
        value: it, or its parts by name; None where it cannot be had.
        samples: how many it is made of.
        reason: why it, or a part of it, cannot be had.
        details: what else was seen.
    """

    value: float | Mapping[str, float | None] | None
    samples: int = 0
    reason: str = ""
    details: Mapping[str, object] = field(default_factory=dict)


def median(samples: Sequence[float], digits: int = 1) -> Figure:
    """The median of samples."""
    return Figure(value=round(statistics.median(samples), digits), samples=len(samples))


def percentiles(samples: Sequence[float], digits: int = 2) -> Figure:
    """The median, and the 99th percentile where there are enough samples for one."""
    ordered = sorted(samples)
    enough = len(ordered) >= P99_SAMPLES
    return Figure(
        value={
            "p50": round(statistics.median(ordered), digits),
            "p99": round(ordered[math.ceil(0.99 * len(ordered)) - 1], digits) if enough else None,
        },
        samples=len(ordered),
        reason="" if enough else f"p99 takes {P99_SAMPLES} samples or more",
        details={"max": round(ordered[-1], digits)},
    )


def seconds_of(key: str) -> float | None:
    """The seconds in the unit of a figure that is a time; None for the others."""
    if key in ("guests_per_s", "push_mib_s"):
        return None
    return 0.001 if "_ms" in key else 1.0 if key.endswith("_s") else None


def ratios(figures: Mapping[str, Figure]) -> dict[str, object]:
    """How many times each time figure goes into the cold boot of the same run."""
    cold = figures[COLD].value if COLD in figures else None
    if not isinstance(cold, float | int):
        return {}
    found: dict[str, object] = {}
    for key, figure in figures.items():
        unit = seconds_of(key)
        if unit is None or figure.value is None:
            continue
        if isinstance(figure.value, Mapping):
            parts = figure.value.items()
            found[key] = {name: _ratio(cold, value, unit) for name, value in parts}
        else:
            found[key] = _ratio(cold, figure.value, unit)
    return found


def _ratio(cold: float, value: float | None, unit: float) -> float | None:
    if value is None or value <= 0:
        return None
    ratio = cold / (value * unit)
    return round(ratio) if ratio >= 100 else float(f"{ratio:.3g}")


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys in the order of `KEYS`, each once."""
    wanted = set(keys)
    return [key for key in KEYS if key in wanted]
