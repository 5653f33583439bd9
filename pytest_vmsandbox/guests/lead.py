"""By how much a guest's clock must be ahead of this host's (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, eq=False)
class Drift:
    """What one fault does to a guest's clock.

    Attributes:
        offset: the seconds that it adds.
        rate: how many seconds the clock shows for each of this host's.
        since: when it began, in seconds since the epoch.
        is_free: whether the guest's clock must not be set while it lasts, because a step would undo it.
    """

    offset: float = 0.0
    rate: float = 1.0
    since: float = 0.0
    is_free: bool = False


@dataclass(frozen=True)
class Lead:
    """By how much a guest's clock must be ahead of this host's.

    Attributes:
        seconds: by which a test has set it ahead by itself.
        drifts: what faults add.

    Example:
        >>> lead = Lead(60.0).with_drift(Drift(offset=-10.0, rate=1.5, since=1000.0))
        >>> lead.at(1002.0)
        51.0
    """

    seconds: float = 0.0
    drifts: tuple[Drift, ...] = ()

    def at(self, now: float) -> float:
        """The lead in seconds, `now` seconds since the epoch."""
        return self.seconds + sum(
            drift.offset + (drift.rate - 1) * (now - drift.since) for drift in self.drifts
        )

    @property
    def rate(self) -> float:
        """How many seconds the clock shows for each of this host's."""
        return 1 + sum(drift.rate - 1 for drift in self.drifts)

    @property
    def is_free(self) -> bool:
        """Whether the guest's clock must not be set."""
        return any(drift.is_free for drift in self.drifts)

    def with_drift(self, drift: Drift) -> Self:
        """This one, and one fault more."""
        return replace(self, drifts=(*self.drifts, drift))

    def without(self, drift: Drift) -> Self:
        """This one, and one fault less, if that is in it."""
        return replace(self, drifts=tuple(other for other in self.drifts if other is not drift))

    def after_resets(self, moments: Iterable[float]) -> Self:
        """This one, without the faults that a reset has ended. A new kernel knows nothing of them."""
        last = max(moments, default=0.0)
        return replace(self, drifts=tuple(drift for drift in self.drifts if drift.since > last))
