"""Who listens in a guest, as its kernel tells in ``/proc/net`` (pure)."""

from __future__ import annotations

import ipaddress
from typing import Literal

Protocol = Literal["tcp", "udp"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_STATES = {"tcp": "0A", "udp": "07"}  # of a socket that waits for anybody


def files(protocol: Protocol) -> tuple[str, str]:
    """The files to read; the second one is missing where there is no IPv6."""
    return f"/proc/net/{protocol}", f"/proc/net/{protocol}6"


def addresses(text: str, port: int, protocol: Protocol) -> list[Address]:
    """The addresses at which sockets wait for anybody at a port.

    Args:
        text: the content of `files`. Lines in it that are none of the kernel's are skipped.
    """
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) > 3 and words[3] == _STATES[protocol]:
            digits, _, number = words[1].partition(":")
            try:
                if int(number, 16) == port:
                    found.append(_address(digits))
            except ValueError:
                continue
    return found


def is_reached(address: Address) -> bool:
    """Whether a socket at this address hears the guest's network."""
    mapped = getattr(address, "ipv4_mapped", None)
    return not (mapped or address).is_loopback


def _address(digits: str) -> Address:
    """An address as the kernel writes it: words of 32 bits, each with its lowest byte first."""
    data = bytes.fromhex(digits)
    words = [data[start : start + 4][::-1] for start in range(0, len(data), 4)]
    return ipaddress.ip_address(b"".join(words))
