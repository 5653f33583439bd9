"""The processor architectures of guests, in one table."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

_OTHER_NAMES = {
    "amd64": "x86_64",
    "arm64": "aarch64",
    "i386": "i686",
    "i586": "i686",
    "armv8l": "armv7l",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A processor architecture, and the machine that QEMU makes for it.

    Attributes:
        name: as ``uname -m`` and ``image.toml`` say it.
        debian: Debian's name. It is the end of an image's name, such as ``debian-13_arm64``.
        qemu: what follows ``qemu-system-`` in the name of the emulator.
        package: the package of Debian that has the emulator.
        firmware: the package of Debian with the firmware that the board needs; or empty.
        user: what follows ``qemu-`` in the name of the emulator for single programs.
        elf: class (1 for 32 bits, 2 for 64), byte order (1 for little, 2 for big) and machine number of
            its programs, as their first bytes have them.
        board: QEMU's machine type; ``{major}`` and ``{minor}`` stand for QEMU's version.
        board_options: further options of the board.
        processors: the CPU models to try under emulation, the best one first.
        zig: the target of Zig for its static programs.
        console: the kernel's name of the first serial console.
        bus: how virtio devices are attached.
        panic: the device through which a kernel reports a panic; empty if there is none, or if the board
            reports it by itself.
        display: the graphics card.
        has_generation: whether there is a device that tells a kernel that it was cloned.
        has_ports: whether there are PCI Express root ports for devices that come later.
        kvm_on: the machines (names as above) whose KVM runs such guests.
    """

    name: str
    debian: str
    qemu: str
    package: str
    firmware: str = ""
    user: str
    elf: tuple[int, int, int]
    board: str
    board_options: str = ""
    processors: tuple[str, ...]
    zig: str
    console: str
    bus: Literal["pci", "ccw"] = "pci"
    panic: str = ""
    display: str = "virtio-gpu-pci"
    has_generation: bool = False
    has_ports: bool = True
    kvm_on: tuple[str, ...] = ()


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture(
            name="x86_64",
            debian="amd64",
            qemu="x86_64",
            package="qemu-system-x86",
            user="x86_64",
            elf=(2, 1, 62),
            board="pc-q35-{major}.{minor}",
            board_options="graphics=off,sata=off",
            processors=("Nehalem",),
            zig="x86_64-linux-musl",
            console="ttyS0",
            panic="pvpanic-pci",
            display="VGA",
            has_generation=True,
            kvm_on=("x86_64",),
        ),
        Architecture(
            name="i686",
            debian="i386",
            qemu="x86_64",
            package="qemu-system-x86",
            user="i386",
            elf=(1, 1, 3),
            board="pc-q35-{major}.{minor}",
            board_options="graphics=off,sata=off",
            processors=("Nehalem",),
            zig="x86-linux-musl",
            console="ttyS0",
            panic="pvpanic-pci",
            display="VGA",
            has_generation=True,
            kvm_on=("x86_64", "i686"),
        ),
        Architecture(
            name="aarch64",
            debian="arm64",
            qemu="aarch64",
            package="qemu-system-arm",
            user="aarch64",
            elf=(2, 1, 183),
            board="virt-{major}.{minor}",
            board_options="gic-version=2,highmem=off",
            processors=("cortex-a57",),
            zig="aarch64-linux-musl",
            console="ttyAMA0",
            kvm_on=("aarch64",),
        ),
        Architecture(
            name="armv7l",
            debian="armhf",
            qemu="arm",
            package="qemu-system-arm",
            user="arm",
            elf=(1, 1, 40),
            board="virt-{major}.{minor}",
            board_options="gic-version=2,highmem=off",
            processors=("cortex-a15",),
            zig="arm-linux-musleabihf",
            console="ttyAMA0",
        ),
        Architecture(
            name="riscv64",
            debian="riscv64",
            qemu="riscv64",
            package="qemu-system-misc",
            firmware="opensbi",
            user="riscv64",
            elf=(2, 1, 243),
            board="virt",
            processors=("rv64",),
            zig="riscv64-linux-musl",
            console="ttyS0",
            kvm_on=("riscv64",),
        ),
        Architecture(
            name="ppc64le",
            debian="ppc64el",
            qemu="ppc64",
            package="qemu-system-ppc",
            firmware="qemu-slof",
            user="ppc64le",
            elf=(2, 1, 21),
            board="pseries-{major}.{minor}",
            processors=("power9",),
            zig="powerpc64le-linux-musl",
            console="hvc0",
            has_ports=False,
            kvm_on=("ppc64le",),
        ),
        Architecture(
            name="s390x",
            debian="s390x",
            qemu="s390x",
            package="qemu-system-misc",
            user="s390x",
            elf=(2, 2, 22),
            board="s390-ccw-virtio-{major}.{minor}",
            processors=("qemu",),
            zig="s390x-linux-musl",
            console="ttysclp0",
            bus="ccw",
            display="virtio-gpu-ccw",
            has_ports=False,
            kvm_on=("s390x",),
        ),
    )
}


def by_any_name(name: str) -> str:
    """The name of an architecture that somebody else names; empty if it is none of ours."""
    name = _OTHER_NAMES.get(name, name)
    for one in ARCHITECTURES.values():
        if name in {one.name, one.debian}:
            return one.name
    return ""


def native_architecture() -> str:
    """The architecture of this machine. It may be none of `ARCHITECTURES`."""
    machine = platform.machine().lower()
    return _OTHER_NAMES.get(machine, machine)
