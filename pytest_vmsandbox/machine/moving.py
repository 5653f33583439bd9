"""Moves a running guest to another QEMU, with its memory and its devices.

QEMU copies the memory while the guest runs. Then it stops the CPUs, and waits for us before it hands over
the devices. Both QEMUs have the same sockets for the console and the helper's port. So a byte that
nobody has read stays in the kernel, and the other QEMU reads it. For that, nothing may be on its way while
the devices are handed over: we keep everybody from sending, and wait until the old QEMU has nothing
to read or write any more.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import MonitorError, VMSandboxError
from pytest_vmsandbox.machine import forwards
from pytest_vmsandbox.machine.cmdline import MachineSpec
from pytest_vmsandbox.machine.disk import Disks
from pytest_vmsandbox.machine.forwards import Forward
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.port import is_empty, unread
from pytest_vmsandbox.machine.qmp import Event

_CHANNEL = "moving"
_BANDWIDTH = 1 << 40  # bytes a second: no limit
_GAP_MS = 300  # the guest is stopped when QEMU expects that the rest takes no longer
_ANY_GAP_MS = 2_000_000  # QEMU's limit
_PATIENCE_SECONDS = 10.0  # after which the guest is stopped, however much is left
_MOVE_SECONDS = 120.0
_BACK_SECONDS = 20.0
_LOOK_SECONDS = 0.25
_BACK_POLL_SECONDS = 0.02
_TYPED_SECONDS = 1.0
_CALM_LOOKS = 5  # each after QEMU has answered, so its main loop has run
_CPUS_STAND = {"finish-migrate", "postmigrate", "paused"}


@contextmanager
def moved(
    machine: Machine, hypervisor: Hypervisor, spec: MachineSpec, *, disks: Disks, logs: Path | None
) -> Iterator[Machine]:
    """Another QEMU, to which the guest has moved. Its CPUs stand still.

    The caller lets `machine` take it over before the end of the block. If anything fails, the guest goes on
    in its old QEMU.

    Raises:
        LaunchError: the other QEMU does not start, or this host has no room for it.
        MonitorError: the guest cannot be moved.
        GuestLost: the guest is gone.
    """
    with ExitStack() as stack:
        # A serial port takes a byte before its state is there. What nobody in the guest reads may lose
        # its first byte in that way.
        _await_typed(machine)
        stack.enter_context(machine.console.gate)
        with Machine.running(hypervisor, spec, disks=disks, logs=logs, follows=machine) as other:
            try:
                deadline = Deadline(hypervisor.pace.stretch(_MOVE_SECONDS))
                patience = Deadline(hypervisor.pace.stretch(_PATIENCE_SECONDS))
                since = _begin(machine, other)
                if machine.drives.fail_flushes:  # QEMU flushes when it stops the CPUs, or gives up
                    machine.pause()
                _await_stop(machine, other, since[machine], patience, deadline)
                stack.enter_context(machine.helper.gate)
                _settle(machine, deadline)
                machine.drives.make_savable()
                machine.execute("migrate-continue", {"state": "pre-switchover"})
                for its in (machine, other):
                    _await(machine, other, its, {"completed"}, since[its], deadline)
                yield other
            except BaseException as error:
                if machine.process is not other.process:
                    _go_back(machine, other, error)
                raise


def _begin(machine: Machine, other: Machine) -> dict[Machine, int]:
    """Begin to copy the memory. Returns the numbers of events before."""
    since = {}
    ends = dict(zip((other, machine), socket.socketpair(), strict=True))
    for its, end in ends.items():
        is_source = its is machine
        capabilities = {
            "events": True,
            "x-ignore-shared": False,
            "pause-before-switchover": is_source,
        }
        with end:
            _set(its, capabilities)
            since[its] = len(its.monitor.events())
            its.execute("getfd", {"fdname": _CHANNEL}, fd=end.fileno())
            if is_source:
                limits = {"max-bandwidth": _BANDWIDTH, "downtime-limit": _GAP_MS}
                its.execute("migrate-set-parameters", limits)
            its.execute("migrate" if is_source else "migrate-incoming", {"uri": f"fd:{_CHANNEL}"})
    return since


def _set(machine: Machine, capabilities: dict[str, bool]) -> None:
    wanted = [{"capability": name, "state": state} for name, state in capabilities.items()]
    machine.execute("migrate-set-capabilities", {"capabilities": wanted})


def _await_stop(
    machine: Machine, other: Machine, since: int, patience: Deadline, deadline: Deadline
) -> None:
    """Wait until the CPUs stand still, and only the devices are left."""
    status = {"pre-switchover"}
    if _await(machine, other, machine, status, since, patience, is_last=False) is None:
        # The guest writes faster than we copy.
        machine.execute("migrate-set-parameters", {"downtime-limit": _ANY_GAP_MS})
        _await(machine, other, machine, status, since, deadline)


def _await(
    machine: Machine,
    other: Machine,
    its: Machine,
    wanted: set[str],
    since: int,
    deadline: Deadline,
    *,
    is_last: bool = True,
) -> Event | None:
    """Wait until the migration has a status, as one of both sides (`its`) sees it.

    Args:
        is_last: whether to fail if it does not have it in time.
    """
    ends = wanted | {"failed", "cancelled"}
    while True:
        event = its.monitor.wait_event(
            "MIGRATION",
            since=since,
            timeout=deadline.remaining(_LOOK_SECONDS),
            among=lambda event: event["data"]["status"] in ends,
        )
        if event is not None and event["data"]["status"] in wanted:
            return event
        if event is not None or other.ended() is not None or machine.ended() is not None:
            raise MonitorError("the migration failed")
        if deadline.expired:
            if not is_last:
                return None
            raise MonitorError(
                f"the migration took longer than {deadline.seconds:g} s",
                remedy="this machine may be overloaded: run fewer guests or workers at a time",
                transient=True,
            )


def _await_typed(machine: Machine) -> None:
    """Wait until QEMU has read what was typed on the console, if the guest reads it."""
    deadline = Deadline(_TYPED_SECONDS)
    line = machine.console.line
    while line is not None and unread(line) and not deadline.expired:
        deadline.pause(_BACK_POLL_SECONDS)


def _settle(machine: Machine, deadline: Deadline) -> None:
    """Wait until the old QEMU reads and writes nothing more on console and port. Its CPUs stand still."""
    calm, before = 0, None
    console, port = machine.console, machine.helper
    while calm < _CALM_LOOKS:
        if deadline.expired:
            raise MonitorError("the old QEMU does not stop writing for the guest", transient=True)
        machine.execute("query-status")
        now = (console.size, port.received, port.unread, console.line and unread(console.line))
        is_still = port.is_still and (console.line is None or is_empty(console.line))
        calm = calm + 1 if is_still and now == before else 0
        before = now


def _go_back(machine: Machine, other: Machine, error: BaseException) -> None:
    """Let the guest go on in its old QEMU. The error gets what the other one has said."""
    with suppress(VMSandboxError):
        why = str(machine.execute("query-migrate").get("error-desc", ""))
        other.kill()
        if isinstance(error, MonitorError):
            said = [error.details, why, other.process.stderr_tail]
            error.details = "\n".join(filter(None, said))
        machine.execute("migrate_cancel")
        deadline = Deadline(_BACK_SECONDS)
        while machine.execute("query-migrate").get("status") not in (
            "failed",
            "cancelled",
            "completed",
        ):
            if deadline.expired:
                return
            deadline.pause(_BACK_POLL_SECONDS)
        if machine.execute("query-status")["status"] in _CPUS_STAND:
            machine.resume()
        _set(machine, {"pause-before-switchover": False})


def generation_of(machine: Machine) -> str:
    """The generation id of a guest. If it changed, the guest would take itself for a clone."""
    if not machine.spec.architecture.has_generation:
        return "auto"
    return str(machine.execute("query-vm-generation-id")["guid"])


def forward_again(machine: Machine, wanted: list[Forward]) -> list[Forward]:
    """Forward ports again, from the same ports of this host. Returns those that are taken here by now."""
    for it in wanted:
        machine.human(forwards.add_line(it.protocol, it.port, it.here))
    there = forwards.listed(machine.human(forwards.SHOW))
    return [it for it in wanted if it not in there]
