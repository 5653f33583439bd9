"""What users hold to find out what a power cut can break."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import parse_size
from pytest_vmsandbox.guests.crash import checker, mounts
from pytest_vmsandbox.guests.crash.booting import Boots, booted
from pytest_vmsandbox.guests.crash.building import Builder
from pytest_vmsandbox.guests.crash.checker import Check
from pytest_vmsandbox.guests.crash.checking import Bench, mounted
from pytest_vmsandbox.guests.crash.conversation import NO_END, Looks
from pytest_vmsandbox.guests.crash.exploring import Exploration
from pytest_vmsandbox.guests.crash.mounts import Place
from pytest_vmsandbox.guests.crash.recording import Recorder, content, recorded
from pytest_vmsandbox.guests.crash.report import (
    CrashFailure,
    CrashPointError,
    CrashReport,
    untried_text,
)
from pytest_vmsandbox.guests.crash.searching import Search
from pytest_vmsandbox.guests.crash.states import History, State
from pytest_vmsandbox.guests.reaching import commands
from pytest_vmsandbox.guests.reaching.commands import Command, StrPath
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.plugging import AttachedDisk, name_of

_STATES, _BOOTS = 600, 20
_TRIES, _BOOT_TRIES = 60, 6  # to make a broken state smaller
_STATE_SECONDS = 30.0
_MOST_NAME = 80  # characters of a state in the name of a file

Chosen = Callable[[History], Exploration]


class Subtests(Protocol):
    """The fixture ``subtests`` of pytest 9 or of pytest-subtests."""

    def test(self, msg: str | None = None) -> AbstractContextManager[object]:
        """A part of a test that fails on its own."""


class CrashPoints:
    """A recording of all that a guest writes to one disk, and a search through the power cuts in it.

    It is a context manager: the block is what is recorded. `Guest.crash_points` makes it.
    """

    def __init__(self, engine: Engine, disk: str, seed: int) -> None:
        self._engine, self._disk, self._seed = engine, disk, seed
        self._recording: AbstractContextManager[Recorder] | None = None
        self._recorder: Recorder | None = None
        self._place: Place | None = None

    def __repr__(self) -> str:
        state = "recorded" if self._place else "not recorded"
        return f"<CrashPoints {self._disk} of {self._engine.name} ({state})>"

    def __enter__(self) -> Self:
        if self._recording is not None:
            raise ConfigError(
                "this recording has begun already",
                remedy="make another one: with vm.crash_points(…) as cuts:",
            )
        with self._engine.explained():
            _refuse_nested(self._engine)
            self._recording = recorded(self._engine, self._disk)
            self._recorder = self._recording.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._recording is not None
        with self._engine.explained():
            try:
                if error is None:
                    # What is still in the guest's memory is written, so it is recorded, too.
                    self._engine.run(Command(argv=("sync",), user="root"))
            except BaseException as failed:
                self._recording.__exit__(type(failed), failed, failed.__traceback__)
                raise
            self._recording.__exit__(kind, error, traceback)
            if error is None:
                self._place = mounts.find(self._engine, self._disk)

    def acknowledge(self, value: object) -> None:
        """Say what the workload has promised to keep. From now on, no power cut may lose it.

        Call it when the program under test has answered, for instance after a commit has returned.

        Args:
            value: any JSON value. The checker gets the list of those that were acknowledged before the power
                cut.

        Raises:
            ConfigError: nothing is recorded now, or it is no JSON value.
        """
        if self._recorder is None or self._place is not None:
            raise ConfigError(
                "acknowledge() works only while the recording lasts",
                remedy="call it in the block: with vm.crash_points(…) as cuts:",
            )
        self._recorder.acknowledge(value)

    def check(
        self,
        checker: Check,
        *,
        states: int | None = None,
        seed: int | None = None,
        tear: str | int = "4KiB",
        boot: bool = False,
        timeout: float | None = None,
        subtests: Subtests | None = None,
    ) -> CrashReport:
        """Give states that a power cut can leave to a checker, and report those that break the promise.

        The checker runs in this guest, as root. For each state, the disk is mounted where and as it was
        mounted when the recording ended. Before, the programs that use it are killed, and it is unmounted.
        Afterwards the guest is as it was before this call.

        Args:
            checker: a function ``check(folder, acknowledged)``. Its source is sent to the guest and runs
                there with the guest's Python (3.7 or later): import what it needs inside of it. ``folder`` is
                a `pathlib.Path`: the mounted disk, or the device file of one that was not mounted.
                ``acknowledged`` is the list of values that were acknowledged before the power cut. If it
                raises anything, the state breaks the promise. It must return None.
                Or a list of words: a program. It starts in the folder, with the variables
                ``VMSANDBOX_FOLDER`` and ``VMSANDBOX_ACKNOWLEDGED`` (JSON). If it returns non-zero, the state
                breaks the promise.
            states: how many states are tried at most; None for 600, or 20 with `boot`. The telling ones
                come first. With None, a warning says if not all flushes and promises were tried.
            seed: chooses the random states; None for that of `Guest.crash_points`. The same seed gives the
                same states.
            tear: the disk writes pieces of this size as a whole, a multiple of 512 bytes. Many file systems
                are damaged by smaller ones than 4 KiB.
            boot: whether the guest boots for each state, in place of a mount. This takes seconds for each,
                and is for the disk that the guest runs from. The checker gets the folder ``/`` then.
            timeout: seconds for each state; None for 30, longer on a slow host.
            subtests: the fixture of this name. Each way to break the promise becomes a subtest that fails.

        Returns:
            A `CrashReport`.

        Raises:
            CrashPointError: a state breaks the promise. The error has the report. Or the check fails
                without any power cut.
            ConfigError: the checker cannot run in the guest, the disk cannot be freed, as of a loop device, nothing
                was written to it, or this is called in a block of `state`.
        """
        with self._engine.explained():
            _check_subtests(subtests)
            seconds = _seconds(timeout, self._engine.stretch(_STATE_SECONDS))
            search = partial(
                Exploration,
                seed=self._seed if seed is None else _whole(seed, "seed", least=None),
                count=_whole((_BOOTS if boot else _STATES) if states is None else states, "states"),
                tear=_tear(tear),
            )
            report = (self._booted if boot else self._mounted)(checker, search, seconds)
        _raise_failures(report, subtests)
        if states is None and not report.broken and report.untried:
            warnings.warn(untried_text(report), stacklevel=2)
        return report

    def _mounted(self, check: Check, chosen: Chosen, seconds: float) -> CrashReport:
        """Try states in the running guest."""
        with self._opened() as (recorder, place), self._builder(recorder) as builder:
            _refuse_unwritten(recorder, self._disk)
            program = checker.program(check, place)
            with Bench(self._engine, self._disk, place, builder, program, seconds) as bench:
                report = self._searched(recorder, bench, chosen, _TRIES)
            failures = tuple(self._kept(builder, it) for it in report.failures)
        return replace(report, failures=failures)

    def _booted(self, check: Check, chosen: Chosen, seconds: float) -> CrashReport:
        """Boot the guest for each state."""
        with self._opened() as (recorder, place):
            _refuse_unwritten(recorder, self._disk)
            program = checker.program(check, Place(folder=_booted_folder(place)))
            with Boots(self._engine, recorder, program, seconds) as bench:
                return self._searched(recorder, bench, chosen, _BOOT_TRIES)

    def _searched(
        self, recorder: Recorder, bench: Looks, chosen: Chosen, tries: int
    ) -> CrashReport:
        history = recorder.history
        states = chosen(history)
        search = Search(disk=self._disk, history=history, bench=bench, chosen=states, tries=tries)
        return replace(search.run(), boundaries=states.boundaries, untried=states.untried)

    def _kept(self, builder: Builder, failure: CrashFailure) -> CrashFailure:
        """A failure with its disk among the guest's logs, if it has any."""
        logs = self._engine.machines.logs
        if logs is None:
            return failure
        image = logs / f"crash-{self._disk}-{_file_text(failure.state)}.raw"
        try:
            image.unlink(missing_ok=True)  # of an earlier check
            builder.write(State.parse(failure.state), image)
        except OSError:  # the disk is full: the failure says enough without it
            image.unlink(missing_ok=True)
            return failure
        return replace(failure, image=image)

    @contextmanager
    def state(self, name: str, *, boot: bool = False) -> Iterator[str]:
        """A block in which the guest has one state on the disk, mounted.

        The name is one of a report of this recording. The disk is mounted as for a checker: the programs
        that use it are killed before, and the guest is as it was before when the block ends.

        Args:
            name: such as ``"41-38"``: the first 41 requests, without number 38.
            boot: whether the guest boots with that disk instead, as for `check`.

        Returns:
            A context manager. It gives the folder where the disk is mounted, or the device file.

        Raises:
            ConfigError: no power cut in this recording leaves such a state, or it cannot be mounted.

        Example::

            with cuts.state("41-38") as folder:
                print(vm.run(["ls", "-l", folder]).stdout)
        """
        with self._engine.explained(), self._opened() as (recorder, place):
            state = _named(recorder, name)
            if boot:
                with booted(self._engine, recorder, state):
                    yield _booted_folder(place)
                return
            with (
                self._builder(recorder) as builder,
                mounted(self._engine, self._disk, place, builder, state) as folder,
            ):
                yield folder

    def write_state(self, name: str, path: StrPath) -> None:
        """Write the whole disk in one state to a file of this host, for `Guest.attach_disk`.

        Args:
            name: of a state, as for `state`.
            path: a new raw file. Zeros become holes.

        Raises:
            ConfigError: no power cut in this recording leaves such a state.
            OSError: ``path`` cannot be written.
        """
        with (
            self._engine.explained(),
            self._opened() as (recorder, _),
            self._builder(recorder) as builder,
        ):
            builder.write(_named(recorder, name), Path(path))

    @contextmanager
    def _opened(self) -> Iterator[tuple[Recorder, Place]]:
        """The recording, and where the disk was. Nobody else can use crash points of the guest meanwhile.

        Raises:
            ConfigError: it is not complete, or somebody else does.
        """
        if self._recorder is None or self._place is None:
            raise ConfigError(
                "there is no complete recording yet",
                remedy="call this after the block: with vm.crash_points(…) as cuts:",
            )
        _refuse_nested(self._engine)
        ledger = self._engine.machines.faults
        ledger.shows_states = True
        try:
            yield self._recorder, self._place
        finally:
            ledger.shows_states = False

    def _builder(self, recorder: Recorder) -> Builder:
        folder = self._engine.machines.hypervisor.cache
        return Builder(recorder.base, recorder.log, recorder.history, folder)


