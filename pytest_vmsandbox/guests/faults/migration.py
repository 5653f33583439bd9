"""A guest that moves to another QEMU while it runs."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.reaching.commands import StrPath
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.moving import Move, move
from pytest_vmsandbox.machine.qemu import qemu_at


class Migrated(Fault):
    """A guest has moved to another QEMU. This is over when you get it.

    Attributes:
        text: what has happened, in a few words.
        source: the version of the QEMU before, such as ``10.0.13``.
        target: the version of the QEMU that it runs in now.
        seconds: how long it took, from the start of the other QEMU on.
        gap: seconds for which the guest's CPUs stood still.
    """

    def __init__(self, engine: Engine, how: Move) -> None:
        what = f"live migration from QEMU {how.source} to QEMU {how.target}"
        super().__init__(
            engine, f"{what} in {how.seconds * 1000:.0f} ms, gap {how.gap * 1000:.0f} ms"
        )
        self.source, self.target = how.source, how.target
        self.seconds, self.gap = how.seconds, how.gap
        self._is_over = self._has_lapsed = True

    def _start(self) -> None:
        """It has happened."""

    def _stop(self) -> None:
        """Nothing is left of it."""


class Migration:
    """The part of `Faults` that is about where it runs."""

    engine: Engine

    def migrate(self, qemu: StrPath | None = None) -> Migrated:
        """Move the guest to a new QEMU process while it runs, with its memory, devices and disks.

        Programs in the guest go on, and so do `Guest.popen`, `Guest.run` and `Guest.console`: no byte is
        lost. The guest sees a short gap. Connections from outside, through `Guest.forward` or SSH, end.
        Forwarded ports have the same address as before.

        The guest stays in the new QEMU, also when it is switched off and on. A rollback to an older
        snapshot goes on in the QEMU that saved it. If the migration fails, the guest goes on in its old
        QEMU.

        An emulated guest needs QEMU 10.0 or newer on both sides, because it breaks with older ones. For a
        moment, this host needs the guest's memory twice.

        Args:
            qemu: the path of another QEMU; None for the same program. It must be of the same series, such as
                10.0, and not be older.

        Returns:
            What has happened. There is nothing to end. Its ``gap`` and ``seconds`` say how long it took.

        Raises:
            ConfigError: this guest, or this QEMU, cannot do it. The error says what is needed.
            LaunchError: the new QEMU does not start, or the host has no room for it.
            MonitorError: QEMU could not do it. The guest goes on.

        Example::

            program = vm.popen(["my-server"])
            vm.faults.migrate()
            assert program.poll() is None
        """
        engine = self.engine
        with engine.explained():
            blueprint = engine.machines.blueprint
            there = blueprint.qemu
            if qemu is not None:
                there = qemu_at(Path(os.fspath(qemu)), blueprint.architecture.name)
            fault = Migrated(engine, move(engine, there))
        engine.machines.faults.note(fault.text)
        return fault
