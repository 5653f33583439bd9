"""Network cards that are plugged into the root ports of a guest, for networks between guests."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

_PORT = re.compile(r"port[0-9]")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
QUIET = "guest_announce"  # off: a saved guest that goes on announces itself to nobody


@dataclass(frozen=True, kw_only=True)
class Card:
    """A network card of a guest, and what the guest is called on that network.

    All values are texts, so they can be kept as JSON. A clone of the running guest needs all of them: the
    system in it knows the card by its port and its MAC address, and has these addresses.

    Attributes:
        network: the name of the network.
        port: the root port that it is in.
        mac: its MAC address, in lower case.
        ipv4, ipv6: with the length of the prefix, such as ``10.1.0.1/24``.
        interface: the guest's name for it, such as ``enp28s0``; empty if nobody has asked the guest.
    """

    network: str
    port: str
    mac: str
    ipv4: str
    ipv6: str
    interface: str = ""

    @classmethod
    def read(cls, record: Mapping[str, object]) -> Card:
        """A card from a record, which may be a stranger's.

        Raises:
            ValueError: no card can be so.
        """
        texts = {name: str(record[name]) for name in ("network", "ipv4", "ipv6", "interface")}
        card = cls(port=str(record["port"]), mac=str(record["mac"]), **texts)
        if not _PORT.fullmatch(card.port) or not _MAC.fullmatch(card.mac):
            raise ValueError("a network card of it is invalid")
        return card

    @property
    def device(self) -> str:
        """The id of the card in the monitor."""
        return f"card-{self.port}"

    @property
    def netdev(self) -> str:
        """The id of its cable in the monitor."""
        return f"cable-{self.port}"


@dataclass(frozen=True)
class Connected:
    """A card, and QEMU's end of its cable. Without one, the card is on no network."""

    card: Card
    end: socket.socket | None


class HasCard(Protocol):
    """A card in a port of a guest, which a new machine gets, too."""

    @property
    def card(self) -> Card:
        """The card."""

    def connect(self) -> socket.socket | None:
        """QEMU's end of a new cable; None for no network. The caller closes it. The former cable is cut."""

    def check(self) -> None:
        """Check that the network still carries frames, unless it is over.

        Raises:
            LaunchError: its switch is gone.
        """


@dataclass(frozen=True)
class Loose:
    """A card on no network."""

    card: Card

    def connect(self) -> None:
        """There is no cable."""

    def check(self) -> None:
        """There is no network."""


def connected(cards: Iterable[HasCard], ends: ExitStack) -> tuple[Connected, ...]:
    """Cards, each with QEMU's end of a new cable. `ends` closes these."""
    return tuple(
        Connected(it.card, ends.enter_context(end) if (end := it.connect()) else None)
        for it in cards
    )


def cable(card: Card, end: str) -> dict[str, str]:
    """A card's cable, as ``netdev_add`` takes it: on its socket, each frame comes after its length.

    Its successor ``stream`` has the same form, but cannot take a descriptor that was passed to the monitor.

    Args:
        end: the number of a descriptor of QEMU, or the name of one that was passed.
    """
    return {"type": "socket", "id": card.netdev, "fd": end}


def cable_argument(card: Card, number: int) -> str:
    """A card's cable, as ``-netdev`` takes it."""
    return f"socket,id={card.netdev},fd={number}"


def properties(card: Card, *, has_cable: bool) -> dict[str, str]:
    """A card as a device, but for `QUIET`."""
    return {
        "driver": "virtio-net-pci",
        "id": card.device,
        "bus": card.port,
        **({"netdev": card.netdev} if has_cable else {}),
        "mac": card.mac,
        "romfile": "",
    }