class HasCrashPoints:
    """The part of `Guest` that is about power cuts at every point."""

    engine: Engine

    def crash_points(self, disk: AttachedDisk | str, *, seed: int = 0) -> CrashPoints:
        """Record all that the guest writes to a disk, to find out what a power cut can break.

        The block is what is recorded. Afterwards, `CrashPoints.check` computes what a power cut can leave on
        the disk: at any point, with some of the writes lost that no flush has followed yet, reordered, or
        torn.

        Format and mount the disk before. It may have any size, but its content is copied into the cache. While
        it is recorded, the guest cannot be switched off, no snapshot can be taken or restored, and no fault of
        the disk can begin or end. To record several disks, begin all blocks before the work: when another one
        begins, all disks are flushed.

        Args:
            disk: what `attach_disk` has returned, or a name: ``disk0`` and so on for those of ``disks``.
            seed: of the random states.

        Returns:
            `CrashPoints`, a context manager.

        Raises:
            ConfigError: there is no such disk, or the guest can only read it. At the begin or the end of the
                block: the guest takes it for a disk without a cache (``write through``), or not all was recorded.

        Example::

            with vm.crash_points("disk0") as cuts:
                for value in ("one", "two"):
                    vm.run(["/usr/bin/save", value, "/mnt/file"])
                    cuts.acknowledge(value)


            def check(folder, acknowledged):
                if acknowledged:
                    assert (folder / "file").read_text() >= acknowledged[-1]


            cuts.check(check)
        """
        with self.engine.explained():
            machines = self.engine.machines
            name = name_of(machines, disk)
            _whole(seed, "seed", least=None)
            content(machines, machines.disks, name)  # there is such a disk
            return CrashPoints(self.engine, name, seed)


