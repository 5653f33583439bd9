"""Measurements with guests, and their results."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.core.settings import Clones, Settings
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.templates import NoTemplateError

P99_SAMPLES = 100  # the least for a 99th percentile
ANSWER_SECONDS = 2.0  # in which each of many guests has to answer
_ARM_SECONDS = 300.0  # for the pool to fill
_PUSH_BYTES = 16 * MIB
_BUSY = ["sh", "-c", "while :; do sleep 0.1; done"]
_TOGETHER = 8  # clones that share a template's memory while we measure each one's memory
_UNCOUNTED = 4  # guests at the start, which the pool has made ahead


class CannotMeasureError(VMSandboxError):
    """Something cannot be measured here; the brief line has the reason.

    Attributes:
        why_booted: one word for programs, if guests are not cloned: see `NoTemplateError.reason`.
    """

    why_booted = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one measurement.

    Attributes:
        value: the number, or its parts by name; None if it cannot be measured.
        samples: the number of samples.
        reason: why it, or a part of it, cannot be measured.
        details: further observations.
    """

    value: float | Mapping[str, float | None] | None
    samples: int = 0
    reason: str = ""
    details: Mapping[str, object] = field(default_factory=dict)


def _other_origin(
    origin: str, wanted: Sequence[str], why: VMSandboxError | None
) -> CannotMeasureError:
    """The error for a guest that was made in another way than wanted."""
    brief = f"guests are {origin} here, not {' or '.join(wanted)}"
    if why is None:
        return CannotMeasureError(brief)
    error = CannotMeasureError(f"{brief}: {why.brief}")
    error.why_booted = why.reason if isinstance(why, NoTemplateError) else type(why).__name__
    return error


def median(samples: Sequence[float], digits: int = 1) -> Result:
    """The median of samples."""
    return Result(value=round(statistics.median(samples), digits), samples=len(samples))


def percentiles(samples: Sequence[float]) -> Result:
    """The median, and the 99th percentile if there are enough samples."""
    ordered = sorted(samples)
    enough = len(ordered) >= P99_SAMPLES
    return Result(
        value={
            "p50": round(statistics.median(ordered), 2),
            "p99": round(ordered[math.ceil(0.99 * len(ordered)) - 1], 2) if enough else None,
        },
        samples=len(ordered),
        reason="" if enough else f"p99 needs {P99_SAMPLES} samples or more",
        details={"max": round(ordered[-1], 2)},
    )


@dataclass(kw_only=True)
class Setup:
    """What is measured, and how thoroughly.

    Attributes:
        image: of the guests.
        settings: of the factories that make them.
        hardware: of the guests, as `GuestFactory.boot` takes it.
        count: the number of samples, or the limit for measurements that take long; None for the default
            of each measurement.
        most: the limit for guests at once.
        folder: an empty folder for temporary files.
        python: whether the guests have Python.
        only_for_ratios: whether the cold boot is measured only for ratios.
        say: gets lines about long waits.
    """

    image: str
    settings: Settings
    hardware: Mapping[str, object]
    folder: Path
    count: int | None = None
    most: int = 60
    python: bool = True
    only_for_ratios: bool = False
    say: Callable[[str], None] = lambda _: None

    def at_most(self, number: int) -> int:
        """The number of samples to take if `number` is the default."""
        return number if self.count is None else min(number, self.count)

    def factory(self, clones: Clones) -> AbstractContextManager[GuestFactory]:
        """A factory with this value of `Settings.clones`."""
        return GuestFactory.open(replace(self.settings, clones=clones), Announcer(self.say))

    def expect(self, factory: GuestFactory, count: int) -> None:
        """Tell a factory how many guests we will ask for."""
        factory.expect(self.image, factory.hardware(self.image, self.hardware), count)

    @contextmanager
    def guest(self, factory: GuestFactory, *origins: str) -> Iterator[Guest]:
        """A guest with one of these origins.

        Raises:
            CannotMeasureError: the guest has another origin.
        """
        with factory.boot(self.image, **self.hardware) as guest:
            if (origin := guest.origin) not in origins:
                raise _other_origin(origin, origins, factory.why_booted(self.image))
            yield guest

    @cached_property
    def throughput(self) -> tuple[int, float, float]:
        """Guests one after the other: their number, seconds and CPU seconds.

        Two results use this one measurement.
        """
        number = self.count or 50
        processor_seconds = 0.0
        began = ours = 0.0
        with self.factory("armed") as factory:
            self.expect(factory, number + _UNCOUNTED)
            for counted in range(-_UNCOUNTED, number):
                if counted == 0:
                    began, ours = time.perf_counter(), time.process_time()
                with self.guest(factory, "armed", "cloned") as guest:
                    first_command(guest)
                    if counted >= 0:
                        processor_seconds += guest.engine.processor_seconds
            seconds = time.perf_counter() - began
            processor_seconds += time.process_time() - ours
        return number, seconds, processor_seconds


def first_command(guest: Guest) -> None:
    """Run the command that ends most measurements."""
    guest.run(["true"])


# -- one guest -------------------------------------------------------------------------------------


def cold_boot(setup: Setup) -> Result:
    """Boot a guest, until its first command ends."""
    number = 1 if setup.only_for_ratios else setup.at_most(3)
    with setup.factory("never") as factory:
        samples = [_timed(setup, factory, "booted", first_command) for _ in range(number)]
    return median(samples, digits=2)


