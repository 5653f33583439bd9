"""Disks that are attached to a guest while it runs, and detached again.

A disk is in one of the guest's root ports. It stays there, with its content, when the guest is switched
off and on, as if by a cable. It belongs to the guest: with the guest, it is gone without a trace.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from pytest_vmsandbox.catalogue.importing.headers import begins_as
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import CommandTimeout, ConfigError, VMSandboxError
from pytest_vmsandbox.core.spec import format_size, parse_size
from pytest_vmsandbox.guests.reaching import commands
from pytest_vmsandbox.guests.reaching.commands import Command, StrPath
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Machines, Running
from pytest_vmsandbox.machine.disk import PluggedDisk, empty_overlay

_SECTOR = 512  # bytes; a disk has a whole number of them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,19}")  # a serial number has at most 20 characters
_POLL_SECONDS = 0.05
_UNDO_SECONDS = 5.0
_HEAD = 4096  # bytes that tell the format of a file
# Prints the device with a serial number. Nothing but /sys is needed. If there is udev, its links are
# there as well.
FIND_DISK = r"""
for file in /sys/block/*/serial; do
    serial=
    read -r serial 2>/dev/null <"$file" || [ -n "$serial" ] || continue
    name=${file%/serial} name=${name##*/}
    if [ "$serial" = "$1" ] && [ -b "/dev/$name" ]; then
        if command -v udevadm >/dev/null; then udevadm settle --timeout=10; fi
        echo "/dev/$name"
        break
    fi
