"""Runs a guest whose run is recorded, or repeats such a run to the byte.

The guest is a clone of a template of a kind of its own. QEMU records all that comes from outside: the ends
of requests to disks, and the clock. So nothing else may come in: the helper's port stays silent. A disk
tells the guest what to run, and it answers by a serial port.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import ConfigError, GuestLost, LaunchError, MonitorError
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint, firmware_of
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.machine import counting, host
from pytest_vmsandbox.machine.disk import REQUEST_SIZE, Recording, empty_overlay
from pytest_vmsandbox.machine.machine import Machine

REQUEST, LOG, CONSOLE, REPORT = "request", "log", "console", "report"
FILES = (REQUEST, LOG, CONSOLE, REPORT)  # of a recorded run
MOST_LOG = 1 << 30  # bytes of a log
_LOOK_SECONDS = 0.05
_NOT_WRITTEN = "replay write error"  # QEMU's words
_KILLED = "Terminated via GDBstub"  # likewise
_WAITING = "Waiting for gdb connection"  # likewise
_SNAPSHOTS = 1 << 20  # bytes of a disk that has nothing but snapshots
_PIECE = 1 << 20  # bytes of a console that are read at once


@dataclass(frozen=True, kw_only=True)
class BeforeRun:
    """The saved guest that runs go on from.

    Attributes:
        memory: its memory, which the run cannot change.
        state: of its devices.
        layers: for each disk, the files with what was written to it.
        key: opens it.
    """

    memory: IO[bytes]
    state: IO[bytes]
    layers: Sequence[Sequence[Path]]
    key: KeyPair


def check_recordable(blueprint: Blueprint) -> None:
    """Check that runs of such guests can be recorded.

    Raises:
        ConfigError: they cannot.
    """
    hardware, definition = blueprint.hardware, blueprint.built.definition
    why, remedy = "", ""
    if blueprint.verdict.accelerator != "tcg":
        why, remedy = "it needs emulation", "use --vm-accel=tcg"
    elif hardware.cpus > 1:
        why, remedy = f"the guest has {hardware.cpus} CPUs", "use cpus=1"
    elif not ARCHITECTURES[definition.architecture].can_be_recorded:
        why, remedy = f"it was not seen to work with {definition.architecture}", "use another image"
    elif firmware_of(definition, hardware) != "kernel":
        why, remedy = "QEMU must boot the guest's kernel itself", "leave firmware= out"
    elif hardware.network != "isolated":
        why, remedy = "the guest has a network", "use network='isolated'"
    if why:
        raise ConfigError(f"--vm-record does not work with {blueprint.image}: {why}", remedy=remedy)


class RecordedRun:
    """One run of a recorded guest. It is paused until `begin`.

    Attributes:
        guest: the guest. It has no helper, so no program can be started in it.
        folder: for the files of this run.
    """

    def __init__(self, guest: Guest, folder: Path) -> None:
        self.guest = guest
        self.folder = folder
        self._machine: Machine = guest.engine.running.machine  # type: ignore[union-attr]
        self._read = 0
        self._shown = 0  # bytes of the console

    @classmethod
    def started(
        cls,
        backend: Backend,
        blueprint: Blueprint,
        before: BeforeRun,
        folder: Path,
        *,
        name: str,
        mode: str,
        stack: ExitStack,
        is_debugged: bool = False,
    ) -> RecordedRun:
        """Start QEMU. `stack` ends it.

        Args:
            folder: with the request and the log for a replay; else empty. What the guest writes goes
                there.
            name: of the guest.
            mode: ``record`` or ``replay``.
            is_debugged: whether a debugger will come, see `await_debugger`.

        Raises:
            LaunchError: QEMU cannot be started.
        """
        state = stack.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
        state.write(counting.from_zero(before.state.read()))
        state.seek(0)
        if mode == "record":
            for name_of, length in ((REQUEST, REQUEST_SIZE), (LOG, 0)):
                (folder / name_of).touch(mode=0o600)
                os.truncate(folder / name_of, length)
        identity = host.guest_identity(blueprint.verdict.accelerator)
        if identity is not None:  # QEMU opens it itself, as that user
            os.chown(folder / LOG, identity.uid, identity.gid)
        files = Recording(
            mode=mode,
            log=stack.enter_context((folder / LOG).open("rb", buffering=0)),
            console=stack.enter_context((folder / CONSOLE).open("wb", buffering=0)),
            report=stack.enter_context((folder / REPORT).open("wb", buffering=0)),
            snapshots=stack.enter_context(empty_overlay(_SNAPSHOTS, folder))
            if is_debugged
            else None,
        )
        disks = stack.enter_context(blueprint.disks(backend.hypervisor.cache, before.layers))
        request = stack.enter_context((folder / REQUEST).open("rb", buffering=0))
        disks = replace(disks, request=request, recording=files)
        machines = Machines(
            blueprint,
            backend.hypervisor,
            name=name,
            key=before.key,
            disks=disks,
            logs=backend.callbacks.logs(name),
            has_helper=False,
            is_awaited=False,
        )
        stack.push(machines.clone(before.memory, state, _nothing).stack)
        engine = stack.enter_context(backend.engine(machines))
        engine.origin = "cloned"
        return cls(Guest(engine), folder)

    def request(self, head: Mapping[str, object], lines: bytes) -> None:
        """Write what the guest has to run. It may not have begun.

        Args:
            head: ``now``, ``hostname`` and ``seed``.
            lines: for the supervisor in the guest.

        Raises:
            LaunchError: it is too long.
        """
        text = json.dumps(head).encode() + b"\n" + lines
        if len(text) + 8 > REQUEST_SIZE:
            raise LaunchError(f"a request of {len(text):,} bytes is too long to be recorded")
        with (self.folder / REQUEST).open("r+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)

    def begin(self) -> None:
        """Let the guest run."""
        self._machine.resume()

    def await_debugger(self, port: int) -> None:
        """Let a debugger connect to a port of this host, and decide when the guest runs.

        Raises:
            ConfigError: the port cannot be used.
        """
        # Not before the guest's state is loaded: QEMU saves a snapshot when a debugger comes.
        # From 10.0 on, its disks can be written to only when the guest runs, unless we say so.
        with suppress(MonitorError):
            self._machine.execute("blockdev-set-active", {"active": True})
        said = self._machine.human(f"gdbserver tcp:127.0.0.1:{port}")
        if _WAITING not in said:
            raise ConfigError(
                f"QEMU cannot wait for a debugger at port {port}",
                details=said,
                remedy="use another port",
            )

    def receive(self, timeout: float) -> bytes:
        """What the guest has reported since the last call.

        Raises:
            TimeoutError: nothing within `timeout` seconds.
            GuestLost: the guest is gone, or the log has become too large.
        """
        deadline = Deadline(timeout)
        with (self.folder / REPORT).open("rb") as file:
            file.seek(self._read)
            while not (data := file.read()):
                self._show_console()
                self._machine.check()
                if (self.folder / LOG).stat().st_size > MOST_LOG:
                    raise GuestLost(
                        f"the log of {self.guest.name} has more than {MOST_LOG:,} bytes"
                    )
                if deadline.expired:
                    raise TimeoutError
                deadline.pause(_LOOK_SECONDS)
            self._read = file.tell()
        return data

    def _show_console(self) -> None:
        """Let our side see what the guest has written to its console, such as the text of a panic."""
        with (self.folder / CONSOLE).open("rb") as file:
            file.seek(self._shown)
            while data := file.read(_PIECE):
                self._machine.console.feed(data)
            self._shown = file.tell()

    def finish(self) -> None:
        """End QEMU, so that the log is complete."""
        self._machine.end(0)
        self._show_console()

    def check_log(self) -> None:
        """Check that QEMU could write all of the log.

        Raises:
            GuestLost: it could not. QEMU goes on then, but the run cannot be repeated.
        """
        if _NOT_WRITTEN in self.said:
            raise GuestLost(
                f"QEMU could not write the log of {self.guest.name}: is the disk full?",
                remedy=f"make room in {self.folder.parent}",
            )

    def await_end(self, timeout: float) -> bool:
        """Whether a replay has come to the end of its log within `timeout` seconds."""
        return self._machine.process.wait(timeout) is not None

    @property
    def was_killed(self) -> bool:
        """Whether a debugger has ended it by ``kill``."""
        return _KILLED in self.said

    @property
    def said(self) -> str:
        """What QEMU has said at its end."""
        return self._machine.process.stderr_tail


def difference(first: Path, second: Path) -> str:
    """Where the output of two runs differs; empty if it does not."""
    for name in (REPORT, CONSOLE):
        here, there = (folder.joinpath(name).read_bytes() for folder in (first, second))
        if here != there:
            pairs = enumerate(zip(here, there, strict=False))
            at = next((at for at, (a, b) in pairs if a != b), min(len(here), len(there)))
            return f"{name}, byte {at:,} of {len(here):,}"
    return ""


def size(folder: Path) -> int:
    """Bytes of the output of a run."""
    return sum((folder / name).stat().st_size for name in (REPORT, CONSOLE))


def _nothing() -> None:
    pass
