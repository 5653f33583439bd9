"""Waits until a guest's init has started what it should. A guest may answer long before."""

from __future__ import annotations

from pytest_vmsandbox.catalogue.definition import Init
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import BootError, CommandTimeout
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.machine.stages import EMERGENCY

_STARTED_SECONDS = 300.0  # on a usual host with KVM
_EMERGENCY_STATE = "maintenance"
# Process 1 writes down each run level, and then runs `rc` for it.
_RUN_LEVEL = """
is_busy() {
    for file in /proc/[0-9]*/stat; do
        read -r line <"$file" && case $line in *" (rc) "[!ZX]*) return 0 ;; esac
    done 2>/dev/null
    case $(runlevel 2>&1) in unknown*) return 0 ;; *) return 1 ;; esac
}
calm=0
while [ $calm -lt 2 ]; do
    if is_busy; then calm=0; else calm=$((calm + 1)); fi
    sleep 0.2
done
"""
# What tells the state of each init when all has been started, and waits for that.
_STATES: dict[Init, tuple[str, ...]] = {
    "systemd": ("systemctl", "is-system-running", "--wait"),
    "sysvinit": ("/bin/sh", "-c", _RUN_LEVEL),
}
# What failed, and what systemd said about it: a unit that waited for a failed one did not fail itself.
_CAUSES = """
systemctl --failed --plain --no-legend
journalctl -b _PID=1 -p warning -o cat -n 20
:
"""


def await_started(guest: Guest, init: Init) -> None:
    """Wait until all has started, or has failed to. Nothing is known of inits other than these two.

    Raises:
        BootError: systemd is in emergency or rescue mode.
    """
    if init not in _STATES:
        return
    deadline = Deadline(guest.engine.stretch(_STARTED_SECONDS))
    try:
        state = guest.run(_STATES[init], check=False, timeout=deadline.seconds, user="root").stdout
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
