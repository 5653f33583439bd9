"""Block filters: what is put between a disk and its storage while the guest runs.

A filter can slow a disk down, let requests fail, or record them. The guest does not notice that it comes
or goes: QEMU changes what the disk's device reads and writes (``qom-set`` of the property ``drive``),
whether the guest runs or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import GuestLost, MonitorError
from pytest_vmsandbox.machine import cmdline
from pytest_vmsandbox.machine.qmp import Event, Monitor

# Where a filter is: lower numbers are nearer to the storage. A recorder sees what reaches the storage.
RECORDER, THROTTLE, ERRORS = range(3)

# Kinds of requests → what QEMU calls them in its counters.
KINDS: Mapping[str, str] = {"read": "rd", "write": "wr", "flush": "flush"}

_KINDS_OF = {"read": {"read"}, "write": {"write", "flush"}}  # operation of an event → what it was

_RELEASE_SECONDS, _RELEASE_POLL_SECONDS = 10.0, 0.01  # QEMU lets go of a disk a moment later


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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a filter is made, and with what.

    Attributes:
        below: the block device below it.
        id: of its object.
        files: the names of its files in QEMU.
        has_failed: whether it has let a request fail already.
    """

    below: str
    id: str
    files: tuple[str, ...]
    has_failed: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Filter:
    """A block filter. It is one filter of one disk at a time.

    Attributes:
        order: `RECORDER`, `THROTTLE` or `ERRORS`. Of two with the same order, the first one is lower.
        device: the options of its block device, without a name. This is called again when something
            below the filter changes: there is a new block device then, in place of the old one.
        object: an object that it needs, such as a throttle group, without its id; or None. It is the same
            for all block devices of the filter.
        files: open files that it needs. They are the caller's: QEMU gets descriptors of its own.
        reasons: what QEMU says of the errors that it makes on purpose, as `os.strerror` does. A filter
            without any never fails by itself, so its errors are this host's.
        kinds: the requests that it lets fail: of `KINDS`.
        once: whether only the first one of them fails.
        detached: called when the filter is taken away: nothing comes through it any more, and its block
            device is still there. QEMU flushes that once more when it deletes it.
        flushed: called when a filter above it was taken away: QEMU flushes this one, too, when it deletes
            that.
    """

    order: int
    device: Callable[[Place], Mapping[str, object]]
    object: Mapping[str, object] | None = None
    files: Sequence[IO[bytes]] = ()
    reasons: Collection[str] = ()
    kinds: Collection[str] = ()
    once: bool = False
    detached: Callable[[], None] = lambda: None
    flushed: Callable[[], None] = lambda: None


@dataclass(frozen=True, eq=False)
class _Held:
    """A filter in QEMU, with what it holds there.

    Attributes:
        id: of its object, and the first part of the names of its block devices.
        sets: the numbers of the sets of descriptors with its files.
    """

    filter: Filter
    id: str
    sets: list[int]


@dataclass(frozen=True)
class _Layer:
    held: _Held
    node: str


