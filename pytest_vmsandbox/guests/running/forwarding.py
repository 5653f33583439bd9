"""Forwards a port of a guest to this host, and checks whether something in the guest listens there."""

from __future__ import annotations

import errno
import ipaddress
import logging
import re
from typing import Literal

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import CommandError, CommandTimeout, ConfigError
from pytest_vmsandbox.guests.reaching.commands import Command, is_number, seconds
from pytest_vmsandbox.guests.running.engine import Engine

Protocol = Literal["tcp", "udp"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_STATES = {"tcp": "0A", "udp": "07"}  # of a socket that listens
_REMEDY = "\nRemedy: look in the guest whether the service runs (systemctl status NAME), or allow more time: timeout="
_LOG = logging.getLogger("pytest_vmsandbox")
_POLL_SECONDS = 0.25
_LISTENERS_SECONDS = 5.0


def forward(
    engine: Engine, port: int, protocol: Protocol, timeout: float | None
) -> tuple[str, int]:
    """Forward a port, as `Guest.forward` describes. It holds the guest.

    Raises:
        ConnectionRefusedError: nothing listens there within `timeout` seconds.
        ConfigError: `port` or `protocol` is invalid, or UDP is wanted and its network is not ``nat``.
        MonitorError: QEMU cannot do it.
    """
    if protocol not in ("tcp", "udp"):
        raise ConfigError(f"protocol={protocol!r} is unknown", remedy="use 'tcp' or 'udp'")
    if not is_number(port, int) or not 1 <= port <= 65535:
        raise ConfigError(f"{port!r} is not a {protocol.upper()} port", remedy="use 1 to 65535")
    if protocol == "udp" and engine.spec.network != "nat":
        raise ConfigError(
            f"UDP does not work with {engine.name}: answers of a guest leave it only with network='nat'",
            remedy="use a guest with network='nat', or use TCP",
        )
    deadline = Deadline(0 if timeout is None else seconds(timeout))
    with engine.use(hold=True) as running:
        here = running.machine.forward(port, protocol)
        while refusal := _refusal(engine, port, protocol):
            if timeout is None:
                _LOG.warning(
                    "%s. A connection to %s:%d ends at once; to wait for the service, pass timeout= to "
                    "forward()",
                    *(refusal, *here),
                )
                break
            if deadline.expired:
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"{refusal}{_REMEDY}")
            deadline.pause(_POLL_SECONDS)
        return here


def _refusal(engine: Engine, port: int, protocol: Protocol) -> str:
    """Why a connection to a port would be refused; empty if it would not, or we cannot know."""
    command = Command(argv=("cat", *files(protocol)))
    try:
        result = engine.run(command, timeout=engine.stretch(_LISTENERS_SECONDS))
    except (CommandError, CommandTimeout):
        return ""
    table = result.stdout.decode(errors="replace")
    found = addresses(table, port, protocol)
    if not table or any(map(is_reached, found)):
        return ""
    where = f"{protocol.upper()} port {port} of {engine.name}"
    if found:
        return (
            f"the service on {where} listens only on {found[0]}, which cannot be reached from outside: let "
            "it listen on 0.0.0.0"
        )
    return f"nothing listens on {where}"


def files(protocol: Protocol) -> tuple[str, str]:
    """The files to read. The second one is missing without IPv6."""
    return f"/proc/net/{protocol}", f"/proc/net/{protocol}6"


def addresses(text: str, port: int, protocol: Protocol) -> list[Address]:
    """The addresses of sockets that listen on a port.

    Args:
        text: the content of `files`. Other lines are skipped.
    """
    pattern = rf"^ *\d+: ([0-9A-F]{{8}}|[0-9A-F]{{32}}):{port:04X} [0-9A-F:]+ {_STATES[protocol]} "
    return [_address(digits) for digits in re.findall(pattern, text, re.MULTILINE)]


def is_reached(address: Address) -> bool:
    """Whether the guest's network reaches a socket at this address."""
    mapped = getattr(address, "ipv4_mapped", None)
    return not (mapped or address).is_loopback


def _address(digits: str) -> Address:
    """An address in the kernel's notation: words of 32 bits, each with its lowest byte first."""
    data = bytes.fromhex(digits)
    words = [data[start : start + 4][::-1] for start in range(0, len(data), 4)]
    return ipaddress.ip_address(b"".join(words))
