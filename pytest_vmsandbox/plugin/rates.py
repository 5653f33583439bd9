"""How often a test fails: the rate, and an interval that holds the true one."""

from __future__ import annotations

import functools
import math

CONFIDENCE = 0.95
_HALVINGS = 60  # more than a float can tell apart


def described(failed: int, runs: int) -> str:
    """A failure rate, for people.

    Example:
        >>> described(3, 100)
        'failed 3 of 100 (3.0 %, 95 % interval 0.6 to 8.5 %)'
    """
    digits = 1 if runs < 1000 else 2
    low, high = (f"{100 * bound:.{digits}f}" for bound in interval(failed, runs))
    rate = f"{100 * failed / runs:.{digits}f} %"
    return f"failed {failed} of {runs} ({rate}, {100 * CONFIDENCE:g} % interval {low} to {high} %)"


@functools.cache
def interval(failed: int, runs: int) -> tuple[float, float]:
    """The interval of Clopper and Pearson for a rate. It holds the true one in at least 95 of 100 cases.

    Args:
        failed: from 0 to `runs`.
        runs: at least 1. They must not depend on each other, nor their number on how they ended.

    Returns:
        Its bounds, each from 0 to 1.

    Example:
        >>> [round(bound, 4) for bound in interval(3, 100)]
        [0.0062, 0.0852]
    """
    if 2 * failed > runs:  # the sums are shorter so
        low, high = interval(runs - failed, runs)
        return 1 - high, 1 - low
    outside = (1 - CONFIDENCE) / 2
    # So many failures or more are as unlikely at the lower bound as so many or fewer at the upper one.
    low = _rate_at(1 - outside, failed - 1, runs) if failed else 0.0
    return low, _rate_at(outside, failed, runs)


def _rate_at(likelihood: float, most: int, runs: int) -> float:
    """The rate at which at most so many of all runs fail with this likelihood."""
    ways = [
        math.lgamma(runs + 1) - math.lgamma(failed + 1) - math.lgamma(runs - failed + 1)
        for failed in range(most + 1)
    ]
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        often, seldom = math.log(rate), math.log1p(-rate)
        total = math.fsum(
            math.exp(each + failed * often + (runs - failed) * seldom)
            for failed, each in enumerate(ways)
        )
        low, high = (rate, high) if total > likelihood else (low, rate)
    return (low + high) / 2
