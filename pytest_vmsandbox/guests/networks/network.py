"""Networks between guests, as users hold them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import MappingProxyType
from typing import Literal, overload

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.lasting import Lasting
from pytest_vmsandbox.core.spec import one_of
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.networks.links import (
    Capture,
    Direction,
    LinkFault,
    NetworkFault,
    Unplugged,
    conditions_of,
    cuts,
    rules_of,
    text_of,
)
from pytest_vmsandbox.guests.networks.subnets import Addressing, Subnets, mac_of
from pytest_vmsandbox.guests.reaching.commands import StrPath
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.machine.cards import Card
from pytest_vmsandbox.machine.switch.switch import Port, SwitchNetwork


@dataclass(eq=False)
class Seat:
    """A guest's place on a network: its card there, and the cable to the switch.

    Attributes:
        network: the network.
        name: of the guest.
        number: by which it has its addresses, from 1 on.
        card: its card.
        engine: the guest; None before it is admitted.
        knows: the names that the guest has.
        cable: held while the cable is pulled or put in.
    """

    network: Network
    name: str
    number: int
    card: Card
    engine: Engine | None = None
    knows: str = ""
    cable: threading.Lock = field(default_factory=threading.Lock)
    _port: Port | None = None

    def connect(self) -> socket.socket | None:
        """QEMU's end of a new cable. The caller closes it."""
        if self._port is not None and (self.engine is None or not self.engine.is_on):
            self._port.close()  # otherwise the guest moves, and its old QEMU may have to go on
        self._port = self.network.switch.port(self.name, place=str(self.number))
        return self._port.socket

    def close(self) -> None:
        """Cut the cable."""
        if self._port is not None:
            self._port.close()

    def check(self) -> None:
        """Check that the network still carries frames, unless it is over.

        Raises:
            LaunchError: its switch is gone.
        """
        self.network.switch.check()

    def lines(self) -> list[str]:
        """The addresses of this guest with its names, as ``/etc/hosts`` has them."""
        names = f"{self.name} {self.name}.{self.network.name}"
        addresses = filter(None, (self.card.ipv4, self.card.ipv6))
        return [f"{address.partition('/')[0]} {names}" for address in addresses]


class HasNetworks:
    """The part of `Guest` that is about networks."""

    name: str
    engine: Engine

    @property
    def networks(self) -> Mapping[str, Network]:
        """The private networks that the guest is on, by name and in the order of its cards. Each is a `Network`.

        Example::

            @pytest.mark.vm("tiny", networks=["lan"])
            def test_a_neighbour(vm, vm_factory):
                lan = vm.networks["lan"]
                with vm_factory.boot("tiny", networks=[lan]) as other:
                    vm.run(["ping", "-c1", lan.name_of(other)])
        """
        places = self.engine.machines.cards
        return MappingProxyType(
            {it.network.name: it.network for it in places if isinstance(it, Seat)}
        )


