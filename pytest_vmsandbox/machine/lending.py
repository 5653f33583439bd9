"""Lends QEMU files that we have open. It opens none by a name of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from pytest_vmsandbox.core.errors import GuestLost, MonitorError
from pytest_vmsandbox.machine import cmdline
from pytest_vmsandbox.machine.filters import Execute, lend


@contextmanager
def lent(execute: Execute, file: IO[bytes]) -> Iterator[str]:
    """A name by which QEMU can open a file that we have open, while this lasts."""
    number = lend(execute, file)
    try:
        yield f"/dev/fdset/{number}"
    finally:
        with suppress(MonitorError, GuestLost):  # QEMU is gone; the next command reports it
            execute("remove-fd", {"fdset-id": number})


@contextmanager
def state_address(execute: Execute, version: tuple[int, ...], file: IO[bytes]) -> Iterator[str]:
    """The address of an open file for a state. It is valid until QEMU has opened the file."""
    if not cmdline.saves_to_file_addresses(version):
        execute("getfd", {"fdname": "state"}, fd=file.fileno())
        yield "fd:state"
        return
    with lent(execute, file) as name:
        yield f"file:{name}"
