"""A clock that is wrong, or runs at a wrong rate."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Literal

from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import CommandError, ConfigError, GuestLost
from pytest_vmsandbox.guests.faults import timekeeping
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.lead import Drift
from pytest_vmsandbox.guests.reaching.commands import is_number
from pytest_vmsandbox.guests.reaching.helper import Helper
from pytest_vmsandbox.guests.running import resume
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Running
from pytest_vmsandbox.guests.running.root_programs import run_as_root

Leap = Literal["insert", "delete"]
_LEAST_RATE, _MOST_RATE = 0.9, 1.1  # what kernels take
_MOST_OFFSET = timedelta(days=36_525).total_seconds()
_DAY = 86_400
_LEAP_SECONDS = (10.0, 30.0, 90.0)  # before midnight; the later ones if the guest is slow
_LEAST_SECONDS = 3.0  # the kernel needs a second to notice what it was told
_FLAGS = {None: 0, "insert": 16, "delete": 32}  # STA_INS and STA_DEL
_TICK = 10_000  # microseconds
_PPM = 65_536  # the kernel's unit of frequency
_NO_PROGRAM = 66
# Sets the kernel's tick (microseconds), frequency (2⁻¹⁶ ppm), flags of leap seconds and offset of TAI (seconds; -1
# leaves it). Prints that offset as it was. The kernel needs two seconds to forget a leap second. busybox can set only
# the first two.
_ADJUST = r"""
tick=$1 frequency=$2 flags=$3 tai=$4
if command -v python3 >/dev/null; then
    exec python3 -I -S -c '
