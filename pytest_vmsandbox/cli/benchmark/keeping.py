"""Measurements of kept guests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from pytest_vmsandbox.cli.benchmark.guests import Result, Setup, first_command, median
from pytest_vmsandbox.guests.entering import entered
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.keeping import Keeper, KeepError
from pytest_vmsandbox.guests.kept import Moment, key_of

_SAMPLES = 10
_NO_LIMIT = 1 << 60


def snapshot_save(setup: Setup) -> Result:
    """Save a clone as a snapshot does, until it goes on."""
    with setup.factory("demand") as factory:
        return _saved(setup, factory, lambda guest: guest.engine.save())


def keep(setup: Setup) -> Result:
    """Keep a clone as a failed test's guest, until it goes on."""
    moment = _moment("bench_keep")
    with setup.factory("demand") as factory:
        keeper = Keeper(factory.backend, limit=_NO_LIMIT, tell=setup.say)
        try:
            return _saved(setup, factory, lambda guest: keeper.keep(guest, moment))
        finally:
            keeper.close()
            keeper.forget(key_of(moment))


def _saved(setup: Setup, factory: GuestFactory, save: Callable[[Guest], object]) -> Result:
    samples = []
    for _ in range(setup.at_most(_SAMPLES)):
        with setup.guest(factory, "cloned") as guest:
            first_command(guest)
            began = time.perf_counter()
            save(guest)
            samples.append((time.perf_counter() - began) * 1000)
            first_command(guest)
    return median(samples)


def enter(setup: Setup) -> Result:
    """Enter a kept guest, until its first command ends."""
    moment = _moment("bench_enter")
    samples = []
    with setup.factory("demand") as factory:
        keeper = Keeper(factory.backend, limit=_NO_LIMIT, tell=setup.say)
        try:
            with setup.guest(factory, "cloned") as guest:
                first_command(guest)
                keeper.keep(guest, moment)
            (outcome,) = keeper.close()
            if outcome.kept is None:
                raise outcome.error or KeepError("the kept guest was removed meanwhile")
            for _ in range(setup.at_most(_SAMPLES)):
                began = time.perf_counter()
                with entered(factory, outcome.kept) as guest:
                    first_command(guest)
                    samples.append((time.perf_counter() - began) * 1000)
        finally:
            keeper.close()
            keeper.forget(key_of(moment))
    return median(samples)


def _moment(name: str) -> Moment:
    """A moment of this process: two that measure at the same time do not share a kept guest."""
    return Moment(
        nodeid=name, rootdir=f"/{os.getpid()}", number=1, phase="call", outcome="passed", error=""
    )
