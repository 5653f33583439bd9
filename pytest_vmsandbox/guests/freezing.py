"""Saves a guest at one moment, in whatever state it is, and lets it go on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pytest_vmsandbox.core.errors import GuestLost, MonitorError
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.running import resume
from pytest_vmsandbox.guests.running.machines import Machines, Running
from pytest_vmsandbox.guests.running.together import Meet, alone
from pytest_vmsandbox.machine.disk import Disks
from pytest_vmsandbox.machine.machine import Machine

_MORE = 1 << 20  # bytes, more than QEMU writes at once
_ANSWER_SECONDS = 0.5  # on a usual host with KVM; a guest that takes longer is saved as it is


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A guest at one moment. Its memory is in a file, unless it has none.

    Attributes:
        disks: its disks. Nobody writes to their files any more, and only the caller closes them.
        has_memory: whether the file has its state and memory.
        has_helper: whether its helper answered.
        answers: whether programs can be started in it: by its helper, or by SSH if it never had one.
        lead: by how much its clock had to be ahead of this host's.
        console: what it had written to its console.
        variables: of its UEFI firmware; empty without it.
        tpm: the files of its TPM: name → content.
        more_args: further arguments of its QEMU.
    """

    disks: Disks
    has_memory: bool
    has_helper: bool
    answers: bool
    lead: Lead
    console: str
    variables: bytes
    tpm: Mapping[str, bytes]
    more_args: tuple[str, ...]


def freeze(
    machines: Machines,
    running: Running | None,
    state: Path,
    stack: ExitStack,
    meet: Meet = alone,
) -> Frozen:
    """Save a guest. If its CPUs ran, they run again. A paused guest stays paused.

    Nobody may switch it on or off meanwhile.

    Args:
        running: what runs; None if it is off.
        state: a new file for its state and memory. There is none afterwards if the guest is off, or if QEMU
            cannot save all of it.
        stack: closes the files of the disks.
        meet: called right before its CPUs stop, and right before they run again, if they ran.

    Raises:
        MonitorError, GuestLost: QEMU cannot do it, for instance because the disk is full.
    """
    if running is not None and running.machine.ended() is None:
        try:
            return _freeze_running(machines, running, state, stack, meet)
        except (MonitorError, GuestLost):
            if running.machine.ended() is None:
                raise
            state.unlink(missing_ok=True)  # it was incomplete when QEMU ended
    console = "" if running is None else running.machine.console.saved
    return _frozen(machines, None, stack, console=console)


def _freeze_running(
    machines: Machines, running: Running, state: Path, stack: ExitStack, meet: Meet
) -> Frozen:
    machine = running.machine
    was_running = machine.execute("query-status")["status"] == "running"
    # A guest that rests is paused, and has answered before.
    if was_running:
        has_helper = _paused(running, meet)
    else:
        has_helper = running.resting and running.helper is not None
    try:
        has_memory = not machines.unsaved
        frozen = _frozen(
            machines,
            machine,
            stack,
            has_memory=has_memory,
            has_helper=has_helper,
            answers=has_helper
            or ((was_running or running.resting) and _is_without_helper(running)),
            lead=running.resident.lead,
            console=machine.console.saved,
        )
        if has_memory:
            _save(machine, state)
    finally:
        if was_running:
            _resume(running, meet, has_helper=has_helper)
    return frozen


def _save(machine: Machine, state: Path) -> None:
    """Write state and memory to a new file. If that fails, its room is free before the guest goes on."""
    with state.open("xb", buffering=0) as file:
        try:
            machine.save(file, with_memory=True)
        except MonitorError as error:
            if why := _unwritable(file):
                raise MonitorError(f"its memory could not be written: {why}") from error
            raise
        finally:
            if sys.exception() is not None:
                file.truncate(0)


def _unwritable(file: IO[bytes]) -> str:
    """Why nothing more can be written to a file; empty if it can. QEMU does not always say it."""
    try:
        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, _MORE)
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


def _paused(running: Running, meet: Meet) -> bool:
    """Pause what runs. Returns whether its helper answered before."""
    machine, helper = running.machine, running.helper
    if helper is not None:
        try:
            resume.pause(machine, helper, running.blueprint.stretch(_ANSWER_SECONDS), meet)
        except GuestLost:
            if machine.ended() is not None:
                raise
        else:
            return True
    meet()
    machine.pause()
    return False


def _is_without_helper(running: Running) -> bool:
    """Whether a guest never had a helper, so that SSH is the way into it."""
    return running.helper is None and running.blueprint.has_way_in


def _resume(running: Running, meet: Meet, *, has_helper: bool) -> None:
    helper = running.helper
    if has_helper and helper is not None:
        resume.from_pause(running.machine, helper, meet)
    else:
        meet()
        running.machine.resume()


def _frozen(
    machines: Machines,
    machine: Machine | None,
    stack: ExitStack,
    *,
    has_memory: bool = False,
    has_helper: bool = False,
    answers: bool = False,
    lead: Lead = Lead(),  # noqa: B008  # it cannot be changed
    console: str = "",
) -> Frozen:
    """What is frozen of a guest that is paused, or off."""
    variables = b""
    if (flash := machines.disks.flash) is not None:
        number = flash.variables.fileno()
        variables = os.pread(number, os.fstat(number).st_size, 0)
    spec = machines.spec() if machine is None else machine.spec
    return Frozen(
        disks=machines.freeze_disks(machine).frozen(stack),  # the guest may close its own sooner
        has_memory=has_memory,
        has_helper=has_helper,
        answers=answers,
        lead=lead,
        console=console,
        variables=variables,
        tpm=machines.tpm_files(),
        more_args=spec.more_args,
    )