def clone_on_demand(setup: Setup) -> Result:
    """Clone a guest on demand, until its first command ends."""
    with setup.factory("demand") as factory:
        _timed(setup, factory, "cloned", first_command)  # opens the template and reads it once
        samples = [
            _timed(setup, factory, "cloned", first_command) * 1000 for _ in range(setup.at_most(20))
        ]
    return median(samples)


def armed_noop(setup: Setup) -> Result:
    """Lease an armed guest, until its helper answers."""
    return _armed(setup, lambda guest: guest.engine.ping())


def armed_run(setup: Setup) -> Result:
    """Lease an armed guest and set its clock, until run(["true"]) ends."""
    return _armed(setup, first_command)


def _armed(setup: Setup, act: Callable[[Guest], object]) -> Result:
    number = setup.count or 200
    samples: list[float] = []
    missed = 0
    with setup.factory("armed") as factory:
        setup.expect(factory, number + 1)
        with setup.guest(factory, "armed", "cloned") as guest:  # the pool begins to fill itself
            act(guest)
        while len(samples) < number:
            if not factory.await_armed(_ARM_SECONDS):
                raise CannotMeasureError(
                    f"the pool of armed clones did not fill within {_ARM_SECONDS:g} s"
                )
            try:
                samples.append(_timed(setup, factory, "armed", act) * 1000)
            except CannotMeasureError:
                missed += 1
                if missed > max(3, number // 20):
                    raise
    result = percentiles(samples)
    return replace(result, details={**result.details, "not_armed": missed})


def _timed(
    setup: Setup, factory: GuestFactory, origin: str, act: Callable[[Guest], object]
) -> float:
    """Seconds from asking for a guest until `act` has ended."""
    began = time.perf_counter()
    with setup.guest(factory, origin) as guest:
        act(guest)
        return time.perf_counter() - began


def push(setup: Setup) -> Result:
    """Push a file of random bytes."""
    source = setup.folder / "random"
    source.write_bytes(random.Random(0).randbytes(_PUSH_BYTES))  # noqa: S311  # no secret
    samples = []
    with setup.factory("demand") as factory, factory.boot(setup.image, **setup.hardware) as guest:
        for _ in range(setup.at_most(5)):
            began = time.perf_counter()
            guest.push(source, "/tmp/random")  # noqa: S108  # in the guest
            samples.append(_PUSH_BYTES / MIB / (time.perf_counter() - began))
            guest.run(["rm", "/tmp/random"])  # noqa: S108  # likewise
    return median(samples)


# -- one after the other ---------------------------------------------------------------------------


def guests_per_s(setup: Setup) -> Result:
    """Fresh guests one after the other, each with one command."""
    number, seconds, _ = setup.throughput
    return Result(value=round(number / seconds, 2), samples=number)


def cpu_per_guest(setup: Setup) -> Result:
    """CPU time of each fresh guest, arming included."""
    number, _, processor_seconds = setup.throughput
    return Result(value=round(processor_seconds / number * 1000, 1), samples=number)


# -- many at once ----------------------------------------------------------------------------------


def pss_per_clone(setup: Setup) -> Result:
    """Memory of an armed clone, with its share of shared pages."""
    number = setup.at_most(_TOGETHER)
    with setup.factory("armed") as factory, ExitStack() as stack:
        setup.expect(factory, number + 1)
        with setup.guest(factory, "armed", "cloned"):
            pass
        guests = []
        for _ in range(number):
            factory.await_armed(_ARM_SECONDS)
            guests.append(stack.enter_context(setup.guest(factory, "armed")))
        sizes = [memory_of(guest.engine.pid) for guest in guests]
    own = statistics.median(size["Private_Clean"] + size["Private_Dirty"] for size in sizes)
    result = median([size["Pss"] / MIB for size in sizes])
    return replace(result, details={"own_mib": round(own / MIB, 1)})


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of memory of a process, by the kernel's names.

    Raises:
        CannotMeasureError: the kernel does not report it.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    except (OSError, ValueError, IndexError) as error:
        raise CannotMeasureError(f"the kernel does not report Pss: {error}") from error


def leased_at_once(setup: Setup) -> Result:
    """Guests held at once that answer within 2 s."""
    return _at_once(setup, busy=False)


def running_at_once(setup: Setup) -> Result:
    """Guests held at once that answer within 2 s while a program runs in each."""
    return _at_once(setup, busy=True)


def _at_once(setup: Setup, *, busy: bool) -> Result:
    """Take guests until there is no room or the limit is reached. Then ask each in turn."""
    limit = f"no more than {setup.most} were tried (--most)"
    with setup.factory("demand") as factory, ExitStack() as stack:
        guests: list[Guest] = []
        while len(guests) < setup.most:
            try:
                guests.append(stack.enter_context(setup.guest(factory, "cloned")))
            except VMSandboxError as error:
                if not guests:
                    raise
                limit = error.brief
                break
        if busy:  # only now: cloning beside busy guests would take minutes
            for number, guest in enumerate(guests, 1):
                guest.popen(_BUSY)
                if (took := _answer(guest)) > ANSWER_SECONDS:
                    limit = f"the last one took {took:.1f} s to answer"
                    guests = guests[:number]
                    break
        answers = [_answer(guest) for guest in guests]
    in_time = sum(took <= ANSWER_SECONDS for took in answers)
    return Result(
        value=in_time,
        samples=len(answers),
        details={
            "slowest_answer_ms": round(max(answers) * 1000, 1),
            "limit": limit,
        },
    )


def _answer(guest: Guest) -> float:
    began = time.perf_counter()
    first_command(guest)
    return time.perf_counter() - began
