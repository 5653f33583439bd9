"""Threads that do something at the same time, or at one moment."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from functools import partial
from typing import Any

import pytest

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.guests.running.together import Meet, in_step, in_threads


def test_all_wait_for_each_other():
    done = []

    def work(name, meet):
        done.append(name)
        meet()
        found = set(done)
        meet()
        return name, found

    names = ["a", "b", "c"]
    assert in_step([partial(work, name) for name in names]) == [
        (name, set(names)) for name in names
    ]


def test_nobody_waits_for_one_that_fails():
    left = []

    def fails(_):
        raise ValueError("mine")

    def works(meet):
        meet()
        left.append(True)

    with pytest.raises(ValueError, match="mine"):
        in_step([works, fails, works])
    assert left == [True, True]


def test_nobody_waits_for_one_that_has_returned():
    """The others still wait for each other."""
    done: list[object] = []

    def leaves(_: Meet) -> None:
        done.append("leaves")

    def works(name: str, meet: Meet) -> None:
        for step in range(3):
            done.append((name, step))
            meet()
            assert {("a", step), ("b", step)} <= {*done}

    everybody: list[Callable[[Meet], None]] = [partial(works, "a"), leaves, partial(works, "b")]
    in_step(everybody)
    assert len(done) == 7


def waits(ended, has_begun=lambda: None):
    """Wait without an end, as for a guest that does not boot."""
    try:
        has_begun()
        while True:
            Deadline(60).pause(0.01)
    except KeyboardInterrupt:
        Deadline(60).pause(0.01)  # what cleans up has its time
        ended.append(True)
        raise


def ctrl_c(begun):
    """Press Ctrl-C when all have begun, and the main thread waits for them."""
    begun.wait()
    main = threading.main_thread().ident or 0
    while True:
        top, *others = codes(sys._current_frames()[main])
        if top is threading.Condition.wait.__code__ and wait.__code__ in others:
            break
        time.sleep(0.01)
    signal.pthread_kill(main, signal.SIGINT)


def codes(frame):
    return [frame.f_code, *codes(frame.f_back)] if frame else []


def test_all_give_up_after_ctrl_c():
    ended, begun = [], threading.Barrier(3)
    interrupts = threading.Thread(target=ctrl_c, args=[begun])
    interrupts.start()
    with pytest.raises(KeyboardInterrupt):
        in_threads([partial(waits, ended, begun.wait)] * 3, 2)
    interrupts.join()
    assert ended == [True, True]


def test_a_second_ctrl_c_waits_until_all_have_ended():
    ended, begun = [], threading.Barrier(2)

    def unwinds():
        try:
            waits([], begun.wait)
        finally:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            Deadline(60).pause(0.05)
            ended.append(True)

    interrupts = threading.Thread(target=ctrl_c, args=[begun])
    interrupts.start()
    with pytest.raises(KeyboardInterrupt):
        in_threads([unwinds], 1)
    assert ended == [True]
    interrupts.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_all_give_up_after_ctrl_c_while_one_waits_for_others():
    ended, begun = [], threading.Barrier(3)
    interrupts = threading.Thread(target=ctrl_c, args=[begun])

    def meets(meet):
        begun.wait()
        meet()
        ended.append(True)

    interrupts.start()
    with pytest.raises(KeyboardInterrupt):
        in_step([lambda _: waits(ended, begun.wait), meets])
    interrupts.join()
    assert ended == [True, True]


def test_all_or_none():
    ended, has_begun = [], threading.Event()

    def fails():
        assert has_begun.wait(60)
        raise ValueError("mine")

    works: list[Any] = [partial(waits, ended, has_begun.set), fails, partial(waits, ended)]
    first, second, third = in_threads(works, 2, all_or_none=True)
    assert isinstance(first.exception(), KeyboardInterrupt)
    assert isinstance(second.exception(), ValueError)
    assert third.cancelled() or isinstance(third.exception(), KeyboardInterrupt)
    assert ended
