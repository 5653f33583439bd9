"""Makes the forks of a guest: it is sealed, and several clones go on from there."""

from __future__ import annotations

import os
from contextlib import ExitStack

from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.cloning.making import Clone
from pytest_vmsandbox.guests.cloning.sealing import Sealed, clone_of, sealed
from pytest_vmsandbox.guests.forks import Forks
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.leasing import leased, retried
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.together import in_threads


def forked(backend: Backend, engine: Engine, count: int) -> Forks[Guest]:
    """Guests that go on from a running one. They end with it at the latest.

    Raises:
        VMSandboxError: the guest cannot be sealed, or a clone of it cannot be made.
    """
    with ExitStack() as stack:
        moment = sealed(backend, engine, stack)
        clones = _clones(backend, moment, count, stack)
        guests = []
        for clone in clones:
            backend.callbacks.guest_begun(clone.machines.name)
            its = backend.engine(clone.machines)
            its.spec, its.origin = moment.spec, "cloned"
            guest = Guest(stack.enter_context(its))
            guests.append(stack.enter_context(leased(backend, guest)))
        forks = Forks(guests, stack.pop_all())
        engine.machines.forks.push(forks.__exit__)
        return forks


def _clones(backend: Backend, moment: Sealed, count: int, stack: ExitStack) -> list[Clone]:
    """Clones of a sealed guest, several at a time. `stack` ends them.

    Raises:
        VMSandboxError: one of them cannot be made.
    """

    def made() -> Clone:
        return retried(backend, lambda: clone_of(backend, moment))

    futures = in_threads([made] * count, min(count, os.cpu_count() or 1))
    for future in futures:
        if future.exception() is None:
            stack.push(future.result().stack)
    return [future.result() for future in futures]
