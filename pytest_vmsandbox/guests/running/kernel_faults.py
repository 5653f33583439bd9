"""Why a guest does not come up on a kernel of the user: what its console shows."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pytest_vmsandbox.core.errors import BootError
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.machine.machine import Machine

_SILENT_SECONDS = 10.0  # of a kernel of the user; ours take about 1 s to the first program


@dataclass(frozen=True)
class Fault:
    """What is wrong with a kernel.

    Attributes:
        brief: what happened, for people.
        options: of the kernel's configuration, which may be missing; none if it is not about them.
        are_drivers: whether they can be modules.
    """

    brief: str
    options: tuple[str, ...]
    are_drivers: bool = False

    def remedy(self, *, has_modules: bool) -> str:
        """What the user can do.

        Args:
            has_modules: whether the user's kernel came with modules.
        """
        if not self.options:
            return "the kernel's file may be damaged: copy, fetch or build it again"
        text = f"look for these options in the kernel's configuration: {', '.join(self.options)}"
        if self.are_drivers and not has_modules:
            text += ". If they are modules, name the folder or the package that has them, not only the kernel"
        return text


_DISK = ("CONFIG_PCI=y", "CONFIG_VIRTIO_PCI=y", "CONFIG_VIRTIO_BLK=y", "CONFIG_DEVTMPFS=y")
_PROGRAM = ("CONFIG_BINFMT_SCRIPT=y", "CONFIG_BINFMT_ELF=y", "CONFIG_64BIT=y")
SILENT = Fault(
    "the kernel has written nothing to the serial console",
    (
        "CONFIG_PRINTK=y",
        "CONFIG_TTY=y",
        "CONFIG_SERIAL_8250=y",
        "CONFIG_SERIAL_8250_CONSOLE=y",
        "CONFIG_BLK_DEV_INITRD=y",
    ),
)
# The first that is found counts.
_FAULTS = {
    r"^vmsandbox: there is no /dev/": Fault("the kernel does not see the root disk", _DISK, True),
    r"^vmsandbox: cannot mount /dev/": Fault(
        "the kernel cannot mount the root disk", ("CONFIG_BLOCK=y", "CONFIG_EXT4_FS=y"), True
    ),
    r"Failed to execute /init|No working init found|Requested init .* failed": Fault(
        "the kernel cannot start the first program", _PROGRAM
    ),
    r"VFS: (Unable to mount root fs|Cannot open root device)": Fault(
        "the kernel does not use the initial RAM file system",
        ("CONFIG_BLK_DEV_INITRD=y", *_PROGRAM),
    ),
    r"^Kernel panic - not syncing: VFS|Initramfs unpacking failed": Fault(
        "the kernel cannot unpack the initial RAM file system",
        ("CONFIG_BLK_DEV_INITRD=y", "CONFIG_RD_GZIP=y", "CONFIG_RD_XZ=y", "CONFIG_RD_ZSTD=y"),
    ),
    r"(?s)(?:SeaBIOS \(version.*?){3}": Fault("the kernel resets the machine again and again", ()),
}


def fault(console: str) -> Fault | None:
    """What is wrong with a kernel that boots; None if nothing is known to be.

    Args:
        console: what it has written.
    """
    for pattern, found in _FAULTS.items():
        if re.search(pattern, console, re.MULTILINE):
            return found
    return None


def check_booting(machine: Machine, blueprint: Blueprint, seconds: float) -> None:
    """Check that a guest can still come up.

    Args:
        seconds: since it was switched on.

    Raises:
        BootError: it cannot.
    """
    if (kernel := blueprint.kernel) is None:
        machine.check_booting(seconds)
        return
    lost: BootError | None = None
    try:
        machine.check_booting(seconds)
    except BootError as error:
        lost = error
    known = fault(machine.console.this_boot)
    if (
        known is None
        and seconds > blueprint.stretch(_SILENT_SECONDS)
        and machine.stage == "firmware"
    ):
        known = SILENT
    if known is not None:
        raise BootError(
            f"{machine.spec.name} cannot boot on {kernel.release}: {known.brief}",
            stage=machine.stage if lost is None else lost.stage,
            seconds=seconds,
            details=machine.console_lines(),
            remedy=known.remedy(has_modules=kernel.modules is not None),
        ) from lost
    if lost is not None:
        raise lost
