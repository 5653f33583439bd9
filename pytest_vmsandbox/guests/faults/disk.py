"""Disks that are slow, fail or vanish."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from pytest_vmsandbox.core.errors import ConfigError, GuestLost, MonitorError
from pytest_vmsandbox.core.spec import format_size, parse_size
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.guests.running.plugging import AttachedDisk, name_of, pull_out, put_back
from pytest_vmsandbox.machine.cmdline import disk_names
from pytest_vmsandbox.machine.filters import ERRORS, KINDS, THROTTLE, Filter, Place
from pytest_vmsandbox.machine.machine import Machine

_SECTOR = 512  # bytes
_MOST_SECTORS = 4096
_MOST_BYTES = 900 << 40  # a second; QEMU takes at most 10¹⁵
_AT_A_TIME = 256  # sectors of one block device: QEMU takes 10 s to make one with 4096
# What fails → the kinds of requests for QEMU; None for all of them.
_KINDS: Mapping[str, Sequence[str | None]] = {
    "read": ("read",),
    "write": ("write", "write-zeroes"),
    "flush": ("flush",),
    "all": (None,),
}


class DiskFaults:
    """The part of `Faults` that is about disks."""

    engine: Engine

    def disk(
        self,
        disk: AttachedDisk | str = "root",
        *,
        rate: str | int | None = None,
        iops: float | None = None,
        fail: str | Sequence[str] | None = None,
        error: str = "EIO",
        once: bool = False,
        sectors: Iterable[int] | None = None,
        gone: bool = False,
    ) -> Fault:
        """Let a disk be slow, fail, or vanish. You can combine ``rate``, ``iops`` and ``fail``.

        It is below the guest's cache. The fault stays in force when the guest reboots, or is switched off
        and on. If the guest is off, its next boot has the fault.

        Args:
            disk: ``root``, ``disk0`` and so on for those of ``disks=``, the name of an attached disk, or
                what `Guest.attach_disk` has returned.
            rate: the most bytes a second, read and written together: ``"1MiB"``, or a number.
            iops: the most requests a second; at least 1.
            fail: what fails: ``read``, ``write``, ``flush``, ``all``, or several of them.
            error: the name of the error in QEMU. A guest's virtio driver reports each one as EIO.
            once: only the first request fails. With several kinds, the first one of each kind fails. With
                ``sectors``, each sector fails once.
            sectors: numbers of sectors of 512 bytes, at most 4096. Only reads and writes that touch one
                of them fail.
            gone: the disk vanishes. An attached disk is pulled out, and plugged in again at the end, with
                its content. Any other disk fails every request, as a disk does that has died.

        Raises:
            ConfigError: there is no such disk, it is recorded for crash points, or an argument is invalid.
            CommandTimeout: the guest does not let go of the disk that is to vanish.

        Example::

            with vm.faults.disk("disk0", fail="flush", once=True):
                assert vm.run(["sync", "/mnt/file"], check=False).returncode != 0
        """
        _check_flags(once=once, gone=gone)
        name, size = _found(self.engine.machines, disk)
        _refuse_recorded(self.engine.machines, name)
        if gone:
            if once or any(it is not None for it in (rate, iops, fail, sectors)):
                raise ConfigError(
                    "gone=True cannot be combined with other faults of a disk",
                    remedy="leave the other arguments out",
                )
            return _gone(self.engine, name)
        limits = _limits(rate, iops)
        failing = _failing(fail, error, sectors, once=once, size=size)
        text = ", ".join([*_limits_text(limits), *([str(failing)] if failing else [])])
        if not text:
            raise ConfigError(
                "faults.disk needs to know what is wrong with the disk",
                remedy="pass rate=, iops=, fail= or gone=True",
            )
        text = f"disk {name}: {text}"
        return _Filtered(self.engine, text, name, limits=limits, failing=failing).begin()


# -- what is asked for -----------------------------------------------------------------------------


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} is invalid", remedy="use True or False")


def _found(machines: Machines, disk: AttachedDisk | str) -> tuple[str, int]:
    """The name of a disk, and its bytes.

    Raises:
        ConfigError: the guest has no such disk.
    """
    name = name_of(machines, disk)
    sizes = _sizes(machines)
    if name not in sizes:
        raise ConfigError(
            f"{machines.name} has no disk {name!r}",
            remedy=f"use one of these: {', '.join(sizes)}"
            if sizes
            else "give it one: disks=['64MiB'] (marker vm, boot), or vm.attach_disk(size='64MiB')",
        )
    return name, sizes[name]


def _refuse_recorded(machines: Machines, name: str) -> None:
    """Refuse a fault of a disk that is recorded. At its end, QEMU would flush the disk.

    Raises:
        ConfigError: the disk is recorded.
    """
    if name in machines.faults.recorded:
        raise ConfigError(
            f"no fault of the disk {name!r} can begin while {machines.name} records it",
            remedy="begin the fault before the block of crash_points, and end it after that",
        )


def _sizes(machines: Machines) -> dict[str, int]:
    """The disks of a guest: name → bytes."""
    disks = machines.disks
    fixed = disk_names(machines.blueprint.hardware, has_base=disks.base is not None)
    return {
        **dict(zip(fixed, disks.sizes, strict=True)),
        **{disk.name: disk.size for disk in disks.plugged},
    }


def _bytes(value: object, what: str) -> int:
    """A size as a number of bytes.

    Raises:
        ConfigError: it is not one.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    return parse_size(value, what)


