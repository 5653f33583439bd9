"""Guests join networks: they get their cards, their addresses, and the names of all others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from pytest_vmsandbox.core.errors import ConfigError, VMSandboxError
from pytest_vmsandbox.guests.networks.network import HasNetworks, Network, Seat
from pytest_vmsandbox.guests.networks.setup import hosts_text, set_up
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.machine import cabling
from pytest_vmsandbox.machine.cards import Card, Connected

G = TypeVar("G", bound=HasNetworks)


@contextmanager
def joined(guest: HasNetworks, wanted: object) -> Iterator[None]:
    """A guest that runs is on these networks, until the end of the block. See `joined_all`."""
    with joined_all({guest: wanted}):
        yield


@contextmanager
def joined_all(wanted: Mapping[G, object]) -> Iterator[None]:
    """Guests that run are on networks, until the end of the block. They are set up at the same time.

    Args:
        wanted: the networks of each guest; a mapping has an address for each network, or None.

    Raises:
        ConfigError: a guest cannot join one of them.
        GuestLost, CommandTimeout: a guest does not answer.
    """
    with ExitStack() as stack:
        seats = {guest: _seated(guest, _checked(its), stack) for guest, its in wanted.items()}
        _set_up_all({guest: its for guest, its in seats.items() if its})
        yield


def _seated(
    guest: HasNetworks, addresses: Mapping[Network, object], stack: ExitStack
) -> list[Seat]:
    """The places of a guest, with its cards. `stack` lets it leave."""
    machines = guest.engine.machines
    seats: list[Seat] = []
    for network, address in addresses.items():
        name = machines.hostname or machines.name
        if seats:
            _await_card(guest.engine, seats[-1].card)
        seat = network.seat(name, port=_free_port(machines), address=address)
        stack.callback(network.leave, seat)
        _plug(guest.engine, seat)
        seats.append(seat)
    return seats


def admit(guest: HasNetworks, seats: Sequence[Seat]) -> None:
    """Admit a guest that has its cards. One that was saved has its addresses and all names, too."""
    guest.engine.machines.on_answer.append(partial(_again, guest.engine))
    for seat in seats:
        seat.engine = guest.engine


def _set_up_all(seats: Mapping[G, Sequence[Seat]]) -> None:
    """Admit guests, give them their addresses, and let all know their names.

    Raises:
        ConfigError: a guest lacks what this needs.
        GuestLost, CommandTimeout: a guest does not answer.
    """

    def set_up_one(guest: G) -> None:
        with guest.engine.explained():
            _set_up(guest.engine)

    if not seats:
        return
    for guest, its in seats.items():
        admit(guest, its)
    with ThreadPoolExecutor(min(len(seats), os.cpu_count() or 1)) as threads:
        for done in [threads.submit(set_up_one, guest) for guest in seats]:
            done.result()
    for seat in (seat for its in seats.values() for seat in its):
        for other in seat.network.others(seat):
            _tell(other)


def _checked(wanted: object) -> dict[Network, object]:
    """The networks that a user names, and the address on each.

    Raises:
        ConfigError: they cannot be combined.
    """
    if isinstance(wanted, Network | str) or not isinstance(wanted, Sequence | Mapping):
        raise ConfigError(
            f"networks={wanted!r} is not a list of networks",
            remedy="write networks=[lan], with lan = vm_factory.network('lan')",
        )
    found: dict[Network, object] = {}
    for network in wanted:
        if not isinstance(network, Network):
            raise ConfigError(
                f"{network!r} is not a network", remedy="use what vm_factory.network() returned"
            )
        for other in found:
            if other.name == network.name:
                raise ConfigError(
                    f"a guest cannot be on two networks called {network.name!r}",
                    remedy="name each network once, or give them different names",
                )
            if other.subnets.overlaps(network.subnets):
                raise ConfigError(
                    f"the networks {other.name!r} and {network.name!r} have the same addresses, so one guest "
                    "cannot be on both",
                    remedy="give one of them other subnets: ipv4=, ipv6=",
                )
        found[network] = wanted[network] if isinstance(wanted, Mapping) else None
    return found


def _free_port(machines: Machines) -> str:
    if machines.blueprint.architecture.hot_plug != "port":
        raise ConfigError(
            f"{machines.name} cannot join a network: guests of {machines.blueprint.architecture.name} have "
            "no root ports for network cards",
            remedy="use an image such as debian-13",
        )
    return machines.free_port("another network card")


def _plug(engine: Engine, seat: Seat) -> None:
    """Plug a card into a guest that runs."""
    with engine.explained(), engine.orderly, engine.use() as running, ExitStack() as stack:
        running.machine.check()
        end = seat.connect()
        if end is not None:
            stack.enter_context(end)
        cabling.plug(running.machine.execute, Connected(seat.card, end))
        engine.machines.cards.append(seat)


def _await_card(engine: Engine, card: Card) -> None:
    """Wait until a guest has found a card. It names cards in the order in which it finds them."""
    if engine.has_helper:
        with engine.explained():
            set_up(engine, [card], hosts_text([]), dhcp=[card.mac])


def seats_of(engine: Engine) -> list[Seat]:
    """All places of a guest, in the order in which it has joined."""
    return [it for it in engine.machines.cards if isinstance(it, Seat)]


def _hosts(seats: Sequence[Seat]) -> str:
    return hosts_text([line for seat in seats for line in seat.network.lines()])


def _set_up(engine: Engine, *, fresh: bool = True) -> None:
    """Give a guest its addresses, if `fresh`, and the names of all others."""
    seats = seats_of(engine)
    if not engine.has_helper and all(seat.network.addresses == "dhcp" for seat in seats):
        return  # nobody needs to do anything in it
    cards = [seat.card for seat in seats] if fresh else []
    dhcp = {seat.card.mac for seat in seats if seat.network.addresses == "dhcp"}
    known = ""
    while (hosts := _hosts(seats)) != known:  # others may join meanwhile
        found = set_up(engine, cards, hosts, dhcp=dhcp)
        known = hosts
        cards = []
        for seat in seats:
            seat.knows = hosts
            seat.card = replace(seat.card, interface=found.get(seat.card.mac, seat.card.interface))


def _again(engine: Engine) -> None:
    """A guest answers after a start. What was saved has its addresses."""
    if (running := engine.running) is None:
        return
    fresh = running.restarted or not running.machine.spec.start.is_loaded
    returns = running.restarts.returns
    try:
        _set_up(engine, fresh=fresh)
    except VMSandboxError as error:
        if engine.running is not running or engine.loss is not None:
            return  # it is gone, or starts again
        if running.restarts.is_again_since(returns):
            return  # it is set up once more, and that tells whether it worked
        text = f"its networks could not be set up again: {error.brief}"
        engine.machines.faults.unrestored.append(text)
        engine.machines.faults.note(text)


def _tell(seat: Seat) -> None:
    """Tell a guest the names of all others. One that is off, or does not answer, hears them later."""
    engine = seat.engine
    running = None if engine is None else engine.running
    if engine is None or running is None or running.resident.is_away or running.restarts.goes_on:
        return
    if seat.knows != _hosts(seats_of(engine)):
        with suppress(VMSandboxError):
            _set_up(engine, fresh=False)