def _raise_failures(report: CrashReport, subtests: Subtests | None) -> None:
    """Raise the failures of a report, in subtests of their own if there are any.

    Raises:
        CrashPointError: there is a failure.
    """
    if subtests is not None:
        for failure in report.failures:
            with subtests.test(msg=failure.kind):
                raise _error(report, [failure])
    elif report.failures:
        raise _error(report, report.failures)


def _error(report: CrashReport, failures: Sequence[CrashFailure]) -> CrashPointError:
    remedy = (
        "let the program flush what it promises before it promises it: fsync the file, and the folder after a "
        "rename"
    )
    if all(failure.kind == NO_END for failure in failures):
        remedy = (
            "let the check end for each content of the disk, or give it more time with timeout="
        )
    return CrashPointError(
        report.brief,
        details="\n\n".join(map(str, failures)),
        remedy=remedy,
        report=report,
    )


def _refuse_nested(engine: Engine) -> None:
    """Refuse crash points in a block or a call that shows a state: it would see that state's disk.

    Raises:
        ConfigError: there is one.
    """
    if engine.machines.faults.shows_states:
        raise ConfigError(
            f"crash points of {engine.name} are used already: by a block of state(), or by another thread",
            remedy="let that end before",
        )


def _file_text(name: str) -> str:
    """The name of a state for the name of a file, which has at most 255 bytes."""
    if len(name) <= _MOST_NAME:
        return name
    return f"{name[:_MOST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _named(recorder: Recorder, name: str) -> State:
    """The state of a recording with a name.

    Raises:
        ConfigError: there is none.
    """
    state = State.parse(name)
    recorder.history.check(state)
    return state