def _limits(rate: object, iops: object) -> dict[str, int]:
    """The limits of a throttle group in QEMU.

    Raises:
        ConfigError: one of them is no number.
    """
    limits = {}
    if rate is not None:
        limits["bps-total"] = _bytes(rate, "rate")
        if limits["bps-total"] > _MOST_BYTES:
            raise ConfigError(
                f"rate={rate!r} is too much", remedy="use at most 900 TiB, or leave rate= out"
            )
    if iops is not None:
        if not isinstance(iops, int | float) or isinstance(iops, bool) or not 1 <= iops < 1e9:
            raise ConfigError(
                f"iops={iops!r} is not a number of requests a second",
                remedy="use a number of at least 1",
            )
        limits["iops-total"] = round(iops)
    return limits


def _limits_text(limits: Mapping[str, int]) -> list[str]:
    words = {"bps-total": lambda it: f"{format_size(it)}/s", "iops-total": "{} requests/s".format}
    return [f"at most {words[what](limit)}" for what, limit in limits.items()]


@dataclass(frozen=True, kw_only=True)
class _Failing:
    """Which requests fail, and how.

    Attributes:
        kinds: kinds of requests, for QEMU; None for all.
        number: of the error.
        sectors: only requests that touch these fail; empty for all requests.
        once: whether only the first one fails.
    """

    kinds: tuple[str | None, ...]
    number: int
    sectors: tuple[int, ...] = ()
    once: bool = False

    def __str__(self) -> str:
        words = {None: "all requests", "read": "reads", "write": "writes", "flush": "flushes"}
        what = " and ".join(words[kind] for kind in self.kinds if kind in words)
        if self.sectors:
            what += f" of {len(self.sectors)} sectors from {self.sectors[0]} on"
        return f"{what} fail with {errno.errorcode[self.number]}" + ", once" * self.once

    def filters(self) -> list[Filter]:
        """What lets them fail. Each kind that fails once has its own: one of them may have failed already."""
        starts = range(0, max(len(self.sectors), 1), _AT_A_TIME)
        several = [(kind,) for kind in self.kinds] if self.once else [self.kinds]
        return [
            Filter(
                order=ERRORS,
                device=replace(
                    self, kinds=kinds, sectors=self.sectors[it : it + _AT_A_TIME]
                ).device,
                reasons={os.strerror(self.number)},
                kinds=[kind for kind in KINDS if kind in kinds or None in kinds],
                once=self.once,
            )
            for kinds in several
            for it in starts
        ]

    def device(self, place: Place) -> dict[str, object]:
        """The block device. One that fails once, and has failed, lets all requests pass."""
        rules = []
        for kind in () if self.once and place.has_failed else self.kinds:
            rule = {"event": "none", "errno": self.number, "immediately": True, "once": self.once}
            if kind is not None:
                rule["iotype"] = kind
            rules += [{**rule, "sector": it} for it in self.sectors] if self.sectors else [rule]
        device: dict[str, object] = {"driver": "blkdebug", "image": place.below}
        return {**device, "inject-error": rules} if rules else device


def _failing(
    fail: str | Sequence[str] | None,
    error: str,
    sectors: Iterable[object] | None,
    *,
    once: bool,
    size: int,
) -> _Failing | None:
    """Which requests are to fail; None for no requests.

    Raises:
        ConfigError: an argument is invalid.
    """
    numbers = {name: number for name, number in vars(errno).items() if name.startswith("E")}
    if error not in numbers:
        raise ConfigError(
            f"error={error!r} is not the name of an error",
            remedy="use a name of the module errno, such as 'EIO' or 'ENOSPC'",
        )
    if fail is None:
        if once or sectors is not None:
            raise ConfigError(
                "once= and sectors= are about requests that fail", remedy="pass fail=, too"
            )
        return None
    wanted = (fail,) if isinstance(fail, str) or not isinstance(fail, Sequence) else tuple(fail)
    if not wanted or not all(it in list(_KINDS) for it in wanted):
        raise ConfigError(
            f"fail={fail!r} is not a kind of request",
            remedy=f"use one or several of {', '.join(_KINDS)}",
        )
    several = dict.fromkeys(kind for it in wanted for kind in _KINDS[it])
    kinds = (None,) if None in several else tuple(several)
    if once:  # the first request of a kind, and not the first one of two kinds
        kinds = tuple(kind for kind in kinds if kind != "write-zeroes")
    chosen = () if sectors is None else _checked_sectors(sectors, size)
    if chosen and kinds == ("flush",):
        raise ConfigError(
            "a flush has no sectors: it is about the whole disk",
            remedy="leave sectors= out, or use fail='write'",
        )
    return _Failing(kinds=kinds, number=numbers[error], sectors=chosen, once=once)


