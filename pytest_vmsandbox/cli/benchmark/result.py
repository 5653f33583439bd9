"""What a measurement gives, and how it is made of samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

P99_SAMPLES = 100  # fewer have no 99th percentile


class CannotMeasureError(Exception):
    """Something cannot be measured here; the text tells why."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one measurement.

    Attributes:
        value: the number, or its parts by name; None where it cannot be measured.
        samples: how many it is made of.
        reason: why it, or a part of it, cannot be measured.
        details: what else was seen.
    """

    value: float | Mapping[str, float | None] | None
    samples: int = 0
    reason: str = ""
    details: Mapping[str, object] = field(default_factory=dict)


def median(samples: Sequence[float], digits: int = 1) -> Result:
    """The median of samples."""
    return Result(value=round(statistics.median(samples), digits), samples=len(samples))


def percentiles(samples: Sequence[float], digits: int = 2) -> Result:
    """The median, and the 99th percentile where there are enough samples for one."""
    ordered = sorted(samples)
    enough = len(ordered) >= P99_SAMPLES
    return Result(
        value={
            "p50": round(statistics.median(ordered), digits),
            "p99": round(ordered[math.ceil(0.99 * len(ordered)) - 1], digits) if enough else None,
        },
        samples=len(ordered),
        reason="" if enough else f"p99 takes {P99_SAMPLES} samples or more",
        details={"max": round(ordered[-1], digits)},
    )


class Pairs:
    """Two things measured in turn, so that what slows the machine down meets both.

    Args:
        number: of pairs.
        first, second: each measures once.
    """

    def __init__(
        self, number: int, first: Callable[[], float], second: Callable[[], float]
    ) -> None:
        self._pairs = [(first(), second()) for _ in range(number)]
        self.first = statistics.median(a for a, _ in self._pairs)
        self.second = statistics.median(b for _, b in self._pairs)
        self.ratio = statistics.median(a / b for a, b in self._pairs)

    @property
    def differences(self) -> list[float]:
        """By how much the first one was more, in each pair."""
        return [a - b for a, b in self._pairs]


def seconds_of(key: str) -> float | None:
    """The seconds in the unit of a measurement of time; None for the others.

    Args:
        key: what is measured; its name ends with the unit.
    """
    if key in ("guests_per_s", "push_mib_s"):
        return None
    return 0.001 if "_ms" in key else 1.0 if key.endswith("_s") else None


def ratios(results: Mapping[str, Result], base: str) -> dict[str, object]:
    """How many times each measured time goes into that of `base`, in seconds."""
    whole = results[base].value if base in results else None
    if not isinstance(whole, float | int):
        return {}
    found: dict[str, object] = {}
    for key, result in results.items():
        unit = seconds_of(key)
        if unit is None or result.value is None:
            continue
        if isinstance(result.value, Mapping):
            found[key] = {name: _ratio(whole, value, unit) for name, value in result.value.items()}
        else:
            found[key] = _ratio(whole, result.value, unit)
    return found


def _ratio(whole: float, value: float | None, unit: float) -> float | None:
    if value is None or value <= 0:
        return None
    ratio = whole / (value * unit)
    return round(ratio) if ratio >= 100 else float(f"{ratio:.3g}")
