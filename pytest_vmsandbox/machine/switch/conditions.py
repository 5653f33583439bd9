"""What a way through the switch does to frames: which are lost, doubled, swapped or late.

Chance comes from a seed alone. Each flow (the frames from one port to one other, under one rule) has random numbers of its
own, and each frame takes the same number of them. So the fate of a flow's frame depends on its place in the flow and on
nothing else: not on time, and not on other ports.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from .timetable import Entry

QUEUE_SECONDS = 0.25  # a path with a rate holds what it sends in this time, but at least …
QUEUE_BYTES = 32_768
MOST_SECONDS = 60.0  # of latency, and of jitter
LEAST_RATE = 100.0  # bits per second: a frame takes minutes


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What happens to frames in one direction.

    Attributes:
        latency: seconds that each frame is late.
        jitter: up to so many seconds more, evenly spread. Frames keep their order.
        loss: the share of frames that are lost, from 0 to 1.
        duplicate: the share of frames that arrive twice.
        reorder: the share of frames that arrive after the next one.
        rate: bits per second; None for no limit. Frames wait in a queue for up to 0.25 s. What does not fit is lost.
        cut: whether no frame passes at all.
    """

    latency: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    rate: float | None = None
    cut: bool = False


@dataclass(frozen=True)
class Fate:
    """What is decided for one frame.

    Attributes:
        dropped: why it does not pass; empty if it does.
        jitter: seconds that it is late, besides the latency.
        is_doubled: whether it arrives twice.
        is_overtaken: whether it waits for the next frame.
    """

    dropped: str = ""
    jitter: float = 0.0
    is_doubled: bool = False
    is_overtaken: bool = False

    def __str__(self) -> str:
        if self.dropped:
            return self.dropped
        said = ["doubled"] * self.is_doubled + ["overtaken"] * self.is_overtaken
        return " ".join([*said, f"+{self.jitter:.6f}"] if self.jitter else said)


class Flow:
    """The frames from one port to another (or to all) under one rule.

    Attributes:
        name: for the log.
        count: frames that were decided.
        last: when its last frame was through. No later frame is through before.
        held: a frame that waits for the next one, as the timetable has it; None if there is none.
    """

    def __init__(self, name: str, seed: str) -> None:
        self.name = name
        self.count = 0
        self.last = 0.0
        self.held: Entry | None = None
        # A text as the seed would need an import when no file can be read any more (Python 3.13).
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big")
        self._next = random.Random(number).random  # noqa: S311  # a test wants it to repeat
        self._overtaking = False

    def decide(self, conditions: Conditions) -> Fate:
        """The fate of its next frame."""
        self.count += 1
        loss, duplicate, reorder, jitter = (self._next() for _ in range(4))
        if conditions.cut:
            return Fate("cut")
        if loss < conditions.loss:
            return Fate("lost")
        # A frame that lets one overtake it needs one that does, so two in a row would be one swap.
        self._overtaking = reorder < conditions.reorder and not self._overtaking
        return Fate(
            jitter=jitter * conditions.jitter,
            is_doubled=duplicate < conditions.duplicate,
            is_overtaken=self._overtaking,
        )


class Rule:
    """Conditions that are in force on one direction: from a port, to a port, or from one to another.

    Args:
        number: of the rule, for the log.
        source: the label of the port from which frames come; None for all.
        dest: the label of the port to which they go; None for all.
        seed: all that its chance comes from.
    """

    def __init__(
        self, number: int, conditions: Conditions, source: str | None, dest: str | None, seed: str
    ) -> None:
        self.number = number
        self.conditions = conditions
        self.source = source
        self.dest = dest
        self._seed = seed
        self._flows: dict[str, Flow] = {}
        self._free_at = 0.0  # when the frames in its queue are sent

    def flow(self, name: str, way: str) -> Flow:
        """The flow of frames on one way. Its name is for the log, and its chance comes from `way`."""
        if way not in self._flows:
            self._flows[way] = Flow(name, f"{self._seed} {way}")
        return self._flows[way]

    def sent_at(self, size: int, now: float) -> float | None:
        """When a frame is sent that comes now; None if the queue is full.

        Args:
            size: of the frame, in bytes.
        """
        rate = self.conditions.rate
        if rate is None:
            return now
        starts = max(now, self._free_at)
        if (starts - now) > max(QUEUE_SECONDS, QUEUE_BYTES * 8 / rate):
            return None
        self._free_at = starts + size * 8 / rate
        return self._free_at
