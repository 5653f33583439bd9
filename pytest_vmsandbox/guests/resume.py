"""Resumes guests: what is wrong in one that was saved, or paused, is put right, and checked.

Its clock stands at the moment in which it was saved, and its random numbers are those of every
other guest that goes on from there. What a test has done to its clock is kept: that is noted before
its processors stop.
"""

from __future__ import annotations

import os

from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import GuestLost
from pytest_vmsandbox.guests.helper import Helper
from pytest_vmsandbox.machine.machine import Machine

CLOCK_SECONDS = 0.05  # by which a guest's clock may be wrong when a test gets it
_CLOCK_TRIES = 20
_LEAD_TRIES = 3
_MEANT_SECONDS = 2.0  # by which a clock is wrong because somebody has set it; a boot makes less
_SEED_BYTES = 64
_HOSTS = "127.0.0.1 localhost\n127.0.1.1 {}\n::1 localhost ip6-localhost ip6-loopback\n"


def from_state(machine: Machine, helper: Helper) -> None:
    """Let a machine go on whose state was loaded; its helper knows the lead of its clock.

    Raises:
        GuestLost: it does not answer, or something in it cannot be put right.
    """
    helper.assume()
    machine.resume()
    helper.seed(os.urandom(_SEED_BYTES))
    set_clock(helper)


def rename(helper: Helper, hostname: str, *, in_files: bool) -> None:
    """Give a guest a name other than that of the guest that was saved.

    Args:
        in_files: whether a boot gives the system its name in files, too.

    Raises:
        GuestLost: it could not be given.
    """
    helper.set_hostname(hostname)
    if in_files:
        helper.write_file("/etc/hostname", f"{hostname}\n".encode())
        helper.write_file("/etc/hosts", _HOSTS.format(hostname).encode())


def pause(machine: Machine, helper: Helper, timeout: float | None = None) -> None:
    """Pause a machine that somebody uses; `from_pause` keeps what was done to its clock.

    Args:
        timeout: seconds for its helper to answer; None for the helper's patience.

    Raises:
        GuestLost: it does not answer.
    """
    helper.lead = _lead(helper, timeout)
    machine.pause()


def _lead(helper: Helper, timeout: float | None) -> float:
    """By how many seconds somebody has set a guest's clock ahead of this host's."""
    least, most = helper.read_lead(timeout)
    for _ in range(_LEAD_TRIES - 1):
        if most - least <= CLOCK_SECONDS:
            break
        least, most = min((least, most), helper.read_lead(timeout), key=_width)
    lead = (least + most) / 2
    return lead if abs(lead) >= _MEANT_SECONDS else 0.0


def _width(span: tuple[float, float]) -> float:
    return span[1] - span[0]


def from_pause(machine: Machine, helper: Helper) -> None:
    """Let a machine go on that ran before and has been paused since.

    Raises:
        GuestLost: it does not answer, or its clock cannot be set.
    """
    started, number = wall(), helper.send_clock()  # it waits there when the processors go on
    machine.resume()
    if helper.clock_error(number, started) > CLOCK_SECONDS:
        set_clock(helper)


def set_clock(helper: Helper) -> None:
    """Set a guest's clock to this host's, or as far ahead as it was, and see that it is right.

    Raises:
        GuestLost: it cannot be set.
    """
    errors = []
    for _ in range(_CLOCK_TRIES):
        errors.append(helper.set_clock())
        if errors[-1] <= CLOCK_SECONDS:
            return
    raise GuestLost(
        f"the clock of the guest is wrong by {min(errors):.3f} s, and cannot be set right",
        stage="command",
        remedy="the host may have too much to do",
    )
