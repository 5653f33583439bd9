"""A guest at one moment, for snapshots and forks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.running.ledger import Entry
from pytest_vmsandbox.machine.disk import Disks


@dataclass(frozen=True)
class Saved:
    """The state of a guest, memory included, and its disks at that moment.

    Attributes:
        state: a file.
        disks: the disks. Nobody writes to their files any more.
        lead: by how much its clock had to be ahead of this host's.
        held: whether it must not be paused.
        console: what it had written to its console.
        blueprint: what it was made of: another QEMU may not load its state.
        faults: those that were in force.
    """

    state: IO[bytes]
    disks: Disks
    lead: Lead
    held: bool
    console: str
    blueprint: Blueprint
    faults: list[Entry]
