"""Plugs network cards into a guest that runs, and pulls their cables."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from pytest_vmsandbox.core.errors import GuestLost, MonitorError
from pytest_vmsandbox.machine import cards
from pytest_vmsandbox.machine.cards import Card, Connected
from pytest_vmsandbox.machine.filters import Execute


def plug(execute: Execute, connected: Connected) -> None:
    """Plug a card into its root port. The guest finds it a moment later.

    Raises:
        MonitorError: QEMU cannot do it. Everything is as before then.
        GuestLost: QEMU is gone.
    """
    card, undo = connected.card, _nothing
    try:
        if connected.end is not None:
            execute("getfd", {"fdname": card.netdev}, fd=connected.end.fileno())
            undo = _undo(execute, "closefd", {"fdname": card.netdev})
            execute("netdev_add", cards.cable(card, card.netdev))
            undo = _undo(execute, "netdev_del", {"id": card.netdev})
        device = cards.properties(card, has_cable=connected.end is not None)
        execute("device_add", {**device, cards.QUIET: False})
    except BaseException:
        undo()
        raise


def set_link(execute: Execute, card: Card, *, up: bool) -> None:
    """Pull the cable out of a card, or put it in again. The guest sees that at its carrier.

    Raises:
        MonitorError: QEMU cannot do it.
        GuestLost: QEMU is gone.
    """
    execute("set_link", {"name": card.device, "up": up})


def _nothing() -> None:
    pass


def _undo(execute: Execute, command: str, arguments: dict[str, object]) -> Callable[[], None]:
    def undo() -> None:
        with suppress(MonitorError, GuestLost):
            execute(command, arguments)

    return undo
