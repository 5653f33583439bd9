"""Clones of a whole sealed cluster: their machines go on together, on networks of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.cloning import pool
from pytest_vmsandbox.guests.cloning.making import Clone
from pytest_vmsandbox.guests.cloning.sealing import clones_of, go_on
from pytest_vmsandbox.guests.clusters.sealed import SealedCluster
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.leasing import retried
from pytest_vmsandbox.guests.networks.joining import admit
from pytest_vmsandbox.guests.networks.making import Networks
from pytest_vmsandbox.guests.networks.network import Network, Seat


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A clone of a cluster that nobody has used.

    Attributes:
        networks: by name.
        seats: the places of each machine on them, by its name.
        clones: of the machines, by name.
        is_armed: whether a program has run in each and they are paused; if not, they run.
        stack: ends everything.
    """

    networks: Mapping[str, Network]
    seats: Mapping[str, list[Seat]]
    clones: Mapping[str, Clone]
    is_armed: bool
    stack: ExitStack


class Clones:
    """The clones of one sealed cluster. From the second one on, the next one is armed ahead of demand.

    Like any armed clone, it ends if nobody asks for it for a while.
    """

    def __init__(self, backend: Backend, networks: Networks, sealed: SealedCluster) -> None:
        self._backend = backend
        self._networks = networks
        self._sealed = sealed
        self._count = 0
        self._next: Future[Whole] | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self._filler = ThreadPoolExecutor(1, thread_name_prefix="vmsandbox-cluster-filler")
        self._idle: threading.Timer | None = None  # ends the next one if nobody wants it

    def close(self) -> None:
        """End the clone that nobody has used."""
        with self._lock:
            self._is_closed = True
            self._filler.shutdown(cancel_futures=True)
        self._stay()
        self._end_next()

    def _stay(self) -> None:
        """Let the next one stay for now."""
        if (idle := self._idle) is not None:
            idle.cancel()
            idle.join()

    def _end_next(self) -> None:
        with self._lock:
            coming, self._next = self._next, None
        if coming is not None:
            wait([coming])
            if not coming.cancelled() and coming.exception() is None:
                coming.result().stack.close()

    @contextmanager
    def lent(self) -> Iterator[tuple[dict[str, Guest], Mapping[str, Network]]]:
        """The guests of a clone, which run, and its networks, by name. They are gone at the end.

        Raises:
            VMSandboxError: there can be no clone.
        """
        self._sealed.check()
        with ExitStack() as stack:
            whole = self._armed() or retried(self._backend, lambda: self._made(arm=False))
            stack.push(whole.stack)
            guests = {name: self._guest(name, whole, stack) for name in whole.clones}
            self._arm_next()
            yield guests, whole.networks

    def _guest(self, name: str, whole: Whole, stack: ExitStack) -> Guest:
        machines = whole.clones[name].machines
        self._backend.callbacks.guest_begun(machines.name)
        engine = self._backend.engine(machines)
        engine.spec = self._sealed.members[name].spec
        engine.origin = "armed" if whole.is_armed else "cloned"
        guest = Guest(stack.enter_context(engine))
        admit(guest, whole.seats[name])
        return guest

    def _armed(self) -> Whole | None:
        """The clone that was armed ahead. It runs. None if there is none that is good."""
        with self._lock:
            coming, self._next = self._next, None
        if coming is None:
            return None
        with (
            suppress(VMSandboxError),
            ExitStack() as stack,
        ):  # else the error of the next one counts
            whole = coming.result()
            stack.push(whole.stack)
            go_on(list(whole.clones.values()))
            return replace(whole, stack=stack.pop_all())
        return None

    def _arm_next(self) -> None:
        self._stay()
        with self._lock:
            self._count += 1
            wanted = self._count > 1 and self._backend.settings.clones == "armed"
            if not wanted or self._is_closed:  # clones that run go on
                return
            if self._next is None:
                self._next = self._filler.submit(self._made, arm=True)
            self._idle = threading.Timer(pool.IDLE_SECONDS, self._end_next)
            self._idle.daemon = True
            self._idle.start()

    def _made(self, *, arm: bool) -> Whole:
        members = self._sealed.members
        with ExitStack() as stack:
            networks = {
                name: stack.enter_context(self._networks.make(name, **settings))
                for name, settings in self._sealed.networks.items()
            }
            seats = {
                name: [networks[card.network].seat(name, card=card) for card in member.cards]
                for name, member in members.items()
            }
            wanted = [(member, seats[name]) for name, member in members.items()]
            clones = clones_of(self._backend, wanted, stack, arm=arm)
            return Whole(
                networks=networks,
                seats=seats,
                clones=dict(zip(members, clones, strict=True)),
                is_armed=arm,
                stack=stack.pop_all(),
            )
