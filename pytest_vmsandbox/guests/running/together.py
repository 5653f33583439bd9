"""Several threads, one for each guest, that do something at one moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
Meet = Callable[[], object]  # returns when all others have called theirs


def alone() -> None:
    """A `Meet` without others."""


def in_step(works: Sequence[Callable[[Meet], T]]) -> list[T]:
    """Call functions, each in a thread of its own. They can wait for each other.

    Args:
        works: each gets a function that returns when all others have called theirs as often. If one of them
            fails, nobody waits any more.

    Returns:
        The results, in their order, when all are done.

    Raises:
        BaseException: what the first of them has raised.
    """
    barrier = threading.Barrier(len(works))

    def meet() -> None:
        with suppress(threading.BrokenBarrierError):
            barrier.wait()

    def done(work: Callable[[Meet], T]) -> T:
        try:
            return work(meet)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(works), thread_name_prefix="vmsandbox-together") as threads:
        futures = [threads.submit(done, work) for work in works]
    return [future.result() for future in futures]