import ctypes, sys, time
class Timex(ctypes.Structure):
    _fields_ = [("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long),
        ("errors", ctypes.c_long * 2), ("status", ctypes.c_int), ("unused", ctypes.c_long * 5),
        ("tick", ctypes.c_long), ("pps", ctypes.c_long * 2), ("shift", ctypes.c_int),
        ("more", ctypes.c_long * 5), ("tai", ctypes.c_int), ("rest", ctypes.c_long * 16)]
def call(modes):
    timex.modes = modes
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")
timex = Timex()
call(0)
tick, frequency, flags, tai = map(int, sys.argv[1:])
print(timex.tai)
had = timex.status & 48
timex.tick, timex.freq, timex.status = tick, frequency, timex.status & ~48 | flags
call(0x4012)
if had and not flags:
    time.sleep(2.2)
if tai >= 0:
    timex.unused[0] = tai
    call(0x80)
' "$@"
fi
[ "$flags" = 0 ] && [ "$tai" = -1 ] || exit 66
for program in adjtimex "busybox adjtimex"; do
    $program -t "$tick" -f "$frequency" >/dev/null 2>&1 && exit 0
done
exit 66
"""


class ClockFaults:
    """The part of `Faults` that is about its clock."""

    engine: Engine

    def clock(
        self, offset: float | timedelta = 0, *, rate: float = 1.0, leap: Leap | None = None
    ) -> Fault:
        """Make the guest's clock wrong: ahead, behind, too fast, too slow, or with a leap second.

        It stays exactly as wrong when an idle guest was paused, and when `Guest.snapshot` takes or restores
        a snapshot in the block of the fault. If the fault began in the block of a snapshot, it is over
        after the rollback. Faults of the clock add up. When they have ended, the clock is right, also if a
        program in the guest has set it meanwhile. After a reboot or a power cut, the guest has the right
        time by itself, and this fault is without effect.

        An offset changes the time of day only (``CLOCK_REALTIME``). A rate also changes
        ``CLOCK_MONOTONIC``, and so all timeouts in the guest. ``CLOCK_MONOTONIC_RAW`` stays right.

        With a leap second, the clock is first set to 10 seconds before midnight UTC (up to 90 on a slow
        host), at the end of the day that it would show. The last minute of that day then has 61 or
        59 seconds. A snapshot in the block goes on where it was, so the leap second comes again.

        Args:
            offset: seconds or a `timedelta`; negative to set the clock back.
            rate: how many seconds it shows for each second, 0.9 to 1.1.
            leap: ``insert`` or ``delete`` a second. The guest needs Python 3 for this.

        Raises:
            ConfigError: an argument is invalid, or the guest has no helper or no program to do it.
            GuestLost: the guest is off or gone.

        Example::

            with vm.faults.clock(timedelta(days=400)):
                vm.run(["check-certificates"])
        """
        seconds = offset.total_seconds() if isinstance(offset, timedelta) else offset
        if not (is_number(seconds, int, float) and abs(seconds) <= _MOST_OFFSET):
            raise ConfigError(
                f"offset={offset!r} is not a time of at most 100 years",
                remedy="use a number of seconds, or a timedelta",
            )
        if wall() + seconds < _DAY:
            raise ConfigError(
                f"offset={offset!r}: no clock of Linux shows a time before 1970",
                remedy="use a smaller offset",
            )
        if not (is_number(rate, int, float) and _LEAST_RATE <= rate <= _MOST_RATE):
            raise ConfigError(
                f"rate={rate!r}: no kernel lets its clock run at that rate",
                remedy="use a number from 0.9 to 1.1",
            )
        if leap not in _FLAGS:
            raise ConfigError(
                f"leap={leap!r} is invalid", remedy="use 'insert' or 'delete', or leave it out"
            )
        if not seconds and rate == 1 and leap is None:
            raise ConfigError(
                "faults.clock needs to know what is wrong with the clock",
                remedy="pass an offset, rate= or leap=",
            )
        return _Clock(self.engine, float(seconds), float(rate), leap).begin()


def _offset_text(seconds: float) -> str:
    """How far a clock is off, as in ``400 days behind``."""
    where = "ahead" if seconds > 0 else "behind"
    for name, size in (("days", _DAY), ("h", 3600), ("min", 60)):
        if abs(seconds) > size and seconds % size == 0:
            return f"{abs(seconds) // size:.0f} {name} {where}"
    return f"{abs(seconds):.6f}".rstrip("0").rstrip(".") + f" s {where}"


class _Clock(Fault):
    """A wrong clock."""

    def __init__(self, engine: Engine, offset: float, rate: float, leap: Leap | None) -> None:
        words = [_offset_text(offset)] if offset else []
        words += [f"at rate {rate:g}"] if rate != 1 else []
        words += [f"with a leap second to {leap}"] if leap else []
        super().__init__(engine, f"clock {', '.join(words)}")
        self._offset, self._rate, self._leap = offset, rate, leap
        self._drift = Drift()
        self._by_hand = 0.0  # how far a test had set it off before
        self._tai = -1
        self._using = ExitStack()

    def _start(self) -> None:
        with ExitStack() as stack:
            running = stack.enter_context(self._engine.use())
            helper = timekeeping.helper_of(running)
            helper.lead = lead = resume.noted(running.machine, helper)
            self._by_hand = lead.seconds
            rate = lead.rate + self._rate - 1
            if not _LEAST_RATE <= round(rate, 9) <= _MOST_RATE:
                raise ConfigError(
                    f"with the faults in force, the clock would run at rate {rate:g}",
                    remedy="rates add up: stay between 0.9 and 1.1 altogether",
                )
            if lead.is_free:
                raise ConfigError(
                    f"the clock of {self._engine.name} is about to have a leap second, and a step would undo it",
                    remedy="end that fault first",
                )
            stack.callback(self._restore, running)
            if self._leap is None:
                if self._rate != 1:
                    self._adjust(rate)
                self._set(helper, self._offset)
            else:
                self._make_leap(helper, rate)
            stack.pop_all()
        if self._leap is not None:
            self._using.enter_context(self._engine.use())  # it must not be paused before midnight

    def _set(self, helper: Helper, offset: float) -> None:
        """Set the clock, and let it keep what this fault does."""
        self._drift = Drift(
            offset=offset, rate=self._rate, since=wall(), is_free=self._leap is not None
        )
        timekeeping.set_lead(helper, helper.lead.with_drift(self._drift))

    def _make_leap(self, helper: Helper, rate: float) -> None:
        """Let the kernel have a leap second soon. The clock is set first, because a step undoes it."""
        for seconds in _LEAP_SECONDS:
            now = wall() + helper.lead.at(wall())
            midnight = ((now + self._offset) // _DAY + 1) * _DAY
            self._set(helper, midnight - seconds - now)
            self._tai = int(self._adjust(rate, flags=_FLAGS[self._leap]))
            if midnight - wall() - resume.measured(helper) >= _LEAST_SECONDS:
                return
            self._adjust(rate)
            helper.lead = helper.lead.without(self._drift)
        raise GuestLost(
            f"{self._engine.name} is too slow for a leap second",
            remedy="this machine may be overloaded: run fewer guests or workers at a time",
        )

    def _adjust(self, rate: float, flags: int = 0, tai: int = -1) -> str:
        """Tell the kernel how to run its clock. Returns its offset of TAI, in seconds; empty if unknown.

        Raises:
            ConfigError: there is no program for it in the guest.
        """
        tick = round(rate * _TICK)
        frequency = round((rate * _TICK - tick) / _TICK * 1e6 * _PPM)
        try:
            return run_as_root(self._engine, _ADJUST, tick, frequency, flags, tai).stdout
        except CommandError as error:
            if error.result.returncode != _NO_PROGRAM:
                raise
            needs = "Python 3" if self._leap else "Python 3, adjtimex or busybox with adjtimex"
            raise ConfigError(
                f"the guest {self._engine.name} needs {needs} for this fault of the clock",
                remedy="use another image, such as debian-13, or install it in the guest",
            ) from error

    def _stop(self) -> None:
        with self._using:
            if self._engine.loss is not None:
                return
            with self._engine.use() as running:
                self._restore(running)

    def _restore(self, running: Running) -> None:
        """Set the clock right. Without its helper, the guest restarts, and has the right time then."""
        if (helper := running.helper) is None:
            return
        lead = helper.lead.without(self._drift)
        if self._leap is not None or self._rate != 1:
            self._adjust(lead.rate, tai=self._tai)
        helper.lead = replace(lead, seconds=self._by_hand)
        timekeeping.set_right(helper)
