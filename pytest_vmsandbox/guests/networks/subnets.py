"""Addresses on a network: which ones users may write, and who gets which one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Literal, TypeVar, get_args

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import one_of

Addressing = Literal["fixed", "dhcp"]
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,29}[a-z0-9])?")
_MOST_MEMBERS = 1000
_Subnet = TypeVar("_Subnet", IPv4Network, IPv6Network)
_V4 = [IPv4Network(f"10.{number}.0.0/24") for number in range(1, 256)]
_V6 = [IPv6Network(f"fd00:{number:x}::/64") for number in range(1, 256)]
_UNUSABLE = [  # systems refuse these addresses, or use them for something else
    *(IPv4Network(it) for it in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")),
    *(IPv6Network(it) for it in ("::/64", "fe80::/10", "ff00::/8")),
]
_RUN_OWN = IPv4Network("10.0.2.0/24")  # of each guest's first card


@dataclass(frozen=True, kw_only=True)
class Subnets:
    """The addresses of a network. Member 1 has the first address of both subnets, and so on.

    The last address of the IPv4 subnet is for the DHCP server.
    """

    ipv4: IPv4Network
    ipv6: IPv6Network

    @property
    def size(self) -> int:
        """How many members it can have."""
        return min(self.ipv4.num_addresses - 3, self.ipv6.num_addresses - 1, _MOST_MEMBERS)

    @property
    def server(self) -> IPv4Address:
        """The address of the DHCP server."""
        return self.ipv4[-2]

    def addresses(self, number: int) -> tuple[IPv4Address, IPv6Address]:
        """The addresses of a member."""
        return self.ipv4[number], self.ipv6[number]

    def number(self, address: object) -> int:
        """The member that an address is for.

        Raises:
            ConfigError: it is for none.
        """
        try:
            wanted = ip_address(address)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(
                f"address={address!r} is not an IP address",
                remedy=f"write for instance {str(self.ipv4[1])!r}",
            ) from error
        subnet = self.ipv4 if wanted.version == 4 else self.ipv6
        number = int(wanted) - int(subnet.network_address)
        if wanted not in subnet or not 1 <= number <= self.size:
            last = self.addresses(self.size)[0 if wanted.version == 4 else 1]
            raise ConfigError(
                f"{wanted} cannot be the address of a guest in {subnet}",
                remedy=f"use one from {subnet[1]} to {last}",
            )
        return number

    def overlaps(self, other: Subnets) -> bool:
        """Whether some addresses are in both."""
        return self.ipv4.overlaps(other.ipv4) or self.ipv6.overlaps(other.ipv6)


def checked_settings(
    ipv4: object, ipv6: object, addresses: object, seed: object, taken: Collection[Subnets] = ()
) -> tuple[Subnets, Addressing, int]:
    """The settings of a network, as users write them: its subnets, the kind of its addresses, its seed.

    Args:
        taken: the subnets of the other networks.

    Raises:
        ConfigError: one is invalid.
    """
    addressing: Addressing = one_of(get_args(Addressing), addresses, "addresses")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed={seed!r} is not a whole number", remedy="use for instance seed=1")
    return subnets_of(ipv4, ipv6, taken), addressing, seed


def subnets_of(ipv4: object, ipv6: object, taken: Collection[Subnets]) -> Subnets:
    """The subnets that a user asks for.

    Args:
        ipv4, ipv6: as users write them; None for one that no other network of the run has.
        taken: those of the other networks.

    Raises:
        ConfigError: one is invalid, too small, or is that of each guest's first card.
    """
    four = _ipv4(ipv4) if ipv4 is not None else _free(_V4, [it.ipv4 for it in taken])
    six = _ipv6(ipv6) if ipv6 is not None else _free(_V6, [it.ipv6 for it in taken])
    found = Subnets(ipv4=four, ipv6=six)
    if four.overlaps(_RUN_OWN):
        raise ConfigError(
            f"ipv4={str(four)!r} overlaps {_RUN_OWN}, which is the network of each guest's first card",
            remedy="use another subnet, such as '10.1.0.0/24'",
        )
    if found.size < 2:
        raise ConfigError(
            f"{four if four.num_addresses < six.num_addresses else six} is too small for a network",
            remedy="use a subnet with at least 8 addresses, such as '10.1.0.0/29' and 'fd00:1::/64'",
        )
    return found


def _free(candidates: Sequence[_Subnet], taken: Sequence[_Subnet]) -> _Subnet:
    """The first of some subnets that overlaps none of those that are taken; if all do, the last one."""
    free = (it for it in candidates if not any(it.overlaps(other) for other in taken))
    return next(free, candidates[-1])


def _ipv4(value: object) -> IPv4Network:
    return _read(IPv4Network, value, "ipv4", "10.1.0.0/24")


def _ipv6(value: object) -> IPv6Network:
    return _read(IPv6Network, value, "ipv6", "fd00:1::/64")


def _read(kind: type[_Subnet], value: object, what: str, example: str) -> _Subnet:
    try:
        subnet = kind(value if isinstance(value, kind) else str(value))
    except ValueError as error:
        raise ConfigError(
            f"{what}={value!r} is not a subnet: {error}", remedy=f"write for instance {example!r}"
        ) from error
    if any(isinstance(it, kind) and subnet.overlaps(it) for it in _UNUSABLE):
        raise ConfigError(
            f"{what}={str(subnet)!r} cannot be the subnet of a network",
            remedy=f"write for instance {example!r}",
        )
    return subnet


def checked_name(name: object) -> str:
    """The name of a network, as users write it.

    Raises:
        ConfigError: it is invalid.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a network",
            remedy="use 1 to 31 lower-case letters, digits and '-', such as 'lan': guests get names such as "
            "db1.lan there",
        )
    return name


def mac_of(network: str, number: int) -> str:
    """The MAC address of a member. On every network of that name, it is the same.

    Who gets the address of another guest that is gone gets its MAC address, too: so what others remember
    of it stays right.
    """
    digest = hashlib.sha256(network.encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x52, 0x56, *digest[:2], *number.to_bytes(2, "big")))
