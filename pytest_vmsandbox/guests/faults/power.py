"""The plug, the power button, reset and suspend."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pytest_vmsandbox.core.errors import CommandTimeout, ConfigError, MonitorError, VMSandboxError
from pytest_vmsandbox.guests.faults import outage
from pytest_vmsandbox.guests.faults.acpi import AcpiRegisters
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.faults.outage import Outage
from pytest_vmsandbox.guests.reaching import commands
from pytest_vmsandbox.guests.reaching.commands import ignore
from pytest_vmsandbox.guests.reaching.process import RemoteProcess
from pytest_vmsandbox.guests.running import resume
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Running
from pytest_vmsandbox.guests.running.root_programs import run_as_root
from pytest_vmsandbox.machine.qmp import Monitor

_LOOK_SECONDS = 0.25
# The button is an input device. A press is lost unless a program has opened it before.
_LISTEN = r"""
PATH=$PATH:/usr/sbin:/usr/bin:/sbin:/bin
modprobe -a button evdev 2>/dev/null
if [ -d /run/systemd/system ]; then
    udevadm settle --timeout=10
    systemctl start systemd-logind
elif ! pidof acpid; then
    acpid
fi >/dev/null 2>&1
for file in /sys/class/input/event*; do
    [ "$(cat "$file/device/name" 2>/dev/null)" = 'Power Button' ] || continue
    for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q "/dev/input/${file##*/}\$" && exit
        sleep 0.1
    done
done
:
"""
_ON_THE_BUTTON = (
    "the guest needs the drivers button and evdev, and a program that reads the button, such as systemd-logind "
    "or acpid. For a guest that should ignore it, pass timeout=0"
)
# The deep kind of sleep is S3. With the other kinds, QEMU does not hear of it.
_CAN_SUSPEND = "grep -qw mem /sys/power/state && grep -q deep /sys/power/mem_sleep"
_SUSPEND = "echo deep >/sys/power/mem_sleep && echo mem >/sys/power/state"


class PowerFaults:
    """The part of `Faults` that is about its power."""

    engine: Engine

    def power_cut(self) -> Fault:
        """Pull the plug, as `Guest.power_cut` does. At the end, the guest is switched on again.

        The fault is over when the test switches the guest on itself.

        Raises:
            GuestLost: the guest is switched off.
            BootError: at the end: it did not come up.
        """
        return PowerCut(self.engine, "power cut").begin()

    def power_button(self, *, timeout: float | None = None) -> Fault:
        """Press the power button, and wait until the guest has switched itself off.

        At the end, it is switched on again if it went off. Before, the drivers of the button are loaded in
        the guest, and `systemd-logind` or `acpid` is started.

        Args:
            timeout: seconds for the guest to go off; None for the ini key ``vm_command_timeout``. With 0,
                nobody waits: this is for a guest that ignores the button.

        Raises:
            CommandTimeout: it did not go off in time.
            MonitorError: this machine has no power button.
            BootError: at the end: it did not come up.
        """
        seconds = self.engine.command_seconds if timeout is None else commands.seconds(timeout)
        return PowerButton(self.engine, seconds).begin()

    def suspend(self, seconds: float | None = None) -> Fault:
        """Suspend the guest to its memory (S3). It returns when the guest sleeps.

        Calls that need the guest run into their timeout meanwhile, and faults that need it are refused. At the end, the guest is woken, and it
        answers again, with the right time.

        Args:
            seconds: after which it wakes by itself; None for the end of the block.

        Raises:
            ConfigError: its kernel or its machine cannot suspend to memory.
            CommandTimeout: it did not fall asleep, or did not wake up at the end.
        """
        if seconds is not None and not (
            commands.is_number(seconds, int, float) and 0 < seconds <= threading.TIMEOUT_MAX
        ):
            raise ConfigError(
                f"seconds={seconds!r} is not a time", remedy="use a positive number, or None"
            )
        return Suspend(self.engine, seconds).begin()

    def reset(self) -> Fault:
        """Reset the guest at once, as a watchdog or the reset button does. Nothing in it is told.

        What it has not written to its disk is lost. At the end, this waits until the guest answers again.

        Raises:
            BootError: at the end: it did not come up.
        """
        return Reset(self.engine, "reset").begin()


class PowerCut(Outage):
    """The plug is pulled."""

    needs_answers = False

    def _start(self) -> None:
        self._engine.power_cut()

    def _stop(self) -> None:
        outage.switch_on_again(self._engine)


class PowerButton(Outage):
    """The power button was pressed."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        super().__init__(engine, "power button")
        self._seconds = seconds

    def _start(self) -> None:
        engine = self._engine
        run_as_root(engine, _LISTEN, check=False)
        with engine.orderly, engine.use() as running:
            machine = running.machine
            machine.check()
            machine.execute("system_powerdown")
            if self._seconds and machine.process.wait(self._seconds) is None:
                machine.check()
                raise CommandTimeout(
                    f"{engine.name} did not go off within {self._seconds:g} s after its power button was pressed",
                    seconds=self._seconds,
                    remedy=_ON_THE_BUTTON,
                )

    def _stop(self) -> None:
        outage.switch_on_again(self._engine)


