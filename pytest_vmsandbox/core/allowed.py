"""A network that is a list: the hosts and ports that a guest may reach, as users write them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from pytest_vmsandbox.core.errors import ConfigError

Address = IPv4Address | IPv6Address
THIS_MACHINE = "localhost"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}  # ways to write it
# The guest's own networks in QEMU, where no other host can be.
_GUESTS_NETWORKS = (ip_network("10.0.2.0/24"), ip_network("fec0::/64"))
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$)(?:{_LABEL}\.)*(?!\d+$){_LABEL}")
_MOST = 256


@dataclass(frozen=True, kw_only=True)
class Target:
    """A host and a port that a guest may reach by TCP.

    Attributes:
        host: a name in lower case; or an address; or `THIS_MACHINE`.
        port: 1 to 65535.
    """

    host: str | Address
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if isinstance(self.host, IPv6Address) else f"{self.host}"
        return f"{host}:{self.port}"


def targets(text: str) -> tuple[Target, ...]:
    """The targets in a text of words ``host:port``, sorted, without duplicates.

    Raises:
        ConfigError: a word is invalid.

    Example:
        >>> [str(it) for it in targets("example.org:443 [2001:db8::1]:80")]
        ['[2001:db8::1]:80', 'example.org:443']
    """
    found = {str(target): target for target in map(_target, text.split())}
    if len(found) > _MOST:
        raise ConfigError(
            f"network= lists {len(found)} hosts and ports", remedy=f"list at most {_MOST}"
        )
    return tuple(found[name] for name in sorted(found))


def canonical(words: Iterable[object]) -> str:
    """What users list, as one text, which `targets` understands.

    Raises:
        ConfigError: a word is invalid, or there is none.
    """
    listed = [*words]
    for word in listed:
        if not isinstance(word, str) or len(word.split()) != 1:
            raise _invalid(word)
    if not listed:
        raise ConfigError(
            "network=[] lists no host and port",
            remedy="for a guest that may reach none, use 'isolated'",
        )
    return " ".join(map(str, targets(" ".join(map(str, listed)))))


def _target(word: str) -> Target:
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s:\[\]]+)):(\d{1,5})", word.lower())
    if not match or not 1 <= (port := int(match[3])) <= 65535:
        raise _invalid(word)
    text = match[1] or match[2].removesuffix(".")
    if text in _LOOPBACK:
        return Target(host=THIS_MACHINE, port=port)
    try:
        address = ip_address(text)
    except ValueError:
        if match[1] or not _NAME.fullmatch(text):
            raise _invalid(word) from None
        return Target(host=text, port=port)
    if (
        address.is_loopback
        or address.is_unspecified
        or any(address in it for it in _GUESTS_NETWORKS)
    ):
        raise ConfigError(
            f"{word!r} cannot be in network=: {address} does not lead out of the guest's own network",
            remedy=f"for a port of this machine, write '{THIS_MACHINE}:{port}'. The guest reaches it at 10.0.2.2",
        )
    if address.is_multicast or address == IPv4Address("255.255.255.255"):
        raise ConfigError(
            f"{word!r} cannot be in network=: {address} is not the address of one host",
            remedy="list addresses of hosts",
        )
    return Target(host=address, port=port)


def _invalid(word: object) -> ConfigError:
    return ConfigError(
        f"{word!r} is not a host and a port that network= can list",
        remedy="write 'example.org:443', '192.0.2.1:443' or '[2001:db8::1]:443'. Ranges and '*' are not possible. "
        "Names that are not ASCII are written as xn--…",
    )