@dataclass(eq=False, repr=False)
class Filters:
    """The filters of one QEMU. Calls must not overlap.

    Args:
        execute: executes a command of its monitor.
        monitor: has its events.
    """

    execute: Execute
    monitor: Monitor
    _layers: dict[str, list[_Layer]] = field(default_factory=dict)  # of each disk, lowest first
    # Each filter's block device, also those of the past → the filter and those below it.
    _through: dict[str, tuple[Filter, ...]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _failed: set[Filter] = field(default_factory=set)  # those that fail once, and have
    # Of each disk, when we have looked last: kind → requests that have failed.
    _counts: dict[str, Mapping[str, int]] = field(default_factory=dict)

    def follow(self, former: Filters) -> None:
        """The guest has moved here. Our events are also those of the QEMU before, which had other filters."""
        self._through, self._failed = former._through, former._failed
        self._numbers = former._numbers  # a name is never used again

    def insert(self, disk: str, storage: str, new: Filter, *, read_only: bool) -> None:
        """Put a filter into its place. If it is there already, nothing happens.

        Args:
            storage: the block device that the disk writes into.

        Raises:
            MonitorError: QEMU cannot do it. Everything is as before then.
        """
        layers = self._layers.get(disk, [])
        if any(layer.held.filter is new for layer in layers):
            return
        held = _Held(new, f"filter-{next(self._numbers)}", [])
        try:
            held.sets.extend(lend(self.execute, file) for file in new.files)
            if new.object is not None:
                self.execute("object-add", {**new.object, "id": held.id})
            wanted = sorted([*(layer.held for layer in layers), held], key=_order)
            self._rebuild(disk, storage, wanted, kept=wanted.index(held), read_only=read_only)
        except BaseException:
            with suppress(MonitorError, GuestLost):
                self._release(held)
            raise

    def remove(self, disk: str, storage: str, old: Filter, *, read_only: bool) -> None:
        """Take a filter away. If it is not there, nothing happens.

        Raises:
            MonitorError: QEMU cannot do it.
        """
        layers = self._layers.get(disk, [])
        for kept, held in enumerate([layer.held for layer in layers]):
            if held.filter is old:
                rest = [layer.held for layer in layers if layer.held is not held]
                self._rebuild(disk, storage, rest, kept=kept, read_only=read_only)
                self._release(held)

    def forget(self, disk: str) -> list[Filter]:
        """Delete all filters of a disk that has no device any more. Returns them, the lowest first."""
        layers = self._layers.pop(disk, [])
        self._counts.pop(disk, None)
        for layer in layers:
            layer.held.filter.detached()
        for layer in reversed(layers):
            delete_node(self.execute, layer.node)
            self._release(layer.held)
        return [layer.held.filter for layer in layers]

    def renew_failing(self, disk: str, storage: str, *, read_only: bool) -> None:
        """Make the block devices that fail on purpose again: they have nothing to flush then."""
        before = self._layers.get(disk, [])
        harmless = itertools.takewhile(lambda layer: not layer.held.filter.reasons, before)
        self._rebuild(
            disk,
            storage,
            [layer.held for layer in before],
            kept=len(list(harmless)),
            read_only=read_only,
        )

    @property
    def fail_flushes(self) -> bool:
        """Whether a filter lets flushes fail."""
        held = (layer.held for layers in self._layers.values() for layer in layers)
        return any("flush" in it.filter.kinds for it in held)

    def has_failed(self, which: Filter) -> bool:
        """Whether a filter that lets a request fail once has done so already."""
        try:
            self.count()
        except (MonitorError, GuestLost):  # QEMU has ended: we know only what it has reported
            return which in self._failed or any(
                error_of(event)[1] in which.reasons
                and which in self._through.get(error_of(event)[0], ())
                and not _KINDS_OF[event["data"]["operation"]].isdisjoint(which.kinds)
                for event in self.monitor.events()
            )
        return which in self._failed

    def count(self) -> None:
        """Note which filters have let a request fail. Call this before QEMU ends.

        Since 10.0, QEMU reports at most one error a second of each disk, but its counters have them all.

        Raises:
            MonitorError: QEMU does not tell.
            GuestLost: QEMU is gone.
        """
        for disk, layers in self._layers.items():
            if any(layer.held.filter.once for layer in layers):
                self._count(disk)

    def _count(self, disk: str) -> None:
        path = f"/{cmdline.disk_id(disk)}/"
        for device in self.execute("query-blockstats", {}):
            if path in device.get("qdev", ""):
                self._note_failures(disk, device["stats"])

    def _note_failures(self, disk: str, stats: Mapping[str, int]) -> None:
        before = self._counts.get(disk, {})
        now = {kind: stats[f"failed_{name}_operations"] for kind, name in KINDS.items()}
        self._counts[disk] = now
        filters = [layer.held.filter for layer in self._layers.get(disk, [])]
        for kind in KINDS:
            left = now[kind] - before.get(kind, 0)
            for which in reversed(filters):  # a request meets the highest one first
                if kind in which.kinds and which not in self._failed:
                    if left <= 0 or not which.once:
                        break
                    left -= 1
                    self._failed.update(it for it in filters if _is_like(it, which))

    def hides_failure(self, event: Event) -> bool:
        """Whether this host failed below a filter: an error that no filter has made on purpose."""
        node, reason = error_of(event)
        return node in self._through and not any(reason in it.reasons for it in self._through[node])

    def _rebuild(
        self, disk: str, storage: str, wanted: Sequence[_Held], *, kept: int, read_only: bool
    ) -> None:
        """Let a disk have these filters.

        Args:
            kept: how many stay as they are, from the lowest one on.
        """
        layers = self._layers.get(disk, [])
        below, before, fresh = layers[:kept], layers[kept:], list[_Layer]()
        if not before and not wanted[kept:]:
            return
        # Since 10.0, QEMU activates the block devices of a restored guest only when that goes on.
        with suppress(MonitorError):  # an older QEMU has no such command
            self.execute("blockdev-set-active", {"active": True})
        top = below[-1].node if below else storage
        fails_once = any(held.filter.once for held in (*wanted, *(it.held for it in layers)))
        try:
            if fails_once:
                self._count(disk)
            for held in wanted[kept:]:
                fresh.append(self._made(held, top, read_only=read_only))
                top = fresh[-1].node
                self._through[top] = tuple(layer.held.filter for layer in [*below, *fresh])
            device = {"path": f"/machine/peripheral/{cmdline.disk_id(disk)}", "property": "drive"}
            self.execute("qom-set", {**device, "value": top})
        except BaseException:
            with suppress(MonitorError, GuestLost):
                for layer in reversed(fresh):
                    delete_node(self.execute, layer.node)
            raise
        if fails_once:  # what has failed until now did not come through those that are new
            with suppress(MonitorError, GuestLost):
                self._count(disk)
        self._layers[disk] = [*below, *fresh]
        for layer in before:
            if layer.held not in wanted:
                layer.held.filter.detached()
        for layer in below if before else []:
            layer.held.filter.flushed()
        for layer in reversed(before):
            delete_node(self.execute, layer.node)

    def _made(self, held: _Held, below: str, *, read_only: bool) -> _Layer:
        node = f"{held.id}.{next(self._numbers)}"
        place = Place(
            below=below,
            id=held.id,
            files=tuple(f"/dev/fdset/{number}" for number in held.sets),
            has_failed=held.filter in self._failed,
        )
        own = {"node-name": node, "read-only": read_only, "discard": "unmap"}
        self.execute("blockdev-add", {**own, **held.filter.device(place)})
        return _Layer(held, node)

    def _release(self, held: _Held) -> None:
        for number in held.sets:
            self.execute("remove-fd", {"fdset-id": number})
        if held.filter.object is not None:
            self.execute("object-del", {"id": held.id})


def _is_like(one: Filter, other: Filter) -> bool:
    """Whether nobody can tell the failures of two filters that fail once: they may be parts of one fault."""
    return one.once and (one.kinds, one.reasons) == (other.kinds, other.reasons)


def _order(held: _Held) -> int:
    return held.filter.order


def error_of(event: Event) -> tuple[str, str]:
    """The block device and the reason if an event reports a failed request; empty if it does not."""
    if event["event"] != "BLOCK_IO_ERROR":
        return "", ""
    return str(event["data"].get("node-name", "")), str(event["data"].get("reason", ""))


def delete_node(execute: Execute, node: str) -> None:
    """Delete a block device, as soon as QEMU has let go of it.

    Raises:
        MonitorError: it is still used.
    """
    deadline = Deadline(_RELEASE_SECONDS)
    while True:
        try:
            execute("blockdev-del", {"node-name": node})
            break
        except MonitorError:
            if deadline.expired:
                raise
            deadline.pause(_RELEASE_POLL_SECONDS)


def lend(execute: Execute, file: IO[bytes]) -> int:
    """The number of a new set of descriptors in QEMU, with this file."""
    added = execute("add-fd", {}, fd=file.fileno())
    return int(added["fdset-id"])