def _checked_sectors(sectors: Iterable[object], size: int) -> tuple[int, ...]:
    """Numbers of sectors, in order.

    Args:
        size: bytes of the disk.

    Raises:
        ConfigError: there are too many, or the disk does not have them.
    """
    if not isinstance(sectors, Iterable):
        raise ConfigError(
            f"sectors={sectors!r} is no list of sectors", remedy="use numbers: sectors=[5]"
        )
    chosen: set[int] = set()
    for sector in sectors:
        if not isinstance(sector, int) or not 0 <= sector < size // _SECTOR:
            raise ConfigError(
                f"sectors= has {sector!r}, which is not a sector of the disk",
                remedy=f"use numbers from 0 to {size // _SECTOR - 1}: a sector has {_SECTOR} bytes",
            )
        chosen.add(sector)
        if len(chosen) > _MOST_SECTORS:
            break
    if not 0 < len(chosen) <= _MOST_SECTORS:
        raise ConfigError(
            f"sectors= has {'too many' if chosen else 'no'} sectors",
            remedy=f"use 1 to {_MOST_SECTORS}. For all of a disk, leave sectors= out",
        )
    return tuple(sorted(chosen))


def _gone(engine: Engine, name: str) -> Fault:
    """A disk that vanishes, in force."""
    dead = _Failing(kinds=(None,), number=errno.EIO)
    if any(disk.name == name for disk in engine.machines.disks.plugged):
        return _Vanished(engine, name, dead).begin()
    return _Filtered(engine, f"disk {name}: gone", name, failing=dead).begin()


# -- the faults ------------------------------------------------------------------------------------


class _Filtered(Fault):
    """A disk with block filters under it."""

    needs_answers = False

    def __init__(
        self,
        engine: Engine,
        text: str,
        disk: str,
        *,
        limits: Mapping[str, int] | None = None,
        failing: _Failing | None = None,
    ) -> None:
        super().__init__(engine, text)
        self._disk = disk
        self._filters: list[Filter] = []
        if limits:
            group = {"qom-type": "throttle-group", "limits": dict(limits)}
            self._filters.append(Filter(order=THROTTLE, device=_throttle, object=group))
        failures = failing.filters() if failing is not None else []
        self._filters += failures
        self._once = failures if failing is not None and failing.once else []
        self._machine: Machine | None = None  # the last one that it was put into

    def _start(self) -> None:
        with self._engine.power:
            if self._engine.is_on:
                with self._engine.use(hold=True) as running:
                    running.machine.check()
                    self._put_into(running.machine)

    def switched_on(self, machine: Machine) -> None:
        if self.in_force:
            self._put_into(machine)

    def rolled_back(self, *, was_in_force: bool) -> None:
        """It stays as it is."""

    def _put_into(self, machine: Machine) -> None:
        if (last := self._machine) is not None:
            failed = {it for it in self._once if last.drives.has_failed(it)}
            self._filters = [it for it in self._filters if it not in failed]
        self._machine = machine
        with ExitStack() as undo:
            for it in self._filters:
                machine.drives.insert(self._disk, it)
                undo.callback(_removed, machine, self._disk, it)
            undo.pop_all()

    def _stop(self) -> None:
        with self._engine.power, ExitStack() as stack:
            if (running := self._engine.running) is not None:
                for it in self._filters:
                    stack.callback(_removed, running.machine, self._disk, it)


def _throttle(place: Place) -> dict[str, object]:
    return {"driver": "throttle", "file": place.below, "throttle-group": place.id}


def _removed(machine: Machine, disk: str, which: Filter) -> None:
    """Take a filter away. If QEMU is gone, so is the filter.

    Raises:
        MonitorError: QEMU cannot do it.
    """
    try:
        machine.drives.remove(disk, which)
    except (GuestLost, MonitorError):
        if machine.ended() is None:
            raise


class _Vanished(_Filtered):
    """An attached disk that is pulled out, and plugged in again at the end.

    If the guest is restored to a moment when it had the disk, the disk fails every request instead: it
    cannot be pulled out without the guest.
    """

    needs_answers = True

    def __init__(self, engine: Engine, disk: str, dead: _Failing) -> None:
        super().__init__(engine, f"disk {disk}: gone", disk, failing=dead)

    def _start(self) -> None:
        pull_out(self._engine, self._disk)

    def _stop(self) -> None:
        super()._stop()
        self._put_back()

    def _put_back(self) -> None:
        with suppress(GuestLost):  # the disk is there when the guest is switched on again
            put_back(self._engine, self._disk)

    def rolled_back(self, *, was_in_force: bool) -> None:
        """If the disk was out, it is out again. If it was there, it fails."""
        if was_in_force and not self.in_force:
            self._put_back()
