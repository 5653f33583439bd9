"""A port of a guest, reached from this host; and whether a service of the guest listens there."""

from __future__ import annotations

import errno
import logging

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import CommandError, CommandTimeout, ConfigError
from pytest_vmsandbox.guests import commands, listening
from pytest_vmsandbox.guests.engine import Engine

_LOG = logging.getLogger("pytest_vmsandbox")
_POLL_SECONDS = 0.25
_LISTENERS_SECONDS = 5.0


def forward(
    engine: Engine, port: int, protocol: listening.Protocol, timeout: float | None
) -> tuple[str, int]:
    """Forward a port, as `Guest.forward` tells. It holds the guest.

    Raises:
        ConnectionRefusedError: nothing listens there within `timeout` seconds.
        ConfigError: `port` or `protocol` is none, or UDP is wanted of an isolated guest.
        MonitorError: QEMU cannot.
    """
    if protocol not in ("tcp", "udp"):
        raise ConfigError(f"protocol={protocol!r} is unknown", remedy="use 'tcp' or 'udp'")
    if not commands.is_number(port, int) or not 1 <= port <= 65535:
        raise ConfigError(f"{port!r} is not a {protocol.upper()} port", remedy="use 1 to 65535")
    if protocol == "udp" and engine.spec.network == "isolated":
        raise ConfigError(
            f"UDP does not reach {engine.name}: QEMU drops what an isolated guest answers",
            remedy="give it network='nat', or use TCP",
        )
    deadline = Deadline(0 if timeout is None else commands.seconds(timeout))
    with engine.use(hold=True) as running:
        here = running.machine.forward(port, protocol)
        while refusal := _refusal(engine, port, protocol):
            if timeout is None:
                _LOG.warning("%s: a connection to %s:%d ends at once", refusal, *here)
                break
            if deadline.expired:
                raise ConnectionRefusedError(errno.ECONNREFUSED, refusal)
            deadline.pause(_POLL_SECONDS)
        return here


def _refusal(engine: Engine, port: int, protocol: listening.Protocol) -> str:
    """Why a connection to a port would be refused; empty if it would not, or who knows."""
    command = commands.command(["cat", *listening.files(protocol)])
    try:
        result = engine.run(command, timeout=engine.stretch(_LISTENERS_SECONDS))
    except (CommandError, CommandTimeout):
        return ""
    table = commands.text_of(result).stdout
    found = listening.addresses(table, port, protocol)
    if not table or any(map(listening.is_reached, found)):
        return ""
    text = f"nothing listens on {protocol.upper()} port {port} of {engine.name}"
    if found:
        text += f" but on {found[0]}, which no network reaches; have it listen on 0.0.0.0"
    return text
