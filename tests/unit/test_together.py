"""Threads that do something at one moment."""

from collections.abc import Callable
from functools import partial

import pytest

from pytest_vmsandbox.guests.running.together import Meet, in_step


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
