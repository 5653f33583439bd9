"""Checks whether a booting guest makes progress, by its CPUs and its console."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import BootError
from pytest_vmsandbox.machine.machine import Machine

_LOOK_SECONDS = 0.5
_GUEST_TIME = 43  # of /proc/PID/stat, counted from 1; see proc(5)


def wait_for_user_space(machine: Machine, *, standstill: float, at_most: float) -> None:
    """Wait until a guest's kernel has started its first program.

    Args:
        standstill: seconds without progress after which the guest counts as hanging.
        at_most: seconds in all, even with progress.

    Raises:
        BootError: the guest hangs, is gone, or is too slow.
    """
    _wait(machine, partial(machine.reaches, "init"), "program", lambda _: standstill, at_most)


def wait_for_guest_time(
    machine: Machine, *, first: float, standstill: float, at_most: float
) -> None:
    """Wait until the host's CPUs have run a second of a guest's own code.

    This is for guests whose console may stay silent. If the host's kernel does not account that time,
    the guest's kernel has to write to the console.

    Args:
        first: seconds within which firmware must have begun to run.
        standstill: seconds without progress after which the guest counts as hanging. A boot loader may
            wait for keys.
        at_most: seconds in all, even with progress.

    Raises:
        BootError: the guest hangs, is gone, or is too slow.
    """

    def ran(timeout: float) -> bool:
        if (ticks := guest_time(machine.process.pid)) is None:
            return machine.reaches("kernel", timeout)
        if ticks >= os.sysconf("SC_CLK_TCK"):
            return True
        Deadline(timeout).pause(timeout)
        return False

    _wait(machine, ran, "system", lambda time: first if time == 0 else standstill, at_most)


def _wait(
    machine: Machine,
    is_there: Callable[[float], bool],
    what: str,
    standstill: Callable[[object], float],
    at_most: float,
) -> None:
    """Wait until something is there, as long as there is progress.

    Args:
        standstill: the seconds of a standstill, by the last sign of progress.
    """
    deadline = Deadline(at_most)
    signs, since = None, 0.0
    while not is_there(deadline.remaining(_LOOK_SECONDS)):
        machine.check_booting(deadline.elapsed)
        if deadline.expired:
            why = f"no {what} ran within {at_most:g} s"
            raise _never_ran(machine, why, deadline.elapsed)
        # While QEMU waits for a CPU of the host, there can be no progress.
        clock = deadline.elapsed - time_waited(machine.process.pid)
        if (now := _signs_of_progress(machine)) != signs:
            signs, since = now, clock
        elif clock - since >= (allowed := standstill(now)):
            why = f"the guest made no progress for {allowed:g} s"
            raise _never_ran(machine, why, deadline.elapsed)


def _never_ran(machine: Machine, why: str, seconds: float) -> BootError:
    return BootError(
        f"{machine.spec.name}: {why} ({machine.spec.accelerator})",
        stage=machine.stage,
        seconds=seconds,
        details=machine.console_lines(),
    )


def _signs_of_progress(machine: Machine) -> object:
    """A value that changes while the guest makes progress.

    If the host's kernel reports how long it has run the guest's own code, only that counts. KVM that
    emulates single instructions can run firmware, which writes to the console, but no kernel.
    """
    time = guest_time(machine.process.pid) if machine.spec.accelerator == "kvm" else None
    return (machine.console.size, machine.human("info registers")) if time is None else time


def guest_time(pid: int) -> int | None:
    """How long CPUs have run a guest's own code, in clock ticks; None if unknown.

    The host's kernel accounts it. If KVM has to emulate single instructions, it stays zero.
    """
    try:
        return parse_guest_time(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8"))
    except OSError:
        return None


def parse_guest_time(stat: str) -> int:
    """The guest's time in the kernel's statistics of a process."""
    fields = stat.rpartition(")")[2].split()  # what follows the second one, the program's name
    return int(fields[_GUEST_TIME - 3])


def time_waited(pid: int) -> float:
    """Seconds that a process has waited for a CPU: the longest of its threads."""
    waited = [0]
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            waited.append(int(file.read_text().split()[1]))
        except (OSError, IndexError):  # the thread is gone, or the kernel does not count
            continue
    return max(waited) / 1e9
