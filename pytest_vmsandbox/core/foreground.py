"""What runs in the foreground: programs on our streams, and what Ctrl-C must not break off."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def interrupts_held() -> Iterator[list[int]]:
    """Hold Ctrl-C back while this lasts. It is passed on at the end.

    Yields:
        A list that gets an item for each Ctrl-C. It stays empty in other threads than the main one, and where
        Ctrl-C is ignored.

    Raises:
        KeyboardInterrupt: there was a Ctrl-C. Another handler of the signal may do something else.
    """
    interrupts: list[int] = []
    ours = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(ours):
        yield interrupts
        return
    signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, ours)
        if interrupts:
            ours(signal.SIGINT, None)


def run(
    argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> int:
    """Run a program on our streams. Returns its exit status, −N if signal N ended it.

    Ctrl-C reaches the program, too. We wait until it has ended in good order.

    Raises:
        KeyboardInterrupt: there was a Ctrl-C; the program has ended.
    """
    sys.stdout.flush()
    with interrupts_held(), subprocess.Popen(argv, cwd=cwd, env=env) as process:
        return process.wait()
