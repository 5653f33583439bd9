"""Runs programs in the foreground, and makes the environment for pytest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PLUGIN = "vmsandbox"  # the name of our entry point


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


def pytest_variables() -> dict[str, str]:
    """An environment for pytest without other plugins and options."""
    return {**without_options(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def without_options() -> dict[str, str]:
    """Our environment without variables that give options to pytest or its Python."""
    options = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in options}
