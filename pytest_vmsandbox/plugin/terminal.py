"""The terminal that pytest was started on: for debuggers in guests, and for lines that cannot wait."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_IS_THERE = pytest.StashKey[bool]()


@contextmanager
def uncaptured(config: pytest.Config) -> Iterator[None]:
    """In the block, standard input and output are those that pytest was started with."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    if capture is None:
        yield
        return
    capturing = capture._global_capturing  # noqa: SLF001  # pytest does not tell otherwise
    was_on = capturing is not None and capturing.is_started()
    capture.suspend(in_=True)
    try:
        yield
    finally:
        if was_on:
            capture.resume()


def is_there(config: pytest.Config) -> bool:
    """Whether standard input and output are a terminal. For workers of pytest-xdist they are none."""
    if _IS_THERE not in config.stash:
        with uncaptured(config):
            config.stash[_IS_THERE] = os.isatty(0) and os.isatty(1)
    return config.stash[_IS_THERE]


def say(config: pytest.Config, text: str) -> None:
    """Print a line on the terminal, even while pytest captures output."""
    plugin = config.pluginmanager.get_plugin
    capture, reporter = plugin("capturemanager"), plugin("terminalreporter")
    with nullcontext() if capture is None else capture.global_and_fixture_disabled():
        if hasattr(config, "workerinput"):  # a worker of xdist has no terminal
            print(f"vmsandbox: {text}", file=sys.stderr, flush=True)  # noqa: T201
        elif reporter is not None:
            reporter.write_line(f"vmsandbox: {text}")
