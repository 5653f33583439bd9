"""CPUs that stand still, or get too little time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal

from pytest_vmsandbox.core.deadline import Deadline, monotonic
from pytest_vmsandbox.core.errors import ConfigError, VMSandboxError
from pytest_vmsandbox.guests.commands import is_number
from pytest_vmsandbox.guests.engine import Engine
from pytest_vmsandbox.guests.faults import timekeeping
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.lead import Drift
from pytest_vmsandbox.guests.machines import Running
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.machine import Machine

Clock = Literal["stops", "runs"]
_STOP_SECONDS = 10.0  # for a signal to take effect
_LOOK_SECONDS = 0.001
_LONGEST_PERIOD = 10.0


class ProcessorFaults:
    """The part of `Faults` that is about its CPUs."""

    engine: Engine

    def freeze(self, seconds: float | None = None, *, clock: Clock = "stops") -> Fault:
        """Freeze the guest: its CPUs stand still.

        With ``clock="stops"`` the virtual machine is paused, as by an administrator or for a backup. The
        guest loses the time on all its clocks. It is behind from then on, until the fault ends: only
        then its clock is corrected. ``snapshot`` in the block keeps that, once it has thawed.

        With ``clock="runs"`` its CPUs are stolen, as on an overloaded host. Its clocks jump ahead when it
        thaws, and are right. QEMU itself stands still, so nothing that needs QEMU is answered meanwhile
        (`Guest.qmp`, `Guest.screenshot`, other faults).

        Calls that need the guest wait until it thaws, or run into their timeout. `Guest.popen` returns at
        once. `Guest.power_cut` works.

        Args:
            seconds: after which it thaws by itself, also in the block; None for the end of the fault.
            clock: ``stops`` or ``runs``.

        Raises:
            ConfigError: an argument is invalid, or the guest is frozen already. While it is frozen,
                `Guest.snapshot` raises this, too.
            GuestLost: the guest is off or gone.

        Example::

            with vm.faults.freeze(
                3
            ):  # it answers after 3 seconds, and its clock is 3 seconds behind
                vm.run(["date"])
        """
        if clock not in ("stops", "runs"):
            raise ConfigError(
                f"clock={clock!r} is neither 'stops' nor 'runs'",
                remedy="use 'stops' for a paused machine, 'runs' for CPUs that were stolen",
            )
        if seconds is not None and not (is_number(seconds, int, float) and seconds > 0):
            raise ConfigError(
                f"seconds={seconds!r} is not a time", remedy="use a positive number, or None"
            )
        return _Freeze(self.engine, seconds, clock).begin()

    def stall(self, share: float, *, period: float = 0.05) -> Fault:
        """Take time from the guest's CPUs, as on an overloaded host. Programs in it become slow.

        QEMU is stopped for a part of each period. So work in the guest takes about 1 ÷ (1 − ``share``)
        times as long. The guest's clock stays right. With several stalls at a time, the guest runs only
        while none of them stops it.

        Args:
            share: the part of the time that is taken, above 0 and below 1.
            period: seconds, at most 10. Long periods make a guest that stutters.

        Raises:
            ConfigError: an argument is invalid.
            GuestLost: the guest is off or gone.

        Example::

            with vm.faults.stall(0.8):  # five times as slow
                vm.run(["make", "check"])
        """
        if not (is_number(share, int, float) and 0 < share < 1):
            raise ConfigError(
                f"share={share!r} is not a part of the time",
                remedy="use a number above 0 and below 1; to stop the guest altogether, use freeze()",
            )
        if not (is_number(period, int, float) and 0 < period <= _LONGEST_PERIOD):
            raise ConfigError(
                f"period={period!r} is not a time of at most {_LONGEST_PERIOD:g} s",
                remedy="use a number of seconds, such as 0.05; for one long pause, use freeze(seconds)",
            )
        return _Stall(self.engine, share, period).begin()


class _Held(Fault):
    """A fault that keeps the guest's CPUs from running. Its thread ends with the fault or the machine."""

    def __init__(self, engine: Engine, text: str) -> None:
        super().__init__(engine, text)
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._work, name=f"vmsandbox-fault-{engine.name}", daemon=True
        )
        self._stack = ExitStack()
        self._machine: Machine

    def _start(self) -> None:
        with ExitStack() as stack:
            running = stack.enter_context(self._engine.use())  # an idle guest would be paused
            self._machine = running.machine
            with self._engine.still(running):
                running.stack.callback(self._over.set)
            self._hold(running, stack)
            self._stack = stack.pop_all()
        self._thread.start()

    def _hold(self, running: Running, stack: ExitStack) -> None:
        """Begin it. `stack` ends it."""

    def _work(self) -> None:
        """What the thread does, until `_over` is set."""

    def _stop(self) -> None:
        self._over.set()
        self._thread.join()
        try:
            self._stack.close()
        except VMSandboxError:
            if self._machine.ended() is None and self._engine.loss is None:
                raise


