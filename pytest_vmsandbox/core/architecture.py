"""The processor architectures of guests, in one table."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.core.spec import GIB, MIB

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
        elsewhere: its name elsewhere: package manager, or system with apt → package.
        firmware: the file of firmware that the emulator reads from its own data; empty if it needs none.
        firmware_package: the package of Debian that has this file.
        user: what follows ``qemu-`` in the name of the emulator for single programs.
        elf: class (1 for 32 bits, 2 for 64), byte order (1 for little, 2 for big) and machine number of
            its programs, as their first bytes have them.
        board: QEMU's machine type; ``{version}`` stands for QEMU's version, such as ``10.0``.
        board_options: further options of the board.
        zig: the target of Zig for its static programs.
        emulated: the CPU models under emulation: the first version of QEMU → model.
        native: the CPU models to try with KVM, the best one first.
        on_emulation, on_kvm: options of the board that depend on the accelerator.
        append_emulated: what an emulated guest's kernel needs on its command line; empty if nothing.
        slowness: how much slower such a guest is under emulation than one of x86: the larger ratio of CPU
            time for a boot and for 300 small programs, measured with QEMU 7.2 and rounded up.
        timers_since: the first version of QEMU that saves all timers of an emulated guest. If an older one
            loads its state, programs that sleep never go on.
        kvm_on: the machines (names as above) whose KVM runs such guests.
        console: the kernel's name of the first serial console.
        bus: how virtio devices are attached.
        panic: the device through which a kernel reports a panic; empty if there is none.
        board_reports_panic: whether the board reports it by itself.
        has_bios: whether BIOS can boot a disk.
        uefi_board: the board as descriptions of UEFI firmware name it; empty if UEFI cannot boot a disk.
        uefi_package: the package of Debian with that firmware.
        secure_boot: whether we know how to protect that firmware's variables from the guest.
        tpm: the device of a TPM.
        display: the graphics card, and its options.
        has_generation: whether there is a device that tells a kernel that it was cloned.
        can_be_recorded: whether QEMU's record and replay was seen to work with it.
        narrow: the architecture of 32-bit programs that such a machine can run; or empty.
        in_uv: whether each version of uv that we support has names for its platforms.
        most_cpus, most_memory: what the board takes at most, in CPUs and bytes; None without a limit of ours.
        memory_step: bytes; the board takes multiples of it.
        hot_plug: how a disk comes while the guest runs: into a PCI Express root port, anywhere on the bus,
            or not at all, because Debian's kernels lack the driver.
    """

    name: str
    debian: str
    qemu: str
    package: str
    elsewhere: Mapping[str, str]
    firmware: str = ""
    firmware_package: str = ""
    user: str
    elf: tuple[int, int, int]
    board: str
    board_options: str = ""
    zig: str
    emulated: Mapping[tuple[int, ...], str]
    native: tuple[str, ...] = ("host",)
    on_emulation: str = ""
    on_kvm: str = ""
    append_emulated: str = ""
    slowness: float = 1.0
    timers_since: tuple[int, ...] = (0,)
    kvm_on: tuple[str, ...] = ()
    console: str
    bus: Literal["pci", "ccw"] = "pci"
    panic: str = ""
    board_reports_panic: bool = False
    has_bios: bool = False
    uefi_board: str = ""
    uefi_package: str = ""
    secure_boot: bool = False
    tpm: str = ""
    display: str = "virtio-gpu-pci"
    has_generation: bool = False
    can_be_recorded: bool = False
    most_cpus: int | None = None
    most_memory: int | None = None
    memory_step: int = 1
    hot_plug: Literal["port", "bus", "none"] = "none"
    narrow: str = ""
    in_uv: bool = False

    @property
    def reports_panic(self) -> bool:
        """Whether QEMU hears of a panic. If not, only the console tells."""
        return bool(self.panic) or self.board_reports_panic


def _elsewhere(dnf: str, pacman: str, zypper: str, card: str = "") -> dict[str, str]:
    """The packages that have an emulator where Debian's names are unknown.

    Args:
        card: the graphics card, if it has a package of its own there.
    """
    if card:
        dnf += f" qemu-device-display-{card}"
        module = f"qemu-hw-{'s390x' if card.endswith('ccw') else 'display'}-{card}"
        pacman, zypper = f"{pacman} {module}", f"{zypper} {module}"
    return {"dnf": dnf, "pacman": pacman, "zypper": zypper, "brew": "qemu"}


# Under emulation, a model with fewer features is faster, because QEMU emulates all that a guest uses.
# QEMU before 8.0 corrupts flags after cmpxchg16b, which breaks Debian 13's kernel. On some hosts that are
# virtual machines, QEMU aborts on the register of arch-capabilities. With graphics=off, BIOS and boot
# loaders write to the serial console, too. The unused SATA controller is off, so a guest boots faster.
# Linux checks at boot that the timer ticks, and panics if it does not: on a loaded host, an emulated one may
# come too late («IO-APIC + timer doesn't work»). With KVM, Linux does not check it.
_X86_64 = Architecture(
    name="x86_64",
    debian="amd64",
    qemu="x86_64",
    package="qemu-system-x86",
    elsewhere=_elsewhere("qemu-system-x86-core", "qemu-system-x86", "qemu-x86"),
    user="x86_64",
    elf=(2, 1, 62),
    zig="x86_64-linux-musl",
    board="pc-q35-{version}",
    board_options="graphics=off,sata=off",
    emulated={(0,): "Nehalem,-cx16", (8, 0): "Nehalem"},
    native=("host", "host,-arch-capabilities"),
    append_emulated="no_timer_check",
    kvm_on=("x86_64",),
    console="ttyS0",
    panic="pvpanic-pci",
    has_bios=True,
    uefi_board="pc-q35-*",
    uefi_package="ovmf",
    secure_boot=True,
    tpm="tpm-crb",
    display="VGA,vgamem_mb=4",
    has_generation=True,
    can_be_recorded=True,
    hot_plug="port",
    narrow="i686",
    in_uv=True,
)
# Without gic-version=host, a guest could not start with KVM on a host that has another interrupt controller.
_AARCH64 = Architecture(
    name="aarch64",
    debian="arm64",
    qemu="aarch64",
    package="qemu-system-arm",
    elsewhere=_elsewhere(
        "qemu-system-aarch64-core", "qemu-system-aarch64", "qemu-arm", "virtio-gpu-pci"
    ),
    user="aarch64",
    elf=(2, 1, 183),
    zig="aarch64-linux-musl",
    board="virt-{version}",
    emulated={(0,): "cortex-a57"},
    on_emulation="gic-version=2,highmem=off",
    on_kvm="gic-version=host",
    slowness=1.5,
    kvm_on=("aarch64",),
    narrow="armv7l",
    in_uv=True,
    console="ttyAMA0",
    most_cpus=8,
    most_memory=3 * GIB,
    uefi_board="virt-*",
    uefi_package="qemu-efi-aarch64",
    tpm="tpm-tis-device",
    hot_plug="port",
)

