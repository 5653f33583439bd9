"""Resumes guests that were saved or paused. It corrects what is wrong in them, and checks that.

The clock of such a guest shows when it was saved. Its random numbers are the same as in other guests
that go on from there. If a test has set the clock, it keeps its difference to this host's clock. We
note that difference before the guest's CPUs stop. What a fault does to the clock is known exactly, and
goes on as if the CPUs had never stopped.
"""

from __future__ import annotations

import os
from dataclasses import replace

from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import ConfigError, GuestLost, VMSandboxError
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.reaching.helper import Helper
from pytest_vmsandbox.guests.running.together import Meet, alone
from pytest_vmsandbox.machine.machine import Machine

CLOCK_SECONDS = 0.05  # allowed error of a guest's clock when a test gets the guest
_CLOCK_TRIES = 20
_LEAD_TRIES = 3
_MEANT_SECONDS = 2.0  # a larger error means that a test has set the clock; a boot causes less
_SEED_BYTES = 64
_HOSTS = "127.0.0.1 localhost\n127.0.1.1 {}\n::1 localhost ip6-localhost ip6-loopback\n"


def from_state(machine: Machine, helper: Helper, meet: Meet = alone) -> None:
    """Resume a machine whose state was loaded. Its helper knows the lead of its clock.

    Args:
        meet: called right before its CPUs run.

    Raises:
        GuestLost: it does not answer, or something in it cannot be corrected.
    """
    helper.assume()
    meet()
    machine.resume()
    helper.seed(os.urandom(_SEED_BYTES))
    if helper.lead.is_free:
        helper.read_lead()  # this starts the timers, as setting it would
    else:
        set_clock(helper)


def rename(helper: Helper, hostname: str, *, in_files: bool) -> None:
    """Rename a guest that has the name of the saved guest.

    Args:
        in_files: whether the system also has its name in files.

    Raises:
        GuestLost: the guest could not be renamed.
    """
    helper.set_hostname(hostname)
    if in_files:
        helper.write_file("/etc/hostname", f"{hostname}\n".encode())
        helper.write_file("/etc/hosts", _HOSTS.format(hostname).encode())


def pause(
    machine: Machine, helper: Helper, timeout: float | None = None, meet: Meet = alone
) -> None:
    """Pause a machine that is in use. `from_pause` keeps the difference of its clock.

    Args:
        timeout: seconds for its helper to answer; None for the helper's default.
        meet: called right before its CPUs stop.

    Raises:
        GuestLost: it does not answer.
        ConfigError: a fault has frozen or suspended it.
    """
    if helper.is_away:
        raise ConfigError(
            "a guest that a fault keeps from answering cannot be saved",
            remedy="end the fault before the snapshot, or begin it in the block of the snapshot",
        )
    helper.lead = noted(machine, helper, timeout)
    meet()
    try:
        machine.pause()
    except BaseException as error:
        if not isinstance(error, VMSandboxError):  # after Ctrl-C, nobody else would resume it
            machine.resume()
        raise


def noted(machine: Machine, helper: Helper, timeout: float | None = None) -> Lead:
    """By how much a guest's clock is ahead of this host's: what faults do, and what a test has done by itself.

    Args:
        timeout: seconds for its helper to answer; None for the helper's default.

    Raises:
        GuestLost: it does not answer.
    """
    now = wall()
    lead = helper.lead.after_resets(_resets(machine)) if helper.lead.drifts else helper.lead
    if lead.is_free:
        return lead
    by_hand = measured(helper, timeout) - replace(lead, seconds=0.0).at(now)
    return replace(lead, seconds=by_hand if abs(by_hand) >= _MEANT_SECONDS else 0.0)


def _resets(machine: Machine) -> list[float]:
    """When a machine was reset, in seconds since the epoch."""
    return [
        event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        for event in machine.monitor.events()
        if event["event"] == "RESET"
    ]


def measured(helper: Helper, timeout: float | None = None) -> float:
    """The seconds by which a guest's clock is ahead of this host's now, as exactly as we can find out.

    Raises:
        GuestLost: it does not answer within `timeout` seconds.
    """
    least, most = helper.read_lead(timeout)
    for _ in range(_LEAD_TRIES - 1):
        if most - least <= CLOCK_SECONDS:
            break
        least, most = min((least, most), helper.read_lead(timeout), key=_width)
    return (least + most) / 2


def _width(span: tuple[float, float]) -> float:
    return span[1] - span[0]


def from_pause(machine: Machine, helper: Helper, meet: Meet = alone) -> None:
    """Resume a paused machine.

    Args:
        meet: called right before its CPUs run.

    Raises:
        GuestLost: it does not answer, or its clock cannot be set.
    """
    meet()
    if helper.lead.is_free:
        machine.resume()
        helper.read_lead()  # this starts the timers, as setting it would
        return
    started, number = wall(), helper.send_clock()  # the request waits there until the CPUs run
    machine.resume()
    if helper.clock_error(number, started) > CLOCK_SECONDS:
        set_clock(helper)


def set_clock(helper: Helper) -> None:
    """Set a guest's clock to this host's time plus its lead, and check it.

    Raises:
        GuestLost: the clock cannot be set.
    """
    errors = []
    for _ in range(_CLOCK_TRIES):
        errors.append(helper.set_clock())
        if errors[-1] <= CLOCK_SECONDS:
            return
    raise GuestLost(
        f"the guest's clock is wrong by {min(errors):.3f} s and cannot be corrected",
        stage="command",
        remedy="this machine may be overloaded: run fewer guests or workers at a time",
    )
