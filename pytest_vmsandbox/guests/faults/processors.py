"""CPUs that stand still, or get too little time."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pytest_vmsandbox.core.deadline import Deadline, monotonic
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.faults import timekeeping
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.lead import Drift
from pytest_vmsandbox.guests.reaching.commands import is_number
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Running
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.machine import Machine

Clock = Literal["stops", "runs"]
_STOP_SECONDS = 10.0  # for a signal to take effect
_LOOK_SECONDS = 0.001
_SHORTEST_PERIOD, _LONGEST_PERIOD = 0.001, 10.0


class ProcessorFaults:
    """The part of `Faults` that is about its CPUs."""

    engine: Engine

    def freeze(self, seconds: float | None = None, *, clock: Clock = "stops") -> Fault:
        """Freeze the guest: its CPUs stand still.

        With ``clock="stops"`` the virtual machine is paused, as by an administrator or for a backup. The
        guest loses the time on all its clocks. It is behind from then on, until the fault ends: only
        then its clock is corrected. ``snapshot`` in the block keeps that, once it has thawed. The clock of a
        guest without a helper stays behind.

        With ``clock="runs"`` its CPUs are stolen, as on an overloaded host. Its clocks jump ahead when it
        thaws, and are right. QEMU itself stands still, so nothing that needs QEMU is answered meanwhile
        (`Guest.qmp`, `Guest.screenshot`, other faults).

        Calls that need the guest wait until it thaws, or run into their timeout. `Guest.popen` returns at
        once. `Guest.power_cut` works. Faults that need the guest are refused.

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
        if seconds is not None and not (
            is_number(seconds, int, float) and 0 < seconds <= threading.TIMEOUT_MAX
        ):
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
            period: seconds, from 0.001 to 10. Long periods make a guest that stutters.

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
        if not (is_number(period, int, float) and _SHORTEST_PERIOD <= period <= _LONGEST_PERIOD):
            raise ConfigError(
                f"period={period!r} is not a time from {_SHORTEST_PERIOD:g} to {_LONGEST_PERIOD:g} s",
                remedy="use a number of seconds, such as 0.05; for one long pause, use freeze(seconds)",
            )
        return _Stall(self.engine, share, period).begin()


class _Held(Fault):
    """A fault that keeps the guest's CPUs from running.

    A thread begins and ends it: Ctrl-C interrupts the main thread only, so it cannot leave the CPUs
    stopped. The thread ends with the fault or the machine.
    """

    needs_answers = False

    def __init__(self, engine: Engine, text: str) -> None:
        super().__init__(engine, text)
        self._over = threading.Event()
        self._thread = threading.Thread()
        self._known = threading.Event()  # set when the CPUs are held, or cannot be
        self._is_held = False
        self._machine: Machine | None = None
        self._error: Exception | None = None  # in the thread

    def _start(self) -> None:
        self._start_thread()
        self._known.wait()
        if not self._is_held:
            self._raise_error()

    def _start_thread(self) -> None:
        self._over = threading.Event()
        name = f"vmsandbox-fault-{self._engine.name}"
        self._thread = threading.Thread(
            target=self._work, args=[self._over], name=name, daemon=True
        )
        self._thread.start()

    def _work(self, over: threading.Event) -> None:
        try:
            with self._engine.use() as running:  # an idle guest would be paused
                with self._engine.still(running):
                    running.stack.callback(over.set)
                self._machine = running.machine
                with self._holding(running):
                    self._is_held = True
                    self._known.set()
                    self._hold(running, over)
        except Exception as error:  # noqa: BLE001  # whatever it is, the caller gets it
            self._error = error
        finally:
            self._known.set()

    @contextmanager
    def _holding(self, running: Running) -> Iterator[None]:  # noqa: ARG002  # not all need it
        """Hold the CPUs while this lasts."""
        yield

    @abstractmethod
    def _hold(self, running: Running, over: threading.Event) -> None:
        """Wait until it is over."""

    def _stop(self) -> None:
        self._over.set()
        if self._thread.ident is not None:  # Ctrl-C may have come before
            self._thread.join()
        if (
            self._machine is not None
            and self._machine.ended() is None
            and self._engine.loss is None
        ):
            self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


class _Freeze(_Held):
    """CPUs that stand still."""

    freezes = True

    def __init__(self, engine: Engine, seconds: float | None, clock: Clock) -> None:
        how_long = "" if seconds is None else f" for {seconds:g} s"
        super().__init__(engine, f"guest frozen{how_long}, clock {clock}")
        self._seconds, self._clock = seconds, clock
        self._lost = Drift()

    @contextmanager
    def _holding(self, running: Running) -> Iterator[None]:
        resident = running.resident
        if resident.is_away:
            raise ConfigError(
                f"{self._engine.name} is frozen already, or suspended",
                remedy="end the other fault first",
            )
        resident.is_frozen = True
        try:
            with (_paused if self._clock == "stops" else _stopped)(running.machine):
                yield
            if self._clock == "stops" and (helper := running.helper) is not None:
                # The clock stays behind until the end. This comes before anybody may save the guest.
                self._lost = timekeeping.lost_time(helper)
        finally:
            resident.is_frozen = False

    def _hold(self, running: Running, over: threading.Event) -> None:  # noqa: ARG002
        if not over.wait(self._seconds):
            self._engine.machines.faults.note(f"thaws: {self.text}")

    def _stop(self) -> None:
        super()._stop()
        timekeeping.restore(self._engine, self._lost)


class _Stall(_Held):
    """CPUs that get a part of the time. That of a new machine do so, too."""

    def __init__(self, engine: Engine, share: float, period: float) -> None:
        super().__init__(engine, f"guest stalled for {100 * share:.6g}% of the time")
        self._share, self._period = share, period

    def _hold(self, running: Running, over: threading.Event) -> None:
        share, ran = (
            self._share,
            (1 - self._share) * self._period,
        )  # all in all; it begins with a stop
        stood = 0.0
        while not over.is_set():
            with running.machine.process.stopped():
                # Both waits may take longer than they should, so what has passed is measured.
                stood += _waited(over, ran * share / (1 - share) - stood)
            ran += _waited(over, (1 - share) * self._period)

    def switched_on(self, machine: Machine) -> None:
        """Stall the new machine, too. A guest that moves to another QEMU keeps its machine."""
        if self.in_force and machine is not self._machine:
            self._start_thread()

    def rolled_back(self, *, was_in_force: bool) -> None:
        """It stays as it is."""


def _waited(over: threading.Event, seconds: float) -> float:
    """Wait until then or until it is over. Returns how long that took, in seconds."""
    started = monotonic()
    if seconds > 0:
        over.wait(seconds)
    return monotonic() - started


@contextmanager
def _paused(machine: Machine) -> Iterator[None]:
    """Pause a machine while this lasts."""
    try:
        machine.pause()
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
