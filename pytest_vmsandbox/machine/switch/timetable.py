"""What has to be done later, in the order of its time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from time import monotonic

Action = Callable[[float], None]
_LONGEST = 3600.0  # seconds to wait at once: a selector refuses a month


@dataclass(order=True)
class Entry:
    """An action in the timetable; None if it was taken out."""

    at: float
    number: int
    action: Action | None = field(compare=False)

    def take(self) -> Action | None:
        """Take the action out, so it is not done any more; None if that has happened already."""
        action, self.action = self.action, None
        return action


class Timetable:
    """Actions that are due at some time. Those of the same time are done in the order in which they were added."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._count = count()

    def add(self, at: float, action: Action) -> Entry:
        """Have an action done at a time of the monotonic clock. It gets the time of then."""
        entry = Entry(at, next(self._count), action)
        heapq.heappush(self._entries, entry)
        return entry

    def seconds(self) -> float | None:
        """Until the next action is due, an hour at most; None if there is none."""
        if not self._entries:
            return None
        return min(max(0.0, self._entries[0].at - monotonic()), _LONGEST)

    def run(self) -> None:
        """Do all that is due."""
        entries = self._entries
        while entries and entries[0].at <= (now := monotonic()):
            if action := heapq.heappop(entries).take():
                action(now)