class Reset(Outage):
    """The guest was reset."""

    def _start(self) -> None:
        engine = self._engine
        with engine.orderly, engine.use(hold=True) as running:
            running.machine.check()
            running.machine.execute("system_reset")
            running.machine.console.begin_boot()
            running.hang_up()

    def _stop(self) -> None:
        outage.await_answer(self._engine)


class Suspend(Outage):
    """The guest sleeps."""

    def __init__(self, engine: Engine, seconds: float | None) -> None:
        self._seconds = seconds
        super().__init__(engine, "suspended" if seconds is None else f"suspended for {seconds:g} s")
        self._running: Running | None = None
        self._process: RemoteProcess | None = None
        self._timer: threading.Timer | None = None
        self._registers: AcpiRegisters | None = None

    def _start(self) -> None:
        engine = self._engine
        if run_as_root(engine, _CAN_SUSPEND, check=False).returncode:
            raise ConfigError(
                f"{engine.name} cannot suspend to memory: /sys/power does not offer it",
                remedy="use a guest whose kernel has CONFIG_SUSPEND, such as debian-13",
            )
        with engine.orderly, engine.use(hold=True) as running:
            machine, monitor = running.machine, running.machine.monitor
            with _paused(running):
                if machine.spec.architecture.has_bios:
                    self._registers = AcpiRegisters(machine)
            since = len(monitor.events())

            def sleeps() -> bool:
                return monitor.wait_event("SUSPEND", since=since, timeout=_LOOK_SECONDS) is not None

            self._running = running
            self._process = outage.provoked(
                engine,
                running,
                _SUSPEND,
                sleeps,
                what="fall asleep",
                needs="look at vm.console.tail(): a driver may refuse to suspend",
            )
            running.resident.sleeps = lambda: not _woken(monitor, since)
            if self._seconds is not None:
                self._timer = threading.Timer(self._seconds, self._wake_by_itself)
                self._timer.daemon = True
                self._timer.start()
                running.stack.callback(self._timer.cancel)

    def _wake_by_itself(self) -> None:
        try:
            self.end()
        except VMSandboxError as error:
            self._engine.machines.faults.note(f"{self.text}: {error.brief}")

    def _stop(self) -> None:
        running, engine = self._running, self._engine
        if self._timer is not None:
            self._timer.cancel()
        try:
            if running is None or running is not engine.running or engine.loss is not None:
                return  # it was switched off, rolled back or lost, and others say so
            with suppress(MonitorError):  # something else has woken it
                running.machine.execute("system_wakeup")
            running.resident.sleeps = lambda: False
            # The program goes on when the guest does.
            if self._process is not None:
                self._process.communicate(None, ignore, ignore, engine.boot_seconds)
            with engine.use(), engine.still(running), _paused(running):
                if self._registers is not None:
                    self._registers.restore()
        finally:
            if self._process is not None:
                with suppress(VMSandboxError):
                    self._process.close()


def _woken(monitor: Monitor, since: int) -> bool:
    """Whether a guest runs again that fell asleep after so many events."""
    return any(event["event"] in ("WAKEUP", "RESET") for event in monitor.events()[since:])


@contextmanager
def _paused(running: Running) -> Iterator[None]:
    """Pause a guest for a moment. Its clock is right afterwards, or as a test has set it."""
    machine, helper = running.machine, running.helper
    if helper is None:
        machine.pause()
    else:
        resume.pause(machine, helper)
    try:
        yield
    finally:
        if helper is None:
            machine.resume()
        else:
            resume.from_pause(machine, helper)