def _booted_folder(place: Place) -> str:
    """What a check gets in a booted guest. Nobody but the guest mounts the disk there."""
    return place.folder if place.mounts else "/"


def _refuse_unwritten(recorder: Recorder, disk: str) -> None:
    """Refuse a recording that proves nothing.

    Raises:
        ConfigError: nothing was written, so no power cut can break anything.
    """
    if all(entry.kind == "flush" for entry in recorder.history.entries):
        raise ConfigError(
            f"nothing was written to the disk {disk} while it was recorded",
            remedy="let the workload write to this disk, in the block: mount it before, and look with df where "
            "the program writes",
        )


def _check_subtests(subtests: object) -> None:
    if subtests is not None and not callable(getattr(subtests, "test", None)):
        raise ConfigError(
            f"subtests={subtests!r} is invalid", remedy="pass the fixture subtests of pytest"
        )


def _whole(number: int, name: str, least: int | None = 1) -> int:
    """A whole number as users write it.

    Raises:
        ConfigError: it is none, or is too small.
    """
    if not commands.is_number(number, int) or (least is not None and number < least):
        remedy = "use a whole number" if least is None else f"use a whole number from {least} on"
        raise ConfigError(f"{name}={number!r} is invalid", remedy=remedy)
    return number


def _seconds(timeout: float | None, default: float) -> float:
    """Seconds for each state.

    Raises:
        ConfigError: `timeout` leaves the checker no time.
    """
    if timeout == 0:
        raise ConfigError("timeout=0 leaves the checker no time", remedy="use a positive number")
    return default if timeout is None else commands.seconds(timeout)


def _tear(tear: str | int) -> int:
    """Bytes that a disk writes as a whole.

    Raises:
        ConfigError: it is no multiple of a sector.
    """
    size = tear if isinstance(tear, int) else parse_size(tear, "tear")
    if size <= 0 or size % 512:
        raise ConfigError(
            f"tear={tear!r} is invalid", remedy="use a multiple of 512 bytes: 512, or '4KiB'"
        )
    return size
