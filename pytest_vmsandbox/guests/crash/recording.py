"""Records all that a running guest writes to one of its disks.

QEMU's block driver ``blklogwrites`` is put nearest to the storage. What the disk had received before is
frozen: it stays in the lower files of the disk, and the guest writes into a new file on top of them. So
the content before the recording can be read later, while the guest goes on.

Nothing is paused while it is recorded, because QEMU flushes all disks when it stops a guest.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import IO

from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import CacheError, ConfigError, MonitorError, VMSandboxError
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.guests.crash.log import Log
from pytest_vmsandbox.guests.crash.states import History, Mark
from pytest_vmsandbox.guests.reaching.commands import Command, check_status, text_of
from pytest_vmsandbox.guests.running import resume
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.guests.running.plugging import FIND_DISK
from pytest_vmsandbox.guests.running.root_programs import run_as_root
from pytest_vmsandbox.machine.cmdline import ROOT_DISK, disk_names
from pytest_vmsandbox.machine.disk import Disks
from pytest_vmsandbox.machine.filters import RECORDER, Filter, Place
from pytest_vmsandbox.machine.machine import Machine

_POLL_SECONDS = 0.001
_WRITE_SECONDS = 30.0  # in which QEMU writes a header
_CONVERT_SECONDS = 600.0
# Prints the device file of a disk, and the files that say that it has no cache. $1: its serial number.
_CACHE = f"""{FIND_DISK}
[ "$serial" = "$1" ] && grep -sl "write through" "/sys/block/$name/cache_type" "/sys/block/$name/queue/write_cache"
"""
_ROOM = f"make room in the cache, or set the environment variable {paths.CACHE} to another folder"


@dataclass(frozen=True)
class Content:
    """The files with the content of a disk. They belong to the guest.

    Attributes:
        size: bytes of the disk.
        base: the lowest file, which is raw, or None.
        layers: qcow2 files on top of that, lowest first.
    """

    size: int
    base: IO[bytes] | None
    layers: tuple[IO[bytes], ...]

    def files(self) -> list[IO[bytes]]:
        """All files, lowest first."""
        return [*([] if self.base is None else [self.base]), *self.layers]

    def node(self) -> dict[str, object]:
        """What QEMU's tools read. The files are passed to them under the same numbers."""
        node: dict[str, object] = {}
        for file in self.files():
            kind = "raw" if file is self.base else "qcow2"
            name = f"/proc/self/fd/{file.fileno()}"
            # The QEMU of the guest still has it open, and has locked it.
            opened = {"driver": "file", "filename": name, "locking": "off", "read-only": True}
            below = {"backing": node} if node else {}
            node = {"driver": kind, "file": opened, "read-only": True, **below}
        return node


