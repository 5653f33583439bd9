"""Several threads, one for each guest, that do something at one moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Meet = Callable[[], object]  # returns when all others have called theirs


def alone() -> None:
    """A `Meet` without others."""


class _Meeting:
    """Where threads wait for each other. It does not wait for those that have left."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._waiting = 0
        self._round = 0
        self._changed = threading.Condition()

    def meet(self) -> None:
        """Wait for all others that have not left."""
        with self._changed:
            mine = self._round
            self._waiting += 1
            self._go_on_if_complete()
            self._changed.wait_for(lambda: self._round > mine)

    def leave(self) -> None:
        """Nobody waits for this thread any more."""
        with self._changed:
            self._count -= 1
            self._go_on_if_complete()

    def _go_on_if_complete(self) -> None:
        if self._waiting == self._count:
            self._waiting = 0
            self._round += 1
            self._changed.notify_all()


def in_step(works: Sequence[Callable[[Meet], T]]) -> list[T]:
    """Call functions, each in a thread of its own. They can wait for each other.

    Args:
        works: each gets a function that returns when all others have called theirs as often. Nobody waits for
            one that has returned, or has failed.

    Returns:
        The results, in their order, when all are done.

    Raises:
        BaseException: what the first of them has raised.
    """
    if len(works) == 1:  # so Ctrl-C ends it
        return [works[0](alone)]
    meeting = _Meeting(len(works))

    def done(work: Callable[[Meet], T]) -> T:
        try:
            return work(meeting.meet)
        finally:
            meeting.leave()

    with ThreadPoolExecutor(len(works), thread_name_prefix="vmsandbox-together") as threads:
        futures = [threads.submit(done, work) for work in works]
    return [future.result() for future in futures]
