"""The block devices of one running QEMU: what each disk reads and writes, and disks that come and go."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from pytest_vmsandbox.core.architecture import Architecture
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import GuestLost, MonitorError
from pytest_vmsandbox.machine import cmdline
from pytest_vmsandbox.machine.cmdline import Descriptors, PluggedDescriptors
from pytest_vmsandbox.machine.disk import PluggedDisk
from pytest_vmsandbox.machine.filters import (
    RECORDER,
    Execute,
    Filter,
    Filters,
    delete_node,
    error_of,
    lend,
)
from pytest_vmsandbox.machine.qmp import Event, Monitor

_ASK_SECONDS = 5.0  # after which a guest is asked again: its reset may have lost the request
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class _Plugged:
    """A disk in a root port.

    Attributes:
        nodes: its block devices and the sets of their descriptors, lowest first.
        since: the number of events before it came.
    """

    nodes: list[tuple[str, int]]
    since: int


@dataclass(eq=False, repr=False)
class Drives:
    """The block devices of one QEMU.

    Filters can be put under a disk while the guest runs: see `Filter`. You may call all methods from any
    thread.

    Args:
        execute: executes a command of its monitor.
        monitor: has its events.
        architecture: of the guest.

    Attributes:
        own: the names of all block devices that the guest's disks have read and written. `errors` tells
            them from those that others have added, which may fail on purpose.
    """

    execute: Execute
    monitor: Monitor
    architecture: Architecture
    own: set[str] = field(default_factory=set)
    _filters: Filters = field(init=False)
    _storage: dict[str, str] = field(default_factory=dict)  # the disks: name → block device
    _read_only: set[str] = field(default_factory=set)  # the names of those that are only read
    _plugged: dict[str, _Plugged] = field(default_factory=dict)
    _waiting: dict[str, list[Filter]] = field(default_factory=dict)  # of disks that are not there
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _lock: threading.RLock = field(default_factory=threading.RLock)  # while they change

    def __post_init__(self) -> None:
        self._filters = Filters(self.execute, self.monitor)

    def started_with(self, names: Sequence[str], fds: Descriptors) -> None:
        """Note what QEMU has on its command line.

        Args:
            names: of the disks that are always there.
        """
        self._storage = {name: name for name in names}
        if fds.modules is not None:
            self._storage[cmdline.MODULES_DISK] = cmdline.MODULES_DISK
            self._read_only.add(cmdline.MODULES_DISK)
        if fds.request is not None:
            self._storage[cmdline.REQUEST_DISK] = cmdline.REQUEST_DISK
            self._read_only.add(cmdline.REQUEST_DISK)
        self.own.update(self._storage.values())
        for disk in fds.plugged:
            nodes = [
                (str(node["node-name"]), number) for number, node in cmdline.plugged_nodes(disk)
            ]
            self._note(disk, nodes)

    def move(self, execute: Execute, former: Drives) -> None:
        """Another machine has taken this QEMU over, and executes its commands from now on.

        Args:
            former: the block devices of its QEMU before.
        """
        self.execute = self._filters.execute = execute
        self._filters.follow(former._filters)
        self.own |= former.own

    def errors(self) -> Iterator[Event]:
        """The events that tell that this host failed. What fails on purpose is not among them."""
        for event in self.monitor.events():
            if error_of(event)[0] in self.own or self._filters.hides_failure(event):
                yield event

    # -- filters ----------------------------------------------------------------------------------

    def insert(self, disk: str, new: Filter) -> None:
        """Put a filter under a disk. If it is there already, nothing happens.

        If there is no such disk, it waits until the disk is plugged in.

        Raises:
            MonitorError: QEMU cannot do it. Everything is as before then.
        """
        with self._lock:
            if disk in self._storage:
                self._filters.insert(
                    disk, self._storage[disk], new, read_only=disk in self._read_only
                )
            elif new not in (waiting := self._waiting.setdefault(disk, [])):
                waiting.append(new)

    def remove(self, disk: str, old: Filter) -> None:
        """Take a filter away from under a disk. If it is not there, nothing happens.

        Raises:
            MonitorError: QEMU cannot do it.
        """
        with self._lock:
            if disk in self._storage:
                self._filters.remove(
                    disk, self._storage[disk], old, read_only=disk in self._read_only
                )
            elif old in (waiting := self._waiting.get(disk, [])):
                waiting.remove(old)

    def has_failed(self, which: Filter) -> bool:
        """Whether a filter that lets a request fail once has done so already."""
        with self._lock:
            return self._filters.has_failed(which)

    def count_failures(self) -> None:
        """Note which filters have let a request fail. Call this before QEMU ends.

        Raises:
            MonitorError: QEMU does not tell.
            GuestLost: QEMU is gone.
        """
        with self._lock:
            self._filters.count()

    @property
    def fail_flushes(self) -> bool:
        """Whether a filter lets flushes fail."""
        with self._lock:
            return self._filters.fail_flushes

    def make_savable(self) -> None:
        """Call this before a paused guest is saved or moved.

        QEMU flushes all disks then, and gives up if a filter lets that fail.

        Raises:
            MonitorError: QEMU cannot do it.
        """
        with self._lock:
            for disk, storage in self._storage.items():
                self._filters.renew_failing(disk, storage, read_only=disk in self._read_only)

    # -- disks that change, come and go -----------------------------------------------------------

    def put_on_top(self, overlays: Sequence[IO[bytes]]) -> None:
        """Let each disk write to a new, empty qcow2 file from now on. Older files do not change any more.

        Filters stay above it.

        Args:
            overlays: a file for each disk that the guest can write to.

        Raises:
            MonitorError: QEMU cannot do it.
        """
        with self._lock:
            written = [name for name in self._storage if name not in self._read_only]
            for name, file in zip(written, overlays, strict=True):
                top = f"top-{next(self._numbers)}"  # a name may have 31 characters
                number = lend(self.execute, file)
                device = cmdline.overlay(top, number, None)
                self.execute("blockdev-add", {**device, "backing": None})
                below = self._storage[name]
                self.execute("blockdev-snapshot", {"node": below, "overlay": top})
                self._storage[name] = top
                self.own.add(top)
                if name in self._plugged:
                    self._plugged[name].nodes.append((top, number))

    def plug(self, disk: PluggedDisk) -> None:
        """Plug a disk into its root port, with its filters. The guest finds it a moment later.

        Raises:
            MonitorError: QEMU cannot do it.
        """
        nodes: list[tuple[str, int]] = []
        lent: list[int] = []

        def given(file: IO[bytes]) -> int:
            lent.append(lend(self.execute, file))
            return lent[-1]

        try:
            described = descriptors_of(disk, given)
            for number, node in cmdline.plugged_nodes(described):
                self.execute("blockdev-add", node)
                nodes.append((str(node["node-name"]), number))
            self._note(described, nodes)
            self.execute("device_add", cmdline.plugged_device(self.architecture, described))
        except BaseException:
            self._forget(disk.name)
            with suppress(MonitorError, GuestLost):
                self._delete(nodes)
            for number in lent:
                with suppress(
                    MonitorError, GuestLost
                ):  # it went with its block device, or with QEMU
                    self.execute("remove-fd", {"fdset-id": number})
            raise
        for it in self._waiting.pop(disk.name, []):
            self.insert(disk.name, it)

    def unplug(self, name: str, deadline: Deadline, check: Callable[[], None]) -> bool:
        """Ask the guest to let go of a disk, and pull it out.

        Its filters wait for a disk of that name, but a recorder does not.

        Args:
            name: of the disk.
            check: called often. Its exception ends the wait.

        Returns:
            Whether it is out. If not, the guest did not let go in time.

        Raises:
            MonitorError: QEMU cannot do it.
        """
        plugged, device = self._plugged[name], cmdline.disk_id(name)
        self.count_failures()
        asked = Deadline(0)
        while not self.monitor.wait_event(
            "DEVICE_DELETED",
            since=plugged.since,
            timeout=0 if asked.expired else deadline.remaining(_LOOK_SECONDS),
            among=lambda event: event["data"].get("device") == device,
        ):
            check()
            if asked.expired:
                with suppress(MonitorError):  # it is being unplugged, or is gone just now
                    self.execute("device_del", {"id": device})
                asked = Deadline(_ASK_SECONDS)
            elif deadline.expired:
                return False
        with self._lock:
            self._forget(name)
            filters = self._filters.forget(name)
            self._waiting[name] = [it for it in filters if it.order > RECORDER]
            self._delete(plugged.nodes)
        return True

    def _note(self, disk: PluggedDescriptors, nodes: list[tuple[str, int]]) -> None:
        """Note a disk in a root port."""
        with self._lock:
            self._plugged[disk.name] = _Plugged(nodes, len(self.monitor.events()))
            self._storage[disk.name] = nodes[-1][0]
            if disk.read_only:
                self._read_only.add(disk.name)
            self.own.update(node for node, _ in nodes)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._plugged.pop(name, None)
            self._storage.pop(name, None)
            self._read_only.discard(name)

    def _delete(self, nodes: Sequence[tuple[str, int]]) -> None:
        """Delete block devices, the highest first, and close QEMU's descriptors of their files."""
        for node, number in reversed(nodes):
            delete_node(self.execute, node)
            self.execute("remove-fd", {"fdset-id": number})


def descriptors_of(disk: PluggedDisk, lend: Callable[[IO[bytes]], int]) -> PluggedDescriptors:
    """The descriptors of a disk in QEMU.

    Args:
        lend: passes a file to QEMU, and returns its number there.
    """
    return PluggedDescriptors(
        name=disk.name,
        port=disk.port,
        read_only=disk.read_only,
        base=None if disk.base is None else lend(disk.base),
        layers=tuple(map(lend, disk.layers)),
    )
