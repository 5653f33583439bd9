"""Runs programs in the foreground, on our streams."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run(
    argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> int:
    """Run a program on our streams. Returns its exit status, −N if signal N ended it.

    Ctrl-C reaches the program, too. We wait until it has ended in good order.

    Raises:
        KeyboardInterrupt: there was a Ctrl-C; the program has ended.
    """
    sys.stdout.flush()
    interrupts: list[int] = []
    ours = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        with subprocess.Popen(argv, cwd=cwd, env=env) as process:
            status = process.wait()
    finally:
        signal.signal(signal.SIGINT, ours)
    if interrupts:
        raise KeyboardInterrupt
    return status
