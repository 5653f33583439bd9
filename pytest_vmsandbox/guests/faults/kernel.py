"""A kernel that panics or gets an NMI, and a hardware watchdog."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Self, get_args

from pytest_vmsandbox.core.errors import ConfigError, GuestLost
from pytest_vmsandbox.guests.faults import outage
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.faults.outage import Outage
from pytest_vmsandbox.guests.faults.watchdog import Action, Watchdog
from pytest_vmsandbox.guests.reaching.commands import is_number
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Running
from pytest_vmsandbox.machine import stages
from pytest_vmsandbox.machine.machine import Machine

_LOOK_SECONDS = 0.2
_PANIC = "echo c >/proc/sysrq-trigger"
# With a restart after {} seconds. If nothing comes of it, all is as before.
_RESTARTS = f"""
read -r former </proc/sys/kernel/panic
echo {{}} >/proc/sys/kernel/panic || exit
{_PANIC}
status=$?
echo "$former" >/proc/sys/kernel/panic
exit $status
"""


class KernelFaults:
    """The part of `Faults` that is about its kernel."""

    engine: Engine

    def nmi(self) -> Fault:
        """Inject an NMI (non-maskable interrupt). Linux writes about it to its log.

        It happens once, so there is nothing to end.

        Returns:
            A `Fault` that is over.

        Raises:
            MonitorError: this machine has no NMI.
        """
        return Nmi(self.engine, "NMI").begin()

    def panic(self, *, reboots: int | None = None) -> Fault:
        """Let the guest's kernel panic, and wait until it has.

        Calls that need the guest raise `GuestLost` meanwhile, and it is not `alive`. At the end, it is
        switched off and on again.

        Args:
            reboots: seconds after which the kernel restarts by itself, as ``kernel.panic`` says. At the
                end, this waits until the guest answers again. With None, the guest stands still.

        Raises:
            CommandTimeout: its kernel did not panic.
            ConfigError: QEMU would not hear of the panic on this architecture, so ``reboots`` cannot work.
            BootError: at the end: it did not come up.
        """
        if reboots is not None and (not is_number(reboots, int) or reboots < 1):
            raise ConfigError(
                f"reboots={reboots!r} is invalid", remedy="use whole seconds, such as reboots=1"
            )
        return Panic(self.engine, reboots).begin()

    def watchdog(self, action: Action = "reset", *, seconds: int = 30) -> Watchdog:
        """Plug in a hardware watchdog (``i6300esb``), and wait until the guest has ``/dev/watchdog``.

        It starts to count when a program opens ``/dev/watchdog``. If nobody writes to it in time, QEMU
        does what ``action`` says. At the end, it is unplugged. It takes one of the four root ports of the
        guest, which attached disks use, too. No snapshot can be taken meanwhile.

        Args:
            action: ``reset``, ``shutdown`` (the power button), ``poweroff`` (the plug), ``pause``,
                ``inject-nmi`` or ``none``.
            seconds: after which it acts, from 1 to 2046.

        Returns:
            A `Fault` that has the method ``fired`` to wait for it.

        Raises:
            ConfigError: an argument is invalid, the guest's kernel has no driver, or no port is free.
            CommandTimeout: the guest does not find it.
        """
        if action not in get_args(Action):
            raise ConfigError(
                f"a watchdog cannot do {action!r}", remedy=f"use {', '.join(get_args(Action))}"
            )
        if not is_number(seconds, int) or not 1 <= seconds <= 2046:
            raise ConfigError(
                f"seconds={seconds!r} is invalid", remedy="use whole seconds, from 1 to 2046"
            )
        return Watchdog(self.engine, action, seconds).begin()


class Nmi(Fault):
    """An NMI was injected."""

    def begin(self) -> Self:
        """Inject it. Nothing is in force afterwards."""
        with self._engine.explained():
            self._check_guest()
            self._start()
        self.lapse()
        return self

    def _start(self) -> None:
        with self._engine.use() as running:
            running.machine.check()
            running.machine.execute("inject-nmi")
        self._engine.machines.faults.note(self.text)

    def _stop(self) -> None:
        """Nothing is left of it."""


class Panic(Outage):
    """The guest's kernel has panicked."""

    def __init__(self, engine: Engine, reboots: int | None) -> None:
        after = "" if reboots is None else f", restart after {reboots} s"
        super().__init__(engine, f"kernel panic{after}")
        self._reboots = reboots
        self._running: Running | None = None
        self._since = 0
        self._has_come = False

    def _start(self) -> None:
        engine = self._engine
        script = _PANIC
        if self._reboots is not None:
            if not engine.machines.blueprint.architecture.panic:
                raise ConfigError(
                    f"{engine.name} cannot restart after a panic: its architecture has no device for panics",
                    remedy="leave out reboots=, or use an image such as debian-13",
                )
            script = _RESTARTS.format(self._reboots)
        with engine.orderly, engine.use(hold=True) as running, ExitStack() as undo:
            machine = running.machine
            machine.check()
            if self._reboots is not None:
                undo.callback(_pauses_again, machine)
                machine.execute("set-action", {"panic": "none"})
            self._running, self._since = running, len(machine.monitor.events())
            size = machine.console.size
            process = outage.provoked(
                engine,
                running,
                script,
                lambda: _has_panicked(machine, self._since, size),
                what="panic",
                needs="its kernel needs CONFIG_MAGIC_SYSRQ, and /proc must be mounted",
            )
            if process is not None:
                process.close()
            self._has_come = True
            undo.pop_all()
            if self._reboots is not None:
                machine.console.begin_boot()
                running.hang_up()

    def _stop(self) -> None:
        engine, running = self._engine, self._running
        if running is None:
            return
        if self._reboots is not None and running is engine.running and engine.loss is None:
            try:
                if self._has_come:
                    outage.await_reset(engine, running, self._since)
            finally:
                _pauses_again(running.machine)
            return
        if running is engine.running:
            engine.power_cut()
        if not engine.is_on:
            engine.power_on()


def _pauses_again(machine: Machine) -> None:
    """Let a panic pause the guest, as always: so it is noticed."""
    with suppress(GuestLost):  # its next machine does so
        machine.execute("set-action", {"panic": "pause"})


def _has_panicked(machine: Machine, since: int, size: int) -> bool:
    """Whether a kernel has panicked since then. It waits for a moment.

    Args:
        since: the number of events before.
        size: of the console before. A kernel without the driver for pvpanic reports it there only.
    """
    if machine.monitor.wait_event("GUEST_PANICKED", since=since, timeout=_LOOK_SECONDS):
        return True
    return stages.PANIC_END in machine.console.own[size:]
