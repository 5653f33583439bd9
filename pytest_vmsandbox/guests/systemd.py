"""Waits until systemd in a guest has started what it should, and tells if it could not."""

from __future__ import annotations

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import BootError, CommandTimeout
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.machine.stages import EMERGENCY

_STARTED_SECONDS = 300.0  # on a usual host with KVM
_EMERGENCY_STATE = "maintenance"
_STATE = ("systemctl", "is-system-running", "--wait")
# What failed, and what systemd said about it: a unit that waited for a failed one did not fail itself.
_CAUSES = """
systemctl --failed --plain --no-legend
journalctl -b _PID=1 -p warning -o cat -n 20
:
"""


def await_started(guest: Guest) -> None:
    """Wait until all has started, or has failed to. A guest may answer long before.

    Raises:
        BootError: it is in emergency or rescue mode.
    """
    deadline = Deadline(guest.engine.stretch(_STARTED_SECONDS))
    try:
        state = guest.run(_STATE, check=False, timeout=deadline.seconds, user="root").stdout
    except CommandTimeout:
        return  # something starts for ever
    if state.strip() == _EMERGENCY_STATE:
        causes = guest.shell(_CAUSES, check=False, user="root").stdout
        raise BootError(
            f"{guest.engine.name}: {EMERGENCY.what}",
            stage=EMERGENCY.stage,
            seconds=deadline.elapsed,
            details=f"--- systemd in the guest\n{causes}" if causes else "",
            remedy=EMERGENCY.remedy,
        )