ARCHITECTURES = {
    one.name: one
    for one in (
        _X86_64,
        replace(
            _X86_64,
            name="i686",
            uefi_board="",
            secure_boot=False,
            debian="i386",
            user="i386",
            elf=(1, 1, 3),
            zig="x86-linux-musl",
            narrow="",
            in_uv=False,
        ),
        _AARCH64,
        replace(
            _AARCH64,
            name="armv7l",
            uefi_board="",
            tpm="",
            debian="armhf",
            user="arm",
            elf=(1, 1, 40),
            zig="arm-linux-musleabihf",
            emulated={(0,): "cortex-a15"},
            narrow="",
            in_uv=False,
            hot_plug="none",
            slowness=2.0,
            kvm_on=(),
        ),
        Architecture(
            name="riscv64",
            debian="riscv64",
            qemu="riscv64",
            package="qemu-system-misc",
            elsewhere=_elsewhere(
                "qemu-system-riscv-core", "qemu-system-riscv", "qemu-extra", "virtio-gpu-pci"
            ),
            firmware="opensbi-riscv64-generic-fw_dynamic.bin",
            firmware_package="opensbi",
            user="riscv64",
            elf=(2, 1, 243),
            zig="riscv64-linux-musl",
            board="virt",
            emulated={(0,): "rv64"},
            slowness=1.5,
            kvm_on=("riscv64",),
            console="ttyS0",
        ),
        Architecture(
            name="ppc64le",
            debian="ppc64el",
            qemu="ppc64",
            package="qemu-system-ppc",
            elsewhere=_elsewhere(
                "qemu-system-ppc-core", "qemu-system-ppc", "qemu-ppc", "virtio-gpu-pci"
            ),
            firmware="slof.bin",
            firmware_package="qemu-system-data",
            user="ppc64le",
            elf=(2, 1, 21),
            zig="powerpc64le-linux-musl",
            board="pseries-{version}",
            emulated={(0,): "power9"},
            on_emulation="cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
            timers_since=(8, 2),
            slowness=2.5,
            kvm_on=("ppc64le",),
            memory_step=256 * MIB,
            board_reports_panic=True,
            console="hvc0",
        ),
        Architecture(
            name="s390x",
            debian="s390x",
            qemu="s390x",
            package="qemu-system-misc",
            elsewhere={
                "ubuntu": "qemu-system-s390x",
                **_elsewhere(
                    "qemu-system-s390x-core", "qemu-system-s390x", "qemu-s390x", "virtio-gpu-ccw"
                ),
            },
            firmware="s390-ccw.img",
            firmware_package="qemu-system-data",
            user="s390x",
            elf=(2, 2, 22),
            zig="s390x-linux-musl",
            board="s390-ccw-virtio-{version}",
            emulated={(0,): "qemu"},
            slowness=1.5,
            kvm_on=("s390x",),
            board_reports_panic=True,
            console="ttysclp0",
            bus="ccw",
            display="virtio-gpu-ccw",
            hot_plug="bus",
        ),
    )
}


def architecture_of(name: str) -> Architecture:
    """The architecture with a name.

    Raises:
        LaunchError: we know no machine for it.
    """
    if name not in ARCHITECTURES:
        raise LaunchError(
            f"there are no guests of {name}",
            remedy=f"use an image for one of {', '.join(map(debian_name, ARCHITECTURES))}. They are emulated here",
        )
    return ARCHITECTURES[name]


def debian_name(name: str) -> str:
    """Debian's name of an architecture, as names of images have it. One that we do not know stays."""
    found = ARCHITECTURES.get(name)
    return name if found is None else found.debian


def by_any_name(name: str) -> str:
    """The name of an architecture that somebody else names; empty if it is none of ours."""
    name = _OTHER_NAMES.get(name, name)
    for one in ARCHITECTURES.values():
        if name in {one.name, one.debian}:
            return one.name
    return ""


def of_programs(machine: str, bits: int) -> str:
    """The architecture of programs, which may be for 32 bits on a machine with 64.

    Args:
        machine: as the machine calls itself. An unknown name is returned as it is.
        bits: of the programs.
    """
    name = by_any_name(machine) or machine
    found = ARCHITECTURES.get(name)
    return found.narrow if found is not None and found.narrow and bits == 32 else name


def native_architecture() -> str:
    """The architecture of this machine. It may be none of `ARCHITECTURES`."""
    machine = platform.machine().lower()
    return _OTHER_NAMES.get(machine, machine)
