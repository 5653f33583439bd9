"""Time: the one module that reads a clock or sleeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK_SECONDS = 0.25
_giving_up = threading.local()


def monotonic() -> float:
    """The time in seconds, from a clock that never goes back."""
    return time.monotonic()


def wall() -> float:
    """Seconds since the epoch."""
    return time.time()


@contextmanager
def giving_up_at(event: threading.Event) -> Iterator[None]:
    """Let this thread give up once somebody sets an event.

    Python interrupts the main thread only. So its Ctrl-C has to be passed on to threads that it waits for.

    Raises:
        KeyboardInterrupt: the event is set, and the thread looked at a `Deadline`. It is raised once, so what
            cleans up has its time.
    """
    _giving_up.at = event
    try:
        yield
    finally:
        _giving_up.at = None


def _look() -> None:
    event: threading.Event | None = getattr(_giving_up, "at", None)
    if event is not None and event.is_set():
        _giving_up.at = None
        raise KeyboardInterrupt


class Deadline:
    """A moment by which something must be over.

    Args:
        seconds: from now; at least 0.

    Example:
        >>> Deadline(60).remaining() > 59
        True
        >>> Deadline(0).expired
        True
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = float(seconds)
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the deadline was set."""
        return time.monotonic() - self._start

    def remaining(self, at_most: float | None = None) -> float:
        """Seconds left, never negative and never more than `at_most`."""
        _look()
        left = max(0.0, self.seconds - self.elapsed)
        return left if at_most is None else min(left, at_most)

    @property
    def expired(self) -> bool:
        """Whether no time is left."""
        return self.elapsed >= self.seconds

    def postpone(self, seconds: float) -> None:
        """Move the deadline by `seconds` that do not count.

        Example:
            >>> deadline = Deadline(60)
            >>> deadline.postpone(5)
            >>> deadline.remaining() > 64
            True
        """
        self._start += seconds

    def pause(self, seconds: float) -> None:
        """Sleep for `seconds`, but not beyond the deadline."""
        time.sleep(self.remaining(seconds))


def within(
    seconds: float, work: Callable[[], object], check: Callable[[], None] | None = None
) -> bool:
    """Run `work` in a thread. If it takes too long, leave the thread behind.

    Args:
        seconds: how long to wait.
        work: what to run. Its exception is raised here.
        check: called a few times a second while waiting. Its exception ends the wait.

    Returns:
        Whether `work` ended in time.

    Example:
        >>> within(10, lambda: None)
        True
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # raised again below
            failure.append(error)

    thread = threading.Thread(target=run, name="vmsandbox-within", daemon=True)
    thread.start()
    deadline = Deadline(seconds)
    while thread.is_alive() and not deadline.expired:
        thread.join(deadline.remaining(_LOOK_SECONDS))
        if check is not None and thread.is_alive():
            check()
    if failure:
        raise failure[0]
    return not thread.is_alive()
