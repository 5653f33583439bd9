"""Moves a guest to another QEMU while it runs, and puts right there what does not move by itself."""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from pytest_vmsandbox.core.deadline import monotonic
from pytest_vmsandbox.core.errors import ConfigError, MonitorError, VMSandboxError
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.reaching.helper import Helper
from pytest_vmsandbox.guests.running import resume
from pytest_vmsandbox.guests.running.engine import Engine, settled
from pytest_vmsandbox.guests.running.machines import Machines, Running
from pytest_vmsandbox.machine import capture, forwards, moving
from pytest_vmsandbox.machine.cards import connected
from pytest_vmsandbox.machine.cmdline import MachineSpec, Start
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.qemu import Qemu

_SAFE_SINCE = (10, 0)  # for emulated guests: older QEMUs lose writes of a guest that is busy
_EVENT_SECONDS = 10.0
_LOG = logging.getLogger("pytest_vmsandbox")


@dataclass(frozen=True, kw_only=True)
class Move:
    """How a guest has moved.

    Attributes:
        source, target: the versions of both QEMUs, such as ``10.0.13``.
        seconds: from the start of the other QEMU to the end of the old one.
        gap: seconds for which the guest's CPUs stood still.
    """

    source: str
    target: str
    seconds: float
    gap: float


def move(engine: Engine, qemu: Qemu) -> Move:
    """Move a guest to another QEMU while it runs. If that fails, it goes on in its own.

    Raises:
        ConfigError: such a guest cannot be moved.
        LaunchError: the other QEMU does not start, or this host has no room for it.
        MonitorError: the guest cannot be moved.
        GuestLost: the guest is gone.
    """
    with settled(engine) as running:
        machine, machines = running.machine, engine.machines
        machine.check()
        source = machines.blueprint
        helper = _check(running, machines, qemu)
        blueprint = replace(source, qemu=qemu)
        spec = machines.spec(Start.RESTORED, blueprint)
        spec = replace(spec, generation=moving.generation_of(machine))
        machines.disk_failure(running)
        helper.lead = resume.noted(machine, helper)
        began, since = monotonic(), len(machine.monitor.events())
        try:
            _move(engine, running, spec, blueprint)
        except VMSandboxError:
            with suppress(VMSandboxError):  # the guest's clock has stood still
                if machine.execute("query-status")["status"] != "running":
                    resume.from_pause(machine, helper)
                elif not helper.lead.is_free:
                    resume.set_clock(helper)
            raise
        resume.from_pause(machine, helper)
        return Move(
            source=source.qemu.release,
            target=qemu.release,
            seconds=monotonic() - began,
            gap=_gap(machine, since),
        )


def _move(engine: Engine, running: Running, spec: MachineSpec, blueprint: Blueprint) -> None:
    """Move a guest. Its CPUs stand still afterwards."""
    machine, machines = running.machine, engine.machines
    hypervisor = machines.hypervisor
    ports = forwards.listed(machine.human(forwards.SHOW))
    with ExitStack() as stack:
        spec = replace(spec, cards=connected(machines.cards, stack))
        moved = moving.moved(machine, hypervisor, spec, disks=machines.disks, logs=machines.logs)
        other = stack.enter_context(moved)
        stack.enter_context(engine.still(running))
        machine.take_over(other)
        machines.blueprint = running.blueprint = blueprint
    running.leave_ssh()
    for lost in moving.forward_again(machine, ports):
        host, port = machine.forward(lost.port, lost.protocol)
        _LOG.warning(
            "port %d of %s is reached at %s:%d from now on: another program has taken %s:%d while it moved",
            *(lost.port, machines.name, host, port, lost.host, lost.here),
        )
    if machines.captures and machines.logs is not None:
        again = capture.capturing(machine, hypervisor.loop, machines.logs)
        running.stack.enter_context(again)
    machines.faults.switched_on(machine)


def _check(running: Running, machines: Machines, qemu: Qemu) -> Helper:
    """Check that a guest can be moved. Returns its helper.

    Raises:
        ConfigError: it cannot.
    """
    what = f"{machines.name} cannot be moved to another QEMU"
    blueprint = machines.blueprint
    own = blueprint.qemu
    if blueprint.verdict.accelerator == "tcg" and min(own.version, qemu.version) < _SAFE_SINCE:
        raise ConfigError(
            f"{what}: an emulated guest breaks when it moves away from QEMU {own.release} or to QEMU "
            f"{qemu.release} while it writes to its memory",
            remedy="use QEMU 10.0 or newer on both sides (VMSANDBOX_QEMU), or KVM",
        )
    series = ".".join(map(str, own.version[:2]))
    if qemu.version[:2] != own.version[:2] or qemu.version < own.version:
        raise ConfigError(
            f"{what}: it runs in QEMU {own.release}, and QEMU {qemu.release} may not understand what it saves",
            remedy=f"use the same version, or a newer one of the series {series}",
        )
    if machines.plugged:
        raise ConfigError(
            f"{what}: {' and '.join(machines.plugged)} is plugged in for a fault, and would not move along",
            remedy="end that fault before, or begin it after the move",
        )
    machines.faults.refuse_recorded(  # the new QEMU would not record
        what, "move it before crash_points begins, or after its block"
    )
    if running.machine.spec.tpm:
        raise ConfigError(
            f"{what}: it has a TPM, whose process does not move along",
            remedy="use a guest without one: tpm=False (marker vm, boot)",
        )
    if machines.memory is not None:
        raise ConfigError(
            f"{what} in a preparation: its memory becomes that of the template",
            remedy="move the guest in the test",
        )
    if running.resident.is_frozen or (
        running.machine.execute("query-status")["status"] != "running"
    ):
        raise ConfigError(
            f"{what}: it does not run",
            remedy="end the fault that has frozen it first",
        )
    if (helper := running.helper) is None:
        raise ConfigError(
            f"{what}: without a helper in the guest, its clock would be wrong afterwards, and its programs "
            "would lose their streams",
            remedy="use an image that has the helper, such as debian-13",
        )
    return helper


def _gap(machine: Machine, since: int) -> float:
    """Seconds for which the CPUs stood still, as both QEMUs tell it."""
    stop, go_on = (
        machine.monitor.wait_event(name, since=since, timeout=_EVENT_SECONDS)
        for name in ("STOP", "RESUME")
    )
    if stop is None or go_on is None:
        raise MonitorError("QEMU does not tell when the guest stood still", transient=True)
    began, ended = (
        event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        for event in (stop, go_on)
    )
    return float(ended - began)
