"""From what a guest is to QEMU's command line: pure functions, one for each device.

The set of devices is the same for every guest: saved states of guests fit together only then.
QEMU opens no file by name: all it needs is given to it as descriptors, so it runs as a user who
can read nothing of ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pytest_vmsandbox.core.spec import MIB, Hardware

NETDEV = "n0"
ROOT_DISK = "root"


@dataclass(frozen=True, kw_only=True)
class Descriptors:
    """The numbers under which QEMU finds its descriptors.

    Attributes:
        monitor, console: sockets.
        kernel, initrd: files, or None for a guest that is only firmware.
        base: the image's disk, only read; None without one.
        overlays: a qcow2 file for the root disk, if there is a base, and for each further disk.
    """

    monitor: int = 3
    console: int = 4
    kernel: int | None = None
    initrd: int | None = None
    base: int | None = None
    overlays: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MachineSpec:
    """Everything that QEMU's command line is made from.

    Attributes:
        name: the guest's.
        qemu: the path of the program.
        version: of QEMU.
        accelerator: ``kvm``, ``hvf`` or ``tcg``.
        processor: model, one of `processor_models`.
        hardware: of the guest.
        append: the kernel's command line.
    """

    name: str
    qemu: str
    version: tuple[int, ...]
    accelerator: str
    processor: str
    hardware: Hardware
    append: str = ""


def argv(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The whole command line."""
    return [
        spec.qemu,
        *("-name", spec.name),
        *("-nodefaults", "-no-user-config"),
        *machine(spec),
        *processors(spec),
        *("-m", f"{spec.hardware.memory // MIB}M"),
        *monitor(fds),
        *console(fds),
        *display(),
        *kernel(spec, fds),
        *disks(spec, fds),
        *network(spec),
        *entropy(),
        *panic(),
        *confinement(),
    ]


def machine(spec: MachineSpec) -> list[str]:
    """The board, a versioned one, and its accelerator."""
    major, minor = spec.version[:2]
    return ["-machine", f"pc-q35-{major}.{minor},accel={spec.accelerator},graphics=off"]


def processor_models(accelerator: str, version: tuple[int, ...]) -> tuple[str, ...]:
    """The models to try, the best one first.

    Emulated, a model that offers less is faster: what a guest is offered has to be emulated.
    QEMU before 8.0 corrupts flags after cmpxchg16b, which Debian 13's kernel notices. On some
    hosts, virtual machines themselves, QEMU aborts on the register of arch-capabilities.
    """
    if accelerator != "tcg":
        return ("host", "host,-arch-capabilities")
    return ("Nehalem",) if version >= (8, 0) else ("Nehalem,-cx16",)


def processors(spec: MachineSpec) -> list[str]:
    """The processors' model and number."""
    return ["-cpu", spec.processor, "-smp", str(spec.hardware.cpus)]


def monitor(fds: Descriptors) -> list[str]:
    """The machine protocol on a socket that we hold the other end of."""
    return ["-chardev", f"socket,id=qmp,fd={fds.monitor}", "-mon", "chardev=qmp,mode=control"]


def console(fds: Descriptors) -> list[str]:
    """The serial console, likewise."""
    return ["-chardev", f"socket,id=console,fd={fds.console}", "-serial", "chardev:console"]


def display() -> list[str]:
    """A graphics card that nobody looks at but `Guest.screenshot`."""
    return ["-display", "none", "-device", "VGA,vgamem_mb=4"]


def kernel(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The kernel that is booted directly, without a boot loader."""
    if fds.kernel is None:
        return []
    initrd = [] if fds.initrd is None else ["-initrd", f"/proc/self/fd/{fds.initrd}"]
    return ["-kernel", f"/proc/self/fd/{fds.kernel}", *initrd, "-append", spec.append]


def disks(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The root disk, an overlay on the image's, and the further, blank disks."""
    args: list[str] = []
    names = [f"disk{number}" for number in range(len(spec.hardware.disks))]
    if fds.base is not None:
        args += _descriptor_set(fds.base)
        base = {
            "node-name": "base",
            "driver": "raw",
            "read-only": True,
            "file": {"driver": "file", "filename": f"/dev/fdset/{fds.base}", "read-only": True},
        }
        args += ["-blockdev", json.dumps(base)]
        names.insert(0, ROOT_DISK)
    for name, number in zip(names, fds.overlays, strict=True):
        args += _descriptor_set(number)
        node: dict[str, object] = {
            "node-name": name,
            "driver": "qcow2",
            "discard": "unmap",
            "cache": {"no-flush": True},  # the host's own crash loses the guest anyway
            "file": {
                "driver": "file",
                "filename": f"/dev/fdset/{number}",
                "discard": "unmap",
                "cache": {"no-flush": True},
            },
        }
        if name == ROOT_DISK:
            node["backing"] = "base"
        args += ["-blockdev", json.dumps(node)]
        args += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
    return args


def _descriptor_set(number: int) -> list[str]:
    return ["-add-fd", f"fd={number},set={number}"]


def network(spec: MachineSpec) -> list[str]:
    """One network card on a network of its own inside QEMU.

    Isolated, nothing leaves it; ports of the guest are opened to here by the monitor.
    """
    restrict = "on" if spec.hardware.network == "isolated" else "off"
    return [
        "-netdev",
        f"user,id={NETDEV},ipv6=off,restrict={restrict}",
        "-device",
        f"virtio-net-pci,netdev={NETDEV},romfile=,mac=52:54:00:12:34:56",
    ]


def entropy() -> list[str]:
    """Random numbers, and a generation number by which a kernel knows that it was cloned."""
    return ["-device", "virtio-rng-pci", "-device", "vmgenid,guid=auto"]


def panic() -> list[str]:
    """A kernel's panic becomes an event of the monitor, and the guest stays as it is."""
    return ["-device", "pvpanic-pci", "-action", "panic=pause"]


def confinement() -> list[str]:
    """QEMU may not start programs nor change its user; most unusual system calls kill it."""
    deny = ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")
    return ["-sandbox", ",".join(["on", *(f"{what}=deny" for what in deny)])]
