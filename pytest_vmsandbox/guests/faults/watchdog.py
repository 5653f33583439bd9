"""A hardware watchdog that is plugged into a running guest."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import CommandTimeout, ConfigError, GuestLost, MonitorError
from pytest_vmsandbox.guests.faults import outage
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.reaching import commands
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.root_programs import run_as_root
from pytest_vmsandbox.machine.machine import Machine

Action = Literal["reset", "shutdown", "poweroff", "pause", "inject-nmi", "none"]
_ID = "watchdog"
_LOOK_SECONDS = 0.25
_ASK_SECONDS = (
    5.0  # after which a guest is asked again to let go: a reset may have lost the request
)
_PAUSED = "watchdog"  # QEMU's status
# With the driver loaded before, the guest binds the device as soon as it comes.
_LOAD = """
PATH=$PATH:/usr/sbin:/usr/bin:/sbin:/bin
modprobe -r i6300esb 2>/dev/null
modprobe i6300esb heartbeat=$1
"""
_FIND = """
for file in /sys/class/watchdog/*/identity; do
    grep -q i6300ESB "$file" 2>/dev/null && exit
done
exit 1
"""


class Watchdog(Fault):
    """A hardware watchdog that is plugged in. `Faults.watchdog` makes it."""

    def __init__(self, engine: Engine, action: Action, seconds: int) -> None:
        super().__init__(engine, f"watchdog ({seconds} s, then {action})")
        self._action = action
        self._seconds = seconds
        self._machine: Machine | None = None
        self._since = 0

    def fired(self, timeout: float | None = None) -> None:
        """Wait until the watchdog fires. If it resets the guest, wait until the guest answers again.

        The next call waits for the next time.

        Args:
            timeout: seconds for it to fire; None for the ini key ``vm_command_timeout``.

        Raises:
            CommandTimeout: it did not fire in time.
            GuestLost: the guest is gone for another reason.
            BootError: the guest did not come up.
        """
        engine = self._engine
        with engine.explained():
            deadline = Deadline(
                engine.command_seconds if timeout is None else commands.seconds(timeout)
            )
            self._await_event("WATCHDOG", deadline, "was not fired by its watchdog")
            if self._action == "reset":
                self._await_event("RESET", Deadline(engine.boot_seconds), "was not reset")
                if (running := engine.running) is not None and running.machine is self._machine:
                    with engine.use(hold=True):
                        outage.await_restarted(engine, running)

    def _await_event(self, name: str, deadline: Deadline, what: str) -> None:
        """Wait for an event of the machine, from the last one on that was waited for."""
        machine = self._machine
        assert machine is not None
        monitor = machine.monitor
        while (
            event := monitor.wait_event(
                name, since=self._since, timeout=deadline.remaining(_LOOK_SECONDS)
            )
        ) is None:
            machine.check()
            if deadline.expired:
                raise CommandTimeout(
                    f"{self._engine.name} {what} within {deadline.seconds:g} s",
                    seconds=deadline.seconds,
                    remedy="a watchdog starts to count when a program opens /dev/watchdog, and is fed by "
                    "each write to it",
                )
        events = monitor.events()
        self._since = next(n for n, other in enumerate(events) if other is event) + 1

    def switched_on(self, machine: Machine) -> None:
        """Plug it into the new machine. If no port is free, it is over."""
        if self.in_force:
            self._engine.machines.plugged.pop(_ID, None)
            try:
                self._plug(machine)
            except (ConfigError, MonitorError, GuestLost) as error:
                self._engine.machines.faults.note(f"{self.text}: {error.brief}")
                self.lapse()

    def rolled_back(self, *, was_in_force: bool) -> None:
        """It stays as it is."""

    def _start(self) -> None:
        engine = self._engine
        if engine.machines.blueprint.architecture.hot_plug != "port":
            raise ConfigError(
                f"no watchdog can be plugged into {engine.name}: its architecture has no root ports",
                remedy="use an image such as debian-13",
            )
        if _ID in engine.machines.plugged:
            raise ConfigError(
                f"{engine.name} already has a watchdog", remedy="end the other fault first"
            )
        loaded = self._run(_LOAD)
        if loaded:
            raise ConfigError(
                f"the kernel of {engine.name} has no driver for a watchdog (i6300esb)",
                details=loaded,
                remedy="use an image whose kernel has it, such as debian-13 or tiny",
            )
        with engine.orderly, engine.use(hold=True) as running:
            running.machine.check()
            self._plug(running.machine)
        try:
            deadline = Deadline(engine.command_seconds)
            while self._run(_FIND) is not None:
                if deadline.expired:
                    raise CommandTimeout(
                        f"{engine.name} did not find its watchdog within {deadline.seconds:g} s",
                        seconds=deadline.seconds,
                        remedy="its kernel needs hot-plug of PCI devices",
                    )
                deadline.pause(_LOOK_SECONDS)
        except BaseException:
            with suppress(CommandTimeout, GuestLost, MonitorError):
                self._unplug(running.machine)
            raise

    def _run(self, script: str) -> str | None:
        """What a script says if it fails; None if it returns 0."""
        done = run_as_root(self._engine, script, self._seconds, check=False)
        return done.stderr if done.returncode else None

    def _plug(self, machine: Machine) -> None:
        machines = self._engine.machines
        port = machines.free_port("a watchdog")
        self._machine, self._since = machine, len(machine.monitor.events())
        machine.execute("watchdog-set-action", {"action": self._action})
        machines.plugged[_ID] = port
        try:
            machine.execute("device_add", {"driver": "i6300esb", "id": _ID, "bus": port})
        except (MonitorError, GuestLost):
            machines.plugged.pop(_ID)
            raise

    def _stop(self) -> None:
        engine, machine = self._engine, self._machine
        running = engine.running
        if machine is None or running is None or running.machine is not machine:
            engine.machines.plugged.pop(_ID, None)
            return
        try:
            if self._action == "pause" and machine.execute("query-status")["status"] == _PAUSED:
                machine.resume()
            if machine.monitor.wait_event("RESET", since=self._since, timeout=0):
                with engine.use(hold=True):
                    outage.await_restarted(engine, running)
            if _ID in engine.machines.plugged:
                self._unplug(machine)
        except GuestLost:
            engine.machines.plugged.pop(_ID, None)
            if any(event["event"] == "WATCHDOG" for event in machine.monitor.events()):
                outage.switch_on_again(engine)

    def _unplug(self, machine: Machine) -> None:
        """Pull it out. The guest has to let go of it.

        Raises:
            CommandTimeout: it does not.
        """
        engine = self._engine
        deadline, asked = Deadline(engine.command_seconds), Deadline(0)
        since = len(machine.monitor.events())
        with engine.orderly, engine.use():
            while not machine.monitor.wait_event(
                "DEVICE_DELETED",
                since=since,
                timeout=0 if asked.expired else _LOOK_SECONDS,
                among=lambda event: event["data"].get("device") == _ID,
            ):
                machine.check()
                if asked.expired:
                    with suppress(MonitorError):  # it is being unplugged, or is gone just now
                        machine.execute("device_del", {"id": _ID})
                    asked = Deadline(_ASK_SECONDS)
                elif deadline.expired:
                    raise CommandTimeout(
                        f"{engine.name} did not let go of its watchdog within {deadline.seconds:g} s",
                        seconds=deadline.seconds,
                        remedy="it stays plugged in until the guest is switched off",
                    )
            engine.machines.plugged.pop(_ID)
            machine.execute("watchdog-set-action", {"action": "reset"})