done
"""


@dataclass(frozen=True, kw_only=True)
class AttachedDisk:
    """A disk that `Guest.attach_disk` has attached.

    Attributes:
        name: its name, which is also its serial number in the guest.
        size: bytes.
        device: the guest's device file when it was attached, such as ``/dev/vdb``. After a reboot, the
            disk may have another one. With udev, ``/dev/disk/by-id/virtio-NAME`` stays.
        read_only: whether the guest can only read it.
        guest: the name of the guest that has it.
    """

    name: str
    size: int
    device: str
    read_only: bool
    guest: str


class TakesDisks:
    """The part of `Guest` that is about attached disks."""

    engine: Engine

    def attach_disk(
        self,
        source: StrPath | None = None,
        *,
        size: str | None = None,
        name: str | None = None,
        read_only: bool = False,
        timeout: float | None = None,
    ) -> AttachedDisk:
        """Attach a disk while the guest runs, and wait until the guest has it.

        The disk is blank, or has the content of a file of this host. Pass a ``size``,
        a ``source``, or both: then the disk is larger than the file. The source must have raw content. It
        is never written: what the guest writes is kept with the guest. Do not change the source while it
        is attached.

        The disk stays attached until `detach`, also when the guest reboots or is switched off and on. A
        snapshot has the disks that are attached when it is taken, and rolls them back. Disks that were
        attached later are gone after the rollback. Disks that were detached are back.

        A guest can have four attached disks. For more, or for disks at boot, use ``disks`` of the marker
        ``vm``. A preparation must detach its disks.

        Args:
            source: a file of this host; None for a blank disk.
            size: such as ``"1GiB"``. It is rounded up to whole sectors of 512 bytes.
            name: 1 to 20 letters, digits, ``-`` and ``_``. It becomes the disk's serial number, which the
                guest shows in ``/sys/block/*/serial``. The default is ``attached0`` and so on.
            read_only: whether the guest can only read it.
            timeout: seconds for the guest to find the disk; None for the ini key ``vm_command_timeout``.

        Returns:
            An `AttachedDisk`. Its ``device`` is the guest's device file, such as ``/dev/vdb``.

        Raises:
            ConfigError: there can be no such disk, or four are attached.
            CommandTimeout: the guest does not find it. It is not attached then.
            GuestLost: the guest is switched off.

        Example::

            disk = vm.attach_disk(size="64MiB")
            vm.run(["mkfs.ext4", "-q", disk.device])
            vm.detach(disk)
        """
        with self.engine.explained():
            return _attach(
                self.engine,
                source,
                size=size,
                name=name,
                read_only=read_only,
                timeout=None if timeout is None else commands.seconds(timeout),
            )

    def detach(self, disk: AttachedDisk | str, *, timeout: float | None = None) -> None:
        """Detach a disk, and wait until the guest has let go of it. Its content is gone.

        The guest is asked to let go, and it does so even if the disk is mounted: programs that use the
        disk get I/O errors, and what was not written yet is lost. If the guest is switched off, it just
        does not have the disk any more.

        Args:
            disk: what `attach_disk` has returned, or a name.
            timeout: seconds for the guest to let go; None for the ini key ``vm_command_timeout``.

        Raises:
            ConfigError: no such disk is attached.
            CommandTimeout: the guest does not let go, for instance because it is booting. The disk is
                still attached.
        """
        with self.engine.explained():
            _detach(
                self.engine, disk, timeout=None if timeout is None else commands.seconds(timeout)
            )


def _attach(
    engine: Engine,
    source: StrPath | None,
    *,
    size: str | None,
    name: str | None,
    read_only: bool,
    timeout: float | None,
) -> AttachedDisk:
    """Attach a disk to a running guest, and wait until the guest has it.

    Args:
        timeout: seconds; None for that of a command.

    Raises:
        ConfigError: there can be no such disk, or the guest has no room for one more.
        CommandTimeout: the guest does not find the disk.
    """
    seconds = engine.command_seconds if timeout is None else timeout
    with engine.orderly, engine.use() as running, ExitStack() as undo:
        running.machine.check()
        disk = _made(engine.machines, source, size, name, read_only=read_only)
        undo.callback(disk.close)
        running.machine.drives.plug(disk)
        undo.pop_all()
        undo.callback(_take_back, engine, running, disk)
        device = _await_device(engine, disk.name, Deadline(seconds))
        with engine.still(running):
            engine.machines.add(disk)
        undo.pop_all()
        return AttachedDisk(
            name=disk.name,
            size=disk.size,
            device=device,
            read_only=disk.read_only,
            guest=engine.name,
        )


def _detach(engine: Engine, wanted: AttachedDisk | str, *, timeout: float | None) -> None:
    """Detach a disk, and wait until the guest has let go of it.

    Raises:
        ConfigError: no such disk is attached.
        CommandTimeout: the guest does not let go of it. It stays attached.
    """
    seconds = engine.command_seconds if timeout is None else timeout
    with engine.orderly, ExitStack() as stack:
        disk = attached(engine.machines, wanted)
        _unplugged(engine, disk, seconds, stack)
        engine.machines.remove(disk)


def pull_out(engine: Engine, name: str) -> None:
    """Pull an attached disk out of its port for a while. Its name and its port stay taken.

    Raises:
        ConfigError: no such disk is attached.
        CommandTimeout: the guest does not let go of it.
    """
    with engine.orderly, ExitStack() as stack:
        disk = attached(engine.machines, name)
        _unplugged(engine, disk, engine.command_seconds, stack)
        _replace(engine.machines, replace(disk, is_out=True))


def put_back(engine: Engine, name: str) -> None:
    """Plug a disk in again that `pull_out` has pulled out, and wait until the guest has it.

    If it was detached meanwhile, or is plugged in, nothing happens.

    Raises:
        MonitorError: QEMU cannot do it.
        CommandTimeout: the guest does not find it.
    """
    with engine.orderly, ExitStack() as stack:
        disks = [disk for disk in engine.machines.disks.plugged if disk.name == name]
        if not disks or not disks[0].is_out:
            return
        disk = replace(disks[0], is_out=False)
        if engine.loss is not None:  # it will be there when the guest is switched on again
            _replace(engine.machines, disk)
            return
        running = stack.enter_context(engine.use())
        running.machine.drives.plug(disk)
        _replace(engine.machines, disk)
        if engine.has_helper:
            _await_device(engine, disk.name, Deadline(engine.command_seconds))


def _replace(machines: Machines, disk: PluggedDisk) -> None:
    """Note that an attached disk has changed."""
    now = (disk if other.name == disk.name else other for other in machines.disks.plugged)
    machines.disks = replace(machines.disks, plugged=tuple(now))


def _unplugged(engine: Engine, disk: PluggedDisk, seconds: float, stack: ExitStack) -> None:
    """Wait until a guest has let go of a disk, if it has it. Until `stack` ends, what runs is the same.

    Raises:
        CommandTimeout: the guest does not let go of it.
    """
    if not engine.is_on or disk.is_out:
        return
    running = stack.enter_context(engine.use())
    machine = running.machine
    machine.check()
    if not machine.drives.unplug(disk.name, Deadline(seconds), machine.check):
        raise CommandTimeout(
            f"{engine.name} did not let go of the disk {disk.name!r} within {seconds:g} s, so it is still "
            "attached",
            seconds=seconds,
            remedy="a guest that is still booting, is paused, or has no ACPI hot-plug does not answer: wait "
            "until it is up, give it more time with timeout=, or detach the disk while the guest is "
            "switched off",
        )
    stack.enter_context(engine.still(running))


def refuse_left(engine: Engine) -> None:
    """Refuse that a preparation leaves a fault in force, or a disk attached: that cannot be in a saved guest.

    Raises:
        ConfigError: there is such a fault or disk.
    """
    engine.machines.faults.refuse_left()
    if names := [disk.name for disk in engine.machines.disks.plugged]:
        raise ConfigError(
            f"a preparation has left disks attached: {', '.join(names)}. They cannot be part of an image",
            remedy="call vm.detach() at the end of the preparation, and attach disks in the test. For disks "
            "that are always there, use disks=['1GiB']",
        )


def _take_back(engine: Engine, running: Running, disk: PluggedDisk) -> None:
    """Pull a disk out that the guest did not find. If that does not work either, it stays attached."""
    machine = running.machine
    deadline = Deadline(engine.stretch(_UNDO_SECONDS))
    with suppress(VMSandboxError):  # if the guest is gone, so is the disk
        if not machine.drives.unplug(disk.name, deadline, machine.check):
            with engine.still(running):
                engine.machines.add(disk)
            return
    disk.close()


def _await_device(engine: Engine, serial: str, deadline: Deadline) -> str:
    """The guest's device file of a disk.

    Raises:
        CommandTimeout: it does not come.
    """
    argv = ("/bin/sh", "-c", FIND_DISK, "sh", serial)
    while True:
        found = engine.run(
            Command(argv=argv, user="root"), timeout=max(deadline.remaining(), 1.0)
        ).stdout.decode(errors="replace")
        if device := found.strip():
            return device
        if deadline.expired:
            raise CommandTimeout(
                f"{engine.name} did not find the disk {serial!r} within {deadline.seconds:g} s",
                seconds=deadline.seconds,
                remedy="the guest's kernel needs ACPI hot-plug of PCI devices and the driver virtio_blk, and "
                "/sys must be mounted. If it has all of that, give it more time with timeout=",
            )
        deadline.pause(_POLL_SECONDS)


def name_of(machines: Machines, disk: AttachedDisk | str) -> str:
    """The name of a disk. Disks of several guests may have the same.

    Raises:
        ConfigError: it is attached to another guest.
    """
    if isinstance(disk, str):
        return disk
    if disk.guest != machines.name:
        raise ConfigError(
            f"the disk {disk.name!r} is attached to {disk.guest}, not to {machines.name}",
            remedy="pass it to the guest that has attached it",
        )
    return disk.name


def attached(machines: Machines, wanted: AttachedDisk | str) -> PluggedDisk:
    """The attached disk with a name.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(wanted, AttachedDisk | str):
        raise TypeError(
            f"detach takes what attach_disk has returned, or a name, not {type(wanted).__name__}"
        )
    name = name_of(machines, wanted)
    plugged = machines.disks.plugged
    for disk in plugged:
        if disk.name == name:
            return disk
    there = ", ".join(disk.name for disk in plugged)
    raise ConfigError(
        f"no disk {name!r} is attached to {machines.name}",
        remedy=f"these are: {there}" if there else "attach it first: vm.attach_disk()",
    )


# -- a disk is made --------------------------------------------------------------------------------


def _made(
    machines: Machines,
    source: StrPath | None,
    size: str | None,
    name: str | None,
    *,
    read_only: bool,
) -> PluggedDisk:
    """The files of a new disk for a guest.

    Raises:
        ConfigError: there can be no such disk, or the guest has no room for one more.
    """
    if not machines.takes_disks:
        raise ConfigError(
            f"no disk can be attached to {machines.name} while it runs: Debian's kernels for "
            f"{machines.blueprint.architecture.name} cannot take one",
            remedy="use a disk that is always there: disks=['1GiB'] (marker vm, boot)",
        )
    port = machines.free_port("another disk")
    name = _checked_name(machines, name)
    wish = None if size is None else parse_size(size, "size")
    with ExitStack() as stack:
        base: IO[bytes] | None = None
        if source is not None:
            base = stack.enter_context(_opened(Path(source)))
            wish = _size_for(Path(source), base, wish)
        if wish is None:
            raise ConfigError(
                "attach_disk needs a size or a file",
                remedy="call vm.attach_disk(size='1GiB') or vm.attach_disk('disk.raw')",
            )
        whole = -(-wish // _SECTOR) * _SECTOR
        layer = stack.enter_context(empty_overlay(whole, machines.hypervisor.cache))
        if read_only:  # QEMU takes a descriptor that is open for exactly what it may do
            with layer:
                layer = stack.enter_context(Path(f"/proc/self/fd/{layer.fileno()}").open("rb"))
        stack.pop_all()
        return PluggedDisk(
            name=name, port=port, size=whole, read_only=read_only, base=base, layers=(layer,)
        )


def _checked_name(machines: Machines, name: object) -> str:
    """A name for a new disk.

    Raises:
        ConfigError: the wanted name is invalid or taken.
    """
    taken = machines.disk_names()
    if name is None:
        free = (f"attached{number}" for number in range(len(taken) + 1))
        return next(it for it in free if it not in taken)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"name={name!r} cannot be the name of a disk",
            remedy="use 1 to 20 letters, digits, '-' and '_', with a letter or a digit first: it becomes the "
            "disk's serial number",
        )
    if name in taken:
        raise ConfigError(
            f"{machines.name} already has a disk {name!r}",
            remedy=f"use another name than {', '.join(taken)}",
        )
    return name


def _opened(path: Path) -> IO[bytes]:
    """A file of this host, open for reading.

    Raises:
        ConfigError: it cannot be a disk.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{path} cannot be attached as a disk: {why}",
            remedy="for a blank disk, call vm.attach_disk(size='1GiB')",
        ) from error
    with ExitStack() as stack:
        closing = stack.enter_context(ExitStack())
        closing.callback(os.close, number)
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(
                f"{path} cannot be attached as a disk: it is not a regular file",
                remedy="copy its content into a file",
            )
        closing.pop_all()
        file = stack.enter_context(os.fdopen(number, "rb", 0))
        if form := begins_as(os.pread(number, _HEAD, 0)):
            raise ConfigError(
                f"{path} cannot be attached as a disk: its format is {form}, and attach_disk takes raw "
                "content only",
                remedy=f"convert it first: qemu-img convert -f {form} -O raw {path.name} disk.raw",
            )
        stack.pop_all()
        return file


def _size_for(path: Path, file: IO[bytes], wish: int | None) -> int:
    """The size of a disk with the content of a file.

    Args:
        wish: bytes; None for the file's size.

    Raises:
        ConfigError: the file is empty, or larger than that.
    """
    least = os.fstat(file.fileno()).st_size
    if least == 0:
        raise ConfigError(
            f"{path} cannot be attached as a disk: it is empty",
            remedy="for a blank disk, call vm.attach_disk(size='1GiB')",
        )
    if wish is not None and wish < least:
        raise ConfigError(
            f"{path} has {format_size(least)}, which is more than size={format_size(wish)!r}",
            remedy="leave size= out, or use a larger one: the rest of the disk reads as zeros",
        )
    return least if wish is None else wish