class Recorder:
    """A recording of one disk. `recorded` makes it.

    Attributes:
        disk: the name of the disk.
        before: its content before the recording.
        log: the log file.
    """

    def __init__(self, engine: Engine, disk: str) -> None:
        self.before = content(engine.machines, engine.machines.disks, disk)
        self.disk = disk
        self.log = _unnamed(engine.machines)
        self._engine = engine
        self._machine: Machine
        self._events = 0  # of QEMU, before the recording began
        # The numbers of QEMU's events that other recordings have caused. They pause the guest when they begin. QEMU
        # flushes all disks then, but the guest has just done that, too.
        self._known: set[int] = set()
        self._entries = Log(self.log, self.before.size)
        self._marks: list[Mark] = []
        self._lock = threading.Lock()
        self._devices = 0
        self._is_over = False
        self._spoilt = ""  # why the log does not tell what the guest has flushed
        self._filter = Filter(
            order=RECORDER,
            device=self._device,
            files=[self.log],
            detached=self._finished,
            flushed=self._flushed,
        )

    def acknowledge(self, value: object) -> None:
        """Note that the program under test has promised something.

        You may call this from any thread, as soon as the promise is known here.

        Args:
            value: a JSON value.

        Raises:
            ConfigError: this is no JSON value, or nothing is recorded any more.
        """
        try:
            copy = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"acknowledge takes a JSON value: {error}",
                remedy="pass text, numbers, True, False, None, lists of them, or dicts with text as keys",
            ) from error
        with self._engine.explained(), self._lock:
            self._check()
            self._read()
            self._marks.append(Mark(len(self._entries.entries), copy))

    @property
    def history(self) -> History:
        """What was written and promised. Use it after the block."""
        return History(self._entries.entries, self._marks)

    @cached_property
    def base(self) -> IO[bytes]:
        """The content before the recording, as a raw file with holes. It has no name.

        It is made when it is first asked for, and closed when the guest is removed.

        Raises:
            CacheError: it cannot be made.
        """
        file = _unnamed(self._engine.machines)
        flatten(self.before, file)
        return file

    # -- while it runs ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Let the disk be frozen, and record from now on.

        Raises:
            ConfigError: the guest takes it for a disk without a cache.
            MonitorError: QEMU cannot do it.
        """
        engine = self._engine
        _refuse_write_through(engine, self.disk)
        check_status(text_of(engine.run(Command(argv=("sync",), user="root"))))
        with engine.orderly, engine.use(hold=True) as running, engine.still(running):
            machine, helper = running.machine, running.helper
            since = len(machine.monitor.events())
            if helper is None:
                machine.pause()
            else:
                resume.pause(machine, helper)
            try:
                frozen = engine.machines.freeze_disks(machine)
                self.before = content(engine.machines, frozen, self.disk)
                machine.drives.insert(self.disk, self._filter)
            finally:
                if helper is None:
                    machine.resume()
                else:
                    resume.from_pause(machine, helper)
            self._machine, self._events = machine, len(machine.monitor.events())
            for note in [*engine.machines.faults.recorded.values()]:
                note(range(since, self._events))

    def end(self) -> None:
        """Stop recording.

        Raises:
            ConfigError: it had stopped before, or the guest was paused.
            MonitorError: QEMU cannot do it, or the log is damaged.
        """
        with self._lock:
            try:
                self._check()
            finally:
                self._is_over = True
                if self._goes_on():
                    self._machine.drives.remove(self.disk, self._filter)
            self._entries.finish()

    def another_begins(self, events: range) -> None:
        """Another recording of the guest has begun.

        Args:
            events: the numbers of QEMU's events that this has caused.
        """
        self._known.update(events)
        if self._marks:
            self._spoilt = "another recording has begun after the first acknowledge(), and all disks are flushed then"

    def _device(self, place: Place) -> Mapping[str, object]:
        """The block device that records."""
        self._devices += 1
        if self._devices > 1:  # it would begin a new log in the same file
            raise MonitorError(f"the recording of {self.disk!r} cannot go on with another device")
        (name,) = place.files
        log = {"driver": "file", "filename": name, "cache": {"no-flush": True}}
        return {"driver": "blklogwrites", "file": place.below, "log": log}

    def _finished(self) -> None:
        """The guest does not write into it any more. QEMU still flushes it when it is deleted."""
        with suppress(MonitorError):  # `end` raises it
            self._entries.finish()

    def _flushed(self) -> None:
        """QEMU flushes it for this host. Nobody can tell that from a flush of the guest."""
        self._spoilt = "a fault of the disk has ended, and QEMU flushes the disk then"

    def _goes_on(self) -> bool:
        """Whether the guest is still the one that is recorded."""
        running = self._engine.running
        return running is not None and running.machine is self._machine

    def _check(self) -> None:
        """Check that all was recorded until now.

        Raises:
            ConfigError: it was not.
            GuestLost: the guest is gone.
        """
        if self._is_over:
            raise self._ended("its block has ended")
        if not self._goes_on():
            raise self._ended("the guest was switched off, restored, or moved to another QEMU")
        if self._entries.is_finished:
            raise self._ended("it was detached")
        if self._spoilt:
            raise self._ended(self._spoilt)
        self._machine.check()
        stops = {
            number
            for number, event in enumerate(self._machine.monitor.events())
            if event["event"] == "STOP" and number >= self._events
        }
        if stops - self._known:
            raise self._ended("the guest was paused, and QEMU flushes all disks then")

    def _ended(self, why: str) -> ConfigError:
        return ConfigError(
            f"the disk {self.disk!r} of {self._engine.name} is not recorded any more: {why}",
            remedy="let the block of crash_points end before that, and begin another one after it",
        )

    def _read(self) -> None:
        """Read the log up to now.

        Raises:
            MonitorError: it is damaged.
        """
        deadline = Deadline(_WRITE_SECONDS)
        while not self._entries.read():
            self._machine.check()
            if deadline.expired:
                raise MonitorError(
                    f"QEMU has not written a request to its log for {_WRITE_SECONDS:g} s",
                    remedy="the disk with the cache may be full or too slow",
                )
            deadline.pause(_POLL_SECONDS)


@contextmanager
def recorded(engine: Engine, disk: str) -> Iterator[Recorder]:
    """Record all that a guest writes to a disk while the block runs.

    What the guest has not written to the disk by itself is flushed first, so it is there in all states.

    Args:
        disk: its name, such as ``root``, ``disk0`` or that of an attached disk.

    Raises:
        ConfigError: there is no such disk, it is read-only, it is already recorded, or the guest takes it
            for a disk without a cache; at the end: not all was recorded.
        CacheError: there is no room for the log.
    """
    with engine.explained():
        names = engine.machines.faults.recorded
        if disk in names:
            raise ConfigError(
                f"the disk {disk!r} of {engine.name} is already recorded",
                remedy="end the first block of crash_points before you begin another one on this disk",
            )
        recorder = Recorder(engine, disk)
        names[disk] = recorder.another_begins
        try:
            recorder.begin()
        except BaseException:
            del names[disk]
            raise
    try:
        yield recorder
    except BaseException:
        with suppress(VMSandboxError):
            recorder.end()
        raise
    else:
        with engine.explained():
            recorder.end()
            _refuse_write_through(engine, disk)
    finally:
        del names[disk]


def _refuse_write_through(engine: Engine, disk: str) -> None:
    """Refuse a disk that the guest takes for one without a cache: it does not flush it then.

    Raises:
        ConfigError: the guest does not flush it.
    """
    found = run_as_root(engine, _CACHE, disk, check=False).stdout
    if files := found.split()[1:]:
        raise ConfigError(
            f"{engine.name} takes {disk!r} for a disk without a cache, so it does not flush what it writes",
            remedy=f"let it flush, from before the block of crash_points to its end: echo write back | "
            f"tee {' '.join(files)}",
        )


def content(machines: Machines, disks: Disks, name: str) -> Content:
    """The files of a disk.

    Args:
        disks: those of the guest, or those that were frozen.

    Raises:
        ConfigError: there is no such disk, or the guest can only read it.
    """
    fixed = disk_names(machines.blueprint.hardware, has_base=disks.base is not None)
    if name in fixed:
        number = fixed.index(name)
        base = disks.base if name == ROOT_DISK else None
        return Content(disks.sizes[number], base, disks.overlays[number])
    written = [disk for disk in disks.plugged if not disk.read_only]
    for disk in written:
        if disk.name == name:
            return Content(disk.size, disk.base, disk.layers)
    names = [*fixed, *(disk.name for disk in written)]
    raise ConfigError(
        f"{machines.name} has no disk {name!r} that it can write to",
        remedy=f"use one of these: {', '.join(names)}"
        if names
        else "attach one: vm.attach_disk(size='64MiB')",
    )


def flatten(before: Content, target: IO[bytes]) -> None:
    """Write the content of a disk into an empty raw file.

    Raises:
        CacheError: qemu-img cannot do it.
    """
    argv = ["qemu-img", "convert", "-q", "-n", "--target-is-zero", "-W", "-O", "raw"]
    try:
        os.ftruncate(target.fileno(), before.size)
        subprocess.run(
            [*argv, f"json:{json.dumps(before.node())}", f"/proc/self/fd/{target.fileno()}"],
            check=True,
            capture_output=True,
            timeout=_CONVERT_SECONDS,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            pass_fds=[*(file.fileno() for file in before.files()), target.fileno()],
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise CacheError(
            f"qemu-img could not copy a disk of {format_size(before.size)}",
            details=str(getattr(error, "stderr", None) or error),
            remedy=_ROOM,
        ) from error


def _unnamed(machines: Machines) -> IO[bytes]:
    """A new file without a name.

    Raises:
        CacheError: it cannot be made.
    """
    try:
        return machines.unnamed_file()
    except OSError as error:
        raise CacheError(f"nothing can be recorded: {error.strerror}", remedy=_ROOM) from error
