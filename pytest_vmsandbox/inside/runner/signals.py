"""Holds back what a test has set up to interrupt itself, while its session stands at a failure."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # no Python code, which a test may patch

from .apart import keep_apart

TYPE_CHECKING = False  # known to type checkers; importing typing takes long in a guest
if TYPE_CHECKING:
    from typing import Any

keep_apart(globals())


class HeldTimer:
    """Stops the timer of SIGALRM. The time of the host's work is no part of the test."""

    def __enter__(self) -> None:
        self.left = _signal.setitimer(_signal.ITIMER_REAL, 0)

    def __exit__(self, *_: object) -> None:
        if self.left[0]:
            _signal.setitimer(_signal.ITIMER_REAL, *self.left)


class HeldSignals:
    """Notes the signals that Python functions handle, until `deliver`.

    Masking them would not do: another thread of the test may get them, and Python calls the function here
    all the same. Ctrl-C that nobody handles still ends the session.
    """

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.came: list[tuple[Any, int, Any]] = []  # handlers, and what they are called with

    def __enter__(self) -> None:
        for number in range(1, _signal.NSIG):
            handler = _signal.getsignal(number)
            if callable(handler) and handler is not _signal.default_int_handler:
                self.handlers[number] = handler
                _signal.signal(number, self.note)

    def note(self, number: int, frame: Any) -> None:
        self.came.append((self.handlers[number], number, frame))

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            _signal.signal(number, handler)

    def deliver(self) -> BaseException | None:
        """Call the handlers of the signals that came. Returns the first exception of one."""
        first = None
        for handler, number, frame in self.came:
            try:
                handler(number, frame)
            except BaseException as error:  # noqa: PERF203  # each handler is called
                first = first or error
        return first
