"""The block devices of one running QEMU: what each disk reads and writes, and disks that come and go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from pytest_vmsandbox.core.architecture import Architecture
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import GuestLost, MonitorError
from pytest_vmsandbox.machine import cmdline
from pytest_vmsandbox.machine.cmdline import Descriptors, PluggedDescriptors
from pytest_vmsandbox.machine.disk import PluggedDisk
from pytest_vmsandbox.machine.qmp import Event, Monitor

_ASK_SECONDS = 5.0  # after which a guest is asked again: its reset may have lost the request
_LOOK_SECONDS = 1.0
_RELEASE_SECONDS, _RELEASE_POLL_SECONDS = (
    10.0,
    0.01,
)  # QEMU lets go of a disk a moment after the event


class Execute(Protocol):
    """Executes a command of QEMU's monitor."""

    def __call__(
        self, command: str, arguments: Mapping[str, object], *, fd: int | None = None
    ) -> Any:
        """Return its answer.

        Raises:
            MonitorError: QEMU refused it.
            GuestLost: QEMU is gone.
        """


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

    Another block device can be put under a disk while the guest runs (``qom-set`` of the property
    ``drive``), for instance one that fails on purpose. `own` tells ours from such ones.

    Args:
        execute: executes a command of its monitor.
        monitor: has its events.
        architecture: of the guest.

    Attributes:
        own: the names of all block devices that the guest's disks have written into.
    """

    execute: Execute
    monitor: Monitor
    architecture: Architecture
    own: set[str] = field(default_factory=set)
    _tops: dict[str, str] = field(
        default_factory=dict
    )  # the disks that can be written: name → node
    _plugged: dict[str, _Plugged] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def started_with(self, names: Sequence[str], fds: Descriptors) -> None:
        """Note what QEMU has on its command line.

        Args:
            names: of the disks that are always there.
        """
        self._tops = {name: name for name in names}
        for disk in fds.plugged:
            nodes = [
                (str(node["node-name"]), number) for number, node in cmdline.plugged_nodes(disk)
            ]
            self._note(disk, nodes)
        self.own.update(self._tops.values(), [cmdline.MODULES_DISK])

    def errors(self) -> Iterator[Event]:
        """The events of our own block devices that failed. Others may fail on purpose."""
        for event in self.monitor.events():
            if event["event"] == "BLOCK_IO_ERROR" and event["data"].get("node-name") in self.own:
                yield event

    def put_on_top(self, overlays: Sequence[IO[bytes]]) -> None:
        """Let each disk write to a new, empty qcow2 file from now on. Older files do not change any more.

        Args:
            overlays: a file for each disk that the guest can write to.

        Raises:
            MonitorError: QEMU cannot do it.
        """
        for name, file in zip(list(self._tops), overlays, strict=True):
            top = f"top-{next(self._numbers)}"  # a name may have 31 characters
            number = self._lend(file)
            device = cmdline.overlay(top, number, None)
            self.execute("blockdev-add", {**device, "backing": None})
            self.execute("blockdev-snapshot", {"node": self._tops[name], "overlay": top})
            self._tops[name] = top
            self.own.add(top)
            if name in self._plugged:
                self._plugged[name].nodes.append((top, number))

    def plug(self, disk: PluggedDisk) -> None:
        """Plug a disk into its root port. The guest finds it a moment later.

        Raises:
            MonitorError: QEMU cannot do it.
        """
        nodes: list[tuple[str, int]] = []
        lent: list[int] = []

        def lend(file: IO[bytes]) -> int:
            lent.append(self._lend(file))
            return lent[-1]

        try:
            described = descriptors_of(disk, lend)
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

    def unplug(self, name: str, deadline: Deadline, check: Callable[[], None]) -> bool:
        """Ask the guest to let go of a disk, and pull it out.

        Args:
            name: of the disk.
            check: called often. Its exception ends the wait.

        Returns:
            Whether it is out. If not, the guest did not let go in time.

        Raises:
            MonitorError: QEMU cannot do it.
        """
        plugged, device = self._plugged[name], cmdline.disk_id(name)
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
        self._forget(name)
        self._delete(plugged.nodes)
        return True

    def _note(self, disk: PluggedDescriptors, nodes: list[tuple[str, int]]) -> None:
        """Note a disk in a root port."""
        self._plugged[disk.name] = _Plugged(nodes, len(self.monitor.events()))
        if not disk.read_only:
            self._tops[disk.name] = nodes[-1][0]
        self.own.update(node for node, _ in nodes)

    def _forget(self, name: str) -> None:
        self._plugged.pop(name, None)
        self._tops.pop(name, None)

    def _delete(self, nodes: Sequence[tuple[str, int]]) -> None:
        """Delete block devices, the highest first, and close QEMU's descriptors of their files."""
        deadline = Deadline(_RELEASE_SECONDS)
        for node, number in reversed(nodes):
            while True:
                try:
                    self.execute("blockdev-del", {"node-name": node})
                    break
                except MonitorError:
                    if deadline.expired:
                        raise
                    deadline.pause(_RELEASE_POLL_SECONDS)
            self.execute("remove-fd", {"fdset-id": number})

    def _lend(self, file: IO[bytes]) -> int:
        """The number of a new set of descriptors in QEMU, with this file."""
        added = self.execute("add-fd", {}, fd=file.fileno())
        return int(added["fdset-id"])


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
