"""Several threads, one for each guest, that do something at the same time, or at one moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

from pytest_vmsandbox.core import foreground
from pytest_vmsandbox.core.deadline import giving_up_at

_LOOK_SECONDS = 0.1
T = TypeVar("T")
Meet = Callable[[], object]  # returns when all others have called theirs


def alone() -> None:
    """A `Meet` without others."""


def in_threads(
    works: Sequence[Callable[[], T]], most: int, *, all_or_none: bool = False
) -> list[Future[T]]:
    """Call functions in threads, and wait for them. Ctrl-C here lets them give up, and is passed on.

    It is passed on when all have ended. A second one does not change that: what a thread has started must be
    ended before what it runs on.

    Args:
        most: how many are called at the same time.
        all_or_none: whether the others give up if one fails.

    Returns:
        Their results, in their order. Those that did not begin are cancelled.
    """
    stop = threading.Event()

    def called(work: Callable[[], T]) -> T:
        with giving_up_at(stop):
            return work()

    with (
        foreground.interrupts_held() as interrupts,
        ThreadPoolExecutor(most, thread_name_prefix="vmsandbox-together") as threads,
    ):
        futures: list[Future[T]] = []
        try:
            for work in works:
                futures.append(threads.submit(called, work))  # noqa: PERF401  # it may fail
            while not interrupts and _go_on(futures, all_or_none=all_or_none):
                pass
        finally:
            if len(futures) < len(works) or not all(future.done() for future in futures):
                for future in futures:
                    future.cancel()
                stop.set()
    return futures


def _go_on(futures: Sequence[Future[T]], *, all_or_none: bool) -> bool:
    """Wait a moment. Returns whether to wait any longer."""
    when = FIRST_EXCEPTION if all_or_none else ALL_COMPLETED
    done, others = wait(futures, _LOOK_SECONDS, when)
    return bool(others) and not (all_or_none and any(it.exception() for it in done))


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

    futures = in_threads([partial(done, work) for work in works], len(works))
    return [future.result() for future in futures]