class _Freeze(_Held):
    """CPUs that stand still."""

    def __init__(self, engine: Engine, seconds: float | None, clock: Clock) -> None:
        how_long = "" if seconds is None else f" for {seconds:g} s"
        super().__init__(engine, f"guest frozen{how_long}, clock {clock}")
        self._seconds, self._clock = seconds, clock
        self._holding = ExitStack()
        self._lost = Drift()

    def _hold(self, running: Running, stack: ExitStack) -> None:
        if running.resident.is_frozen:
            raise ConfigError(
                f"{self._engine.name} is frozen already", remedy="end the other fault first"
            )
        with ExitStack() as holding:
            running.resident.is_frozen = True
            holding.callback(setattr, running.resident, "is_frozen", False)
            if self._clock == "stops":
                holding.callback(self._note_lost, running)
                holding.enter_context(_paused(running.machine))
            else:
                holding.enter_context(_stopped(running.machine))
            self._holding = holding.pop_all()
        stack.callback(self._thaw)

    def _work(self) -> None:
        if not self._over.wait(self._seconds):
            with suppress(VMSandboxError):  # the machine is gone
                self._thaw()
            self._engine.machines.faults.note(f"thawed: {self.text}")

    def _thaw(self) -> None:
        """Let its CPUs go on. It happens once: either in the thread, or when the thread has ended."""
        self._holding.pop_all().close()

    def _note_lost(self, running: Running) -> None:
        """Let the clock stay behind until the end. It comes before anybody may save the guest."""
        if (helper := running.helper) is not None:
            self._lost = timekeeping.lost_time(helper)

    def _stop(self) -> None:
        super()._stop()
        timekeeping.restore(self._engine, self._lost)


class _Stall(_Held):
    """CPUs that get a part of the time."""

    def __init__(self, engine: Engine, share: float, period: float) -> None:
        super().__init__(engine, f"guest stalled for {share:.0%} of the time")
        self._share, self._period = share, period

    def _work(self) -> None:
        ran = (1 - self._share) * self._period  # all in all; it begins with a stop
        stood = 0.0
        while not self._over.is_set():
            with self._machine.process.stopped():
                # Both waits may take longer than they should, so what has passed is measured.
                stood += self._wait(ran * self._share / (1 - self._share) - stood)
            ran += self._wait((1 - self._share) * self._period)

    def _wait(self, seconds: float) -> float:
        """Wait until then or until it is over. Returns how long that took, in seconds."""
        started = monotonic()
        if seconds > 0:
            self._over.wait(seconds)
        return monotonic() - started


@contextmanager
def _paused(machine: Machine) -> Iterator[None]:
    """Pause a machine while this lasts."""
    machine.pause()
    try:
        yield
    finally:
        machine.resume()


@contextmanager
def _stopped(machine: Machine) -> Iterator[None]:
    """Stop the process of a machine while this lasts."""
    with machine.process.stopped():
        deadline = Deadline(_STOP_SECONDS)
        while not host.is_stopped(machine.process.pid) and not deadline.expired:
            deadline.pause(_LOOK_SECONDS)
        machine.monitor.is_stopped = True
        try:
            yield
        finally:
            machine.monitor.is_stopped = False
