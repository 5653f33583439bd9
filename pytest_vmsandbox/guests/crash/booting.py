"""Boots a guest from one state of a disk after another, for a check that runs in it then.

This is for disks that cannot be unmounted, because the guest runs from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Self

from pytest_vmsandbox.core.errors import BootError, ConfigError
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.guests.crash import checker
from pytest_vmsandbox.guests.crash.checker import Program
from pytest_vmsandbox.guests.crash.checking import refuse_faults
from pytest_vmsandbox.guests.crash.conversation import Unusable, Verdict, conversation
from pytest_vmsandbox.guests.crash.layers import write_layer
from pytest_vmsandbox.guests.crash.recording import Recorder
from pytest_vmsandbox.guests.crash.states import State
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.saved import Saved
from pytest_vmsandbox.machine.cmdline import disk_names
from pytest_vmsandbox.machine.disk import Disks, empty_overlay


class Boots:
    """A guest that boots from one state after another. A context manager; see `Looks`.

    Args:
        check: what runs in the booted guest.
        seconds: for each state, without the boot.
    """

    def __init__(self, engine: Engine, recorder: Recorder, check: Program, seconds: float) -> None:
        self._engine, self._recorder = engine, recorder
        self._check, self._seconds = check, seconds
        self._saved: Saved

    def __enter__(self) -> Self:
        refuse_faults(self._engine)
        self._saved = self._engine.save()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.roll_back(self._saved)

    def verdict(self, state: State, acknowledged: Sequence[object]) -> Verdict:
        """See `Looks`. A state from which the guest does not boot is broken."""
        line = checker.line(acknowledged, is_python=self._check.is_python)
        with _disks(self._engine, self._recorder, state, self._saved.disks) as disks:
            try:
                _boot(self._engine, disks)
            except BootError as error:
                if error.transient:
                    raise
                text = printable(f"{error.brief}\n{error.details}")
                return Verdict(kind="the guest does not boot", reason=text)
            try:
                with conversation(self._engine, self._check) as talk:
                    return talk.ask(line, self._seconds)
            except Unusable as broken:
                return broken.verdict
            finally:
                if self._engine.is_on:
                    self._engine.power_cut()


@contextmanager
def booted(engine: Engine, recorder: Recorder, state: State) -> Iterator[None]:
    """The guest, booted from a state. Afterwards it is as before.

    Raises:
        BootError: it does not boot.
    """
    refuse_faults(engine)
    saved = engine.save()
    try:
        with _disks(engine, recorder, state, saved.disks) as disks:
            _boot(engine, disks)
            yield
    finally:
        engine.roll_back(saved)


def _boot(engine: Engine, disks: Disks) -> None:
    if engine.is_on:
        engine.power_cut()
    engine.machines.disks = disks
    engine.power_on()


@contextmanager
def _disks(engine: Engine, recorder: Recorder, state: State, others: Disks) -> Iterator[Disks]:
    """The disks of a guest, one of them in a state. What the guest writes to them is gone afterwards.

    Args:
        others: the disks as they are now. Nobody writes to their files.
    """
    machines = engine.machines
    names = disk_names(machines.blueprint.hardware, has_base=others.base is not None)
    if recorder.disk not in names:
        raise ConfigError(
            f"the guest cannot boot with a state of {recorder.disk!r}, because it was attached later",
            remedy="leave boot= out, or use a disk that is always there: disks=['1GiB'] (marker vm)",
        )
    before, cache = recorder.before, machines.hypervisor.cache
    with ExitStack() as stack:
        fresh = others.on_top(lambda size: stack.enter_context(empty_overlay(size, cache)))
        layer = stack.enter_context(empty_overlay(before.size, cache))
        write_layer(
            before,
            recorder.log,
            recorder.history,
            state,
            target=layer,
            hypervisor=machines.hypervisor,
        )
        overlays = list(fresh.overlays)
        overlays[names.index(recorder.disk)] = (*before.layers, layer)
        yield replace(fresh, overlays=tuple(overlays))
