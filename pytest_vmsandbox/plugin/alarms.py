"""Stops the limits on a test's time while we work for it, as when its guest is saved and looked at.

An alarm is an exception out of nowhere. In one of our hooks, it would end the whole run.
"""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pytest_vmsandbox.core.deadline import monotonic
from pytest_vmsandbox.plugin.plan import plan_of

_LIMIT = pytest.StashKey[tuple[Any, float] | None]()  # pytest-timeout's settings, and since when


@pytest.hookimpl(optionalhook=True, wrapper=True, tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Generator[None, object, object]:
    """Note pytest-timeout's limit. Tests inside guests have one of ours instead."""
    if not plan_of(item).is_inside:
        item.stash[_LIMIT] = settings, monotonic()
    return (yield)


@pytest.hookimpl(optionalhook=True, wrapper=True, tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> Generator[None, object, object]:
    """Forget pytest-timeout's limit."""
    item.stash[_LIMIT] = None
    return (yield)


def stop(item: pytest.Item) -> None:
    """Stop the limits for a test that has failed, as pytest and pytest-timeout do a little later."""
    config = item.config
    if config.pluginmanager.has_plugin("faulthandler") and config.getini("faulthandler_timeout"):
        faulthandler.cancel_dump_traceback_later()  # it may end this process
    if item.stash.get(_LIMIT, None) is not None:
        item.config.hook.pytest_timeout_cancel_timer(item=item)


@contextmanager
def paused(item: pytest.Item | None) -> Iterator[None]:
    """Stop alarms meanwhile: pytest-timeout's, by either of its methods, and a test's own."""
    with _thread_paused(item), _timer_paused():
        yield


@contextmanager
def _timer_paused() -> Iterator[None]:
    if not hasattr(signal, "setitimer"):
        yield
        return
    seconds, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, seconds, interval)


@contextmanager
def _thread_paused(item: pytest.Item | None) -> Iterator[None]:
    """Pause pytest-timeout's limit if a thread waits for it: that would end this process."""
    limit = None if item is None else item.stash.get(_LIMIT, None)
    if item is None or limit is None or limit[0].method != "thread":
        yield
        return
    item.config.hook.pytest_timeout_cancel_timer(item=item)
    settings, since = limit
    left = max(settings.timeout - (monotonic() - since), 0.001)
    try:
        yield
    finally:
        rest = settings._replace(timeout=left)
        item.config.hook.pytest_timeout_set_timer(item=item, settings=rest)