class Network(Lasting):
    """A private network between guests. `GuestFactory.network` makes it.

    Guests join it when they are booted: ``boot("debian-13", networks=[lan])``. It reaches nothing but
    these guests. A context manager: at its end, or at that of the run, it is gone.

    Attributes:
        name: its name.
        ipv4: its subnet of IPv4.
        ipv6: its subnet of IPv6.
        addresses: ``fixed`` or ``dhcp``.
        switch: what carries the frames. Not part of the public interface: it changes without notice.
    """

    def __init__(
        self, name: str, subnets: Subnets, addresses: Addressing, switch: SwitchNetwork
    ) -> None:
        self.name = name
        self.ipv4, self.ipv6 = subnets.ipv4, subnets.ipv6
        self.addresses = addresses
        self.switch = switch
        self.subnets = subnets
        self.is_over = False
        self._seats: list[Seat] = []
        self.own = ExitStack()  # ends what belongs to it
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Network {self.name} {self.ipv4} {self.ipv6} guests={len(self._seats)}>"

    def end(self) -> None:
        """End it. Guests that are still on it keep their cards, and reach nobody there. A second call does
        nothing.

        Raises:
            LaunchError: the switch was gone before. So what a test has seen of this network proves nothing.
        """
        with self._lock, ExitStack() as stack:
            self.is_over = True
            stack.callback(self.switch.close)
            stack.push(self.own)
            for seat in list(self._seats):
                stack.callback(self.leave, seat)

    # -- who is on it -----------------------------------------------------------------------------

    @overload
    def address(self, guest: HasNetworks, version: Literal[4] = ...) -> IPv4Address: ...
    @overload
    def address(self, guest: HasNetworks, version: Literal[6]) -> IPv6Address: ...
    def address(self, guest: HasNetworks, version: Literal[4, 6] = 4) -> IPv4Address | IPv6Address:
        """The address of a guest on this network.

        Args:
            version: 4 or 6.

        Raises:
            ConfigError: the guest is not on this network, or has no such address.
        """
        if version not in (4, 6):
            raise ConfigError(f"version={version!r} is no version of IP", remedy="use 4 or 6")
        if version == 6 and self.addresses == "dhcp":
            raise ConfigError(
                f"the network {self.name!r} gives no IPv6 addresses, because it has addresses='dhcp'",
                remedy="use addresses='fixed', or the addresses fe80::… that the guests give themselves",
            )
        return self.subnets.addresses(self.seat_of(guest).number)[0 if version == 4 else 1]

    def interface(self, guest: HasNetworks) -> str:
        """The guest's name for its card on this network, such as ``enp28s0``.

        Raises:
            ConfigError: the guest is not on this network, or nobody could ask it.
        """
        seat = self.seat_of(guest)
        if not seat.card.interface:
            raise ConfigError(
                f"nobody could ask {guest.name} for the interface of its card on {self.name}",
                remedy=f"look for the card with the address {seat.card.mac} in the guest",
            )
        return seat.card.interface

    def name_of(self, guest: HasNetworks) -> str:
        """The name by which all guests of this network know a guest.

        Raises:
            ConfigError: the guest is not on this network.
        """
        return self.seat_of(guest).name

    def seat_of(self, guest: HasNetworks) -> Seat:
        """The place of a guest.

        Raises:
            ConfigError: it is not on this network, or the network is over.
        """
        self._check_open()
        for seat in self._seats:
            if seat.engine is not None and seat.engine is getattr(guest, "engine", None):
                return seat
        if not isinstance(guest, HasNetworks):
            raise TypeError(f"a network takes guests, not {type(guest).__name__}")
        raise ConfigError(
            f"{guest.name} is not on the network {self.name!r}",
            remedy="boot it with networks=[…]; on it are: "
            + (", ".join(seat.name for seat in self._seats) or "no guests"),
        )

    # -- what is wrong with it --------------------------------------------------------------------

    def link(
        self,
        guest: HasNetworks,
        *,
        latency: float | None = None,
        jitter: float | None = None,
        loss: float | None = None,
        duplicate: float | None = None,
        reorder: float | None = None,
        rate: str | float | None = None,
        direction: Direction = "both",
    ) -> Fault:
        """Let the link of a guest be bad from now on. This is a fault: see `Fault`.

        Several faults on one way add up: latencies are added, a frame must survive each loss, and the
        lowest rate limits. Frames that are on their way are not concerned.

        Args:
            latency: seconds that each frame is late. With ``both``, a ping takes twice that.
            jitter: up to so many seconds more. Frames keep their order.
            loss, duplicate, reorder: the share of frames that are lost, arrive twice, or arrive after the
                next one; from 0 to 1.
            rate: bits per second, from 100 on: ``"10Mbit"``, or a number. What waits longer than 0.25 s is lost.
            direction: ``to`` the guest, ``from`` it, or ``both``.

        Raises:
            ConfigError: the guest is not on this network, or an argument is invalid.

        Example::

            with lan.link(b, latency=0.05, loss=0.1):
                a.run(["ping", "-c3", lan.name_of(b)], check=False)
        """
        seat = self.seat_of(guest)
        conditions = conditions_of(
            latency=latency,
            jitter=jitter,
            loss=loss,
            duplicate=duplicate,
            reorder=reorder,
            rate=rate,
        )
        way, rules = rules_of(seat.name, conditions, direction)
        text = f"link to {self.name}: {text_of(conditions, way)}"
        return LinkFault(guest.engine, text, self.switch, rules).begin()

    def partition(
        self,
        side: HasNetworks | Sequence[HasNetworks],
        other: HasNetworks | Sequence[HasNetworks],
        *,
        one_way: bool = False,
    ) -> Fault:
        """Let no frame pass between two sides from now on. This is a fault: see `Fault`.

        Args:
            side, other: a guest, or several. Each side is whole in itself.
            one_way: whether only what ``side`` sends is lost, and ``other`` is still heard.

        Raises:
            ConfigError: a guest is not on this network, or is on both sides.

        Example::

            with lan.partition(leader, [b, c]):
                ...
        """
        one_of((True, False), one_way, "one_way")
        sides = [
            [self.seat_of(guest) for guest in ([it] if isinstance(it, HasNetworks) else it)]
            for it in (side, other)
        ]
        first, second = ([seat.name for seat in seats] for seats in sides)
        if not first or not second:
            raise ConfigError(
                "a partition needs a guest on each side", remedy="write partition(a, [b, c])"
            )
        if both := sorted(set(first) & set(second)):
            raise ConfigError(
                f"{', '.join(both)} cannot be on both sides of a partition",
                remedy="name each guest once",
            )
        sign = "→" if one_way else "|"
        text = f"partition of {self.name}: {' '.join(first)} {sign} {' '.join(second)}"
        engine = sides[0][0].engine
        assert engine is not None
        rules = cuts(first, second, one_way=one_way)
        return LinkFault(engine, text, self.switch, rules).begin()

    def unplug(self, guest: HasNetworks) -> Fault:
        """Pull a guest's cable out. Its carrier is 0 then. This is a fault: see `Fault`.

        The cable stays out if the guest is switched off and on, and until the last fault that has it out ends.

        Raises:
            ConfigError: the guest is not on this network.
            LaunchError: the switch is gone.
        """
        seat = self.seat_of(guest)
        text = f"cable out of {self.name}"
        return Unplugged(guest.engine, text, self.switch, seat.card, seat.cable).begin()

    def capture(self, path: StrPath) -> Capture:
        """Write all frames that guests send from now on into a file, as pcap.

        Frames are captured as they were sent, before anything on the way happens to them. The file takes
        256 MiB at most.

        Returns:
            A context manager, at whose end the file is complete. ``end()`` does the same, and the end of the
            network or of the run does so, too. Frames are in the file before guests have them.

        Raises:
            ConfigError: the network is over.
            OSError: ``path`` cannot be written.
            LaunchError: the switch is gone.
        """
        self._check_open()
        capture = Capture(self.switch, Path(path))
        self.own.callback(capture.end)
        return capture

    # -- joining and leaving ----------------------------------------------------------------------

    def seat(
        self, name: str, *, card: Card | None = None, port: str = "", address: object = None
    ) -> Seat:
        """A place for a guest, which `admit` completes.

        Args:
            name: of the guest.
            card: that of a saved guest, which goes on with it.
            port: a free root port, if there is no such card.
            address: that the guest wants; None for the lowest one that is free.

        Raises:
            ConfigError: the name or the address is taken or impossible, or the network is full or over.
        """
        with self._lock:
            self._check_open()
            if any(seat.name == name for seat in self._seats):
                raise ConfigError(
                    f"there is already a guest {name} on the network {self.name!r}",
                    remedy="name each guest and each network once",
                )
            if card is not None:
                address = card.ipv4.partition("/")[0]
            number = self._number(address)
            if card is None:
                four, six = self.subnets.addresses(number)
                card = Card(
                    network=self.name,
                    port=port,
                    mac=mac_of(self.name, number),
                    ipv4=f"{four}/{self.ipv4.prefixlen}",
                    ipv6=f"{six}/{self.ipv6.prefixlen}" if self.addresses == "fixed" else "",
                )
            seat = Seat(self, name, number, card)
            self._seats.append(seat)
            return seat

    def _check_open(self) -> None:
        if self.is_over:
            raise ConfigError(
                f"the network {self.name!r} is over",
                remedy="make another one: vm_factory.network()",
            )

    def _number(self, address: object) -> int:
        taken = {seat.number: seat for seat in self._seats}
        if address is not None:
            number = self.subnets.number(address)
            if number in taken:
                raise ConfigError(
                    f"{address} is the address of {taken[number].name} on the network {self.name!r}",
                    remedy="use another address, or let the network choose one",
                )
            return number
        for number in range(1, self.subnets.size + 1):
            if number not in taken:
                return number
        raise ConfigError(
            f"the network {self.name!r} has {len(taken)} guests, and no address for one more",
            remedy="use a larger subnet, such as ipv4='10.1.0.0/16'",
        )

    def leave(self, seat: Seat) -> None:
        """Let a guest leave. Its card stays, on no network. Others know its name until the next one joins.

        What was wrong with its links is over, and a later guest of its name has none of that. A partition stays in
        force between the others.
        """
        with self._lock:
            if seat not in self._seats:
                return
            self._seats.remove(seat)
            others = {it.name: it.engine for it in self._seats if it.engine is not None}
        with ExitStack() as stack:
            stack.callback(seat.close)
            for entry in seat.engine.machines.faults.in_force if seat.engine else ():
                fault = entry.fault
                if not isinstance(fault, NetworkFault) or fault.switch is not self.switch:
                    continue  # it has nothing to do with this network
                if not fault.pass_on(others):
                    stack.callback(fault.end)
            for entry in (
                it for engine in others.values() for it in engine.machines.faults.in_force
            ):
                if isinstance(entry.fault, LinkFault) and entry.fault.switch is self.switch:
                    stack.callback(entry.fault.forget, seat.name)

    def lines(self) -> list[str]:
        """The names of all guests, as ``/etc/hosts`` has them."""
        with self._lock:
            return [line for seat in self._seats for line in seat.lines()]

    def address_of(self, mac: str) -> IPv4Address | None:
        """The address of the guest that has a card with this MAC address; None if there is none."""
        for seat in list(self._seats):
            if seat.card.mac == mac:
                return self.subnets.addresses(seat.number)[0]
        return None

    def others(self, seat: Seat) -> list[Seat]:
        """The places of other guests."""
        with self._lock:
            return [other for other in self._seats if other is not seat]
