"""Makes QEMU's command line from a `MachineSpec`: pure functions, one for each device.

Every guest has the same set of devices, because a saved state can be loaded only then. QEMU opens no
file by name. It gets descriptors, so it can run as a user who cannot read our files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pytest_vmsandbox.core.architecture import Architecture
from pytest_vmsandbox.core.spec import MIB, NETWORKS, Hardware
from pytest_vmsandbox.machine import cards, counting
from pytest_vmsandbox.machine.cards import Card, Connected
from pytest_vmsandbox.machine.counting import RecordingDescriptors
from pytest_vmsandbox.machine.firmware import Uefi
from pytest_vmsandbox.machine.gate import options

NETDEV = "n0"
NETWORK_CARD = "nic0"
ROOT_DISK = "root"
MODULES_DISK = "modules"  # of a kernel that is not the image's own
REQUEST_DISK = "request"  # of a guest that can be recorded
RECORDED_GENERATION = "6f8a2c1e-3d54-4b7a-9e10-52c7d9b0a4f3"  # the same each time
HELPER_PORT = "vmsandbox.helper"
PORTS = ("port0", "port1", "port2", "port3")  # for devices that come while the guest runs
_PORTS_SLOT = 0x1C  # on the board, as on real ones; a guest with eight disks fills 0x01 to 0x0e


@dataclass(frozen=True, kw_only=True)
class PluggedDescriptors:
    """The descriptors of a disk in a root port.

    Attributes:
        name: of the disk.
        port: the root port.
        read_only: whether the guest can only read it.
        base: a file of this host, or None.
        layers: the qcow2 files, each on top of the one before.
    """

    name: str
    port: str
    read_only: bool
    base: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Descriptors:
    """The numbers of QEMU's descriptors.

    Attributes:
        monitor, console, helper: sockets.
        kernel, initrd: files, or None for a guest that firmware boots.
        modules: a file system with the kernel's modules; None without one.
        code, variables: files of UEFI firmware, or None without it.
        tpm: a socket to the guest's TPM, or None without one.
        gate: four sockets: what leaves the guest goes into the first one, and comes back through the second
            one; the other two are for what arrives. Empty if nobody looks at its frames.
        memory: a file with the guest's memory; None for memory of its own.
        base: the image's disk, read-only; None without one.
        overlays: the qcow2 files of the root disk, if there is a base, and of each further disk. Each
            file is on top of the one before. Only the last one is written.
        plugged: the disks in root ports.
        cards: the network cards in root ports, and a socket for each; None for one on no network.
        request: the disk that tells a guest what to run while it is recorded.
        recording: None for a machine that is not recorded.
    """

    monitor: int = 3
    console: int = 4
    helper: int = 5
    kernel: int | None = None
    initrd: int | None = None
    modules: int | None = None
    code: int | None = None
    variables: int | None = None
    tpm: int | None = None
    gate: tuple[int, ...] = ()
    memory: int | None = None
    base: int | None = None
    overlays: tuple[tuple[int, ...], ...] = ()
    plugged: tuple[PluggedDescriptors, ...] = ()
    cards: tuple[tuple[Card, int | None], ...] = ()
    request: int | None = None
    recording: RecordingDescriptors | None = None


class Start(Enum):
    """How a machine starts."""

    POWER_ON = "power on"  # boots, with memory of its own
    TO_BE_SAVED = "to be saved"  # boots, with its memory in a file
    RESTORED = "restored"  # loads a state that contains the memory
    CONTINUED = "continued"  # loads a state, and goes on writing the memory file
    CLONED = "cloned"  # loads a state, and maps the memory file without changing it
    UNPACKED = "unpacked"  # loads a state that contains the memory into the memory file; never runs

    @property
    def is_loaded(self) -> bool:
        """Whether a saved state is loaded before it runs."""
        return self in {Start.RESTORED, Start.CONTINUED, Start.CLONED, Start.UNPACKED}

    @property
    def loads_memory(self) -> bool:
        """Whether that state contains the memory."""
        return self in {Start.RESTORED, Start.UNPACKED}


@dataclass(frozen=True, kw_only=True)
class MachineSpec:
    """Everything that decides QEMU's command line.

    Attributes:
        name: the guest's name.
        qemu: the path of the program.
        version: of QEMU.
        architecture: of the guest.
        accelerator: ``kvm`` or ``tcg`` (emulation).
        processor: the CPU model, one of `processor_models`.
        hardware: of the guest.
        append: the kernel's command line.
        start: how the machine starts.
        kernel, initrd: files to boot directly; None for a guest that firmware boots.
        modules: a file system with the modules of a kernel that is not the image's; None without one.
        uefi: the firmware that boots the guest. Without it and without a kernel, BIOS does.
        tpm: whether the guest has a TPM.
        generation: its generation id; ``auto`` for a new one.
        hostname: what the guest is called inside; empty for its name.
        more_args: added to QEMU's command line.
        cards: the network cards in root ports. Their ends are for this start only.
    """

    name: str
    qemu: str
    version: tuple[int, ...]
    architecture: Architecture
    accelerator: str
    processor: str
    hardware: Hardware
    append: str = ""
    start: Start = Start.POWER_ON
    kernel: Path | None = None
    initrd: Path | None = None
    modules: Path | None = None
    uefi: Uefi | None = None
    tpm: bool = False
    generation: str = "auto"
    hostname: str = ""
    more_args: tuple[str, ...] = ()
    cards: tuple[Connected, ...] = ()


def argv(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The whole command line."""
    return [
        spec.qemu,
        *("-name", spec.name),
        *("-nodefaults", "-no-user-config"),
        *machine(spec),
        *processors(spec),
        *memory(spec, fds),
        *monitor(spec, fds),
        *console(fds),
        *report(spec, fds),
        *helper(spec, fds),
        *display(spec),
        *kernel(spec, fds),
        *firmware(spec, fds),
        *tpm(spec, fds),
        *disks(spec, fds),
        *modules(spec, fds),
        *request(spec, fds),
        *network(spec, fds),
        *entropy(spec),
        *panic(spec),
        *ports(spec),
        *plugged_disks(spec, fds),
        *plugged_cards(fds),
        *(counting.arguments(fds.recording, NETDEV) if spec.hardware.recorded else []),
        *confinement(),
        *loading(spec),
        *spec.more_args,
    ]


def machine(spec: MachineSpec) -> list[str]:
    """The board, with its version, and the accelerator.

    Linux changes its own code. In QEMU before 8.1, one CPU may go on with the old translation of code
    that another CPU has changed. Linux then panics in about one boot of a hundred. So such a QEMU
    emulates all CPUs of a guest in one thread.
    """
    its = spec.architecture
    board = its.board.format(version=".".join(map(str, spec.version[:2])))
    options = [its.board_options, its.on_emulation if spec.accelerator == "tcg" else its.on_kvm]
    options.append("memory-backend=ram")
    if spec.uefi is not None:
        options.append("pflash0=code,pflash1=variables")
        options += ["smm=on"] if spec.uefi.secure_boot else []
    accelerator = spec.accelerator
    if accelerator == "tcg" and spec.version < (8, 1) and spec.hardware.cpus > 1:
        accelerator = "tcg,thread=single"
    return ["-machine", ",".join([board, *filter(None, options)]), "-accel", accelerator]


def processor_models(
    architecture: Architecture, accelerator: str, version: tuple[int, ...]
) -> tuple[str, ...]:
    """The CPU models to try, the best one first."""
    if accelerator != "tcg":
        return architecture.native
    newest = max(first for first in architecture.emulated if first <= version)
    return (architecture.emulated[newest],)


def processors(spec: MachineSpec) -> list[str]:
    """The model and the number of CPUs."""
    return ["-cpu", spec.processor, "-smp", str(spec.hardware.cpus)]


def memory(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The guest's memory: its own, or a file.

    A clone maps the file privately, so nobody else sees what it writes. QEMU before 8.2 opens the file
    for writing nevertheless.
    """
    size = f"{spec.hardware.memory // MIB}M"
    if fds.memory is None:
        backend = f"memory-backend-ram,id=ram,size={size}"
    else:
        backend = f"memory-backend-file,id=ram,size={size},mem-path=/proc/self/fd/{fds.memory}"
        if spec.start is not Start.CLONED:
            backend += ",share=on"
            if spec.start is Start.UNPACKED:  # page by page, it would take twice as long in all
                backend += ",prealloc=on"
        elif can_map_read_only(spec.version):
            backend += ",share=off,readonly=on,rom=off"
        else:
            backend += ",share=off"
    return ["-m", size, "-object", backend]


def can_map_read_only(version: tuple[int, ...]) -> bool:
    """Whether this QEMU can map a clone's memory from a read-only file."""
    return version >= (8, 2)


def saves_to_file_addresses(version: tuple[int, ...]) -> bool:
    """Whether this QEMU saves and loads a state by an address ``file:``.

    QEMU 11 accepts no other address for a regular file. The address exists since 8.2. Since 9.1, it
    works with a descriptor that we pass to QEMU.
    """
    return version >= (9, 1)


def monitor(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The machine protocol on a socket, whose other end we hold.

    Since 11.1, QEMU warns about ``-mon``.
    """
    if spec.version >= (11, 1):
        protocol = ["-object", "monitor-qmp,id=monitor,chardev=qmp"]
    else:
        protocol = ["-mon", "chardev=qmp,mode=control"]
    return ["-chardev", f"socket,id=qmp,fd={fds.monitor}", *protocol]


def console(fds: Descriptors) -> list[str]:
    """The serial console on a socket."""
    file = None if fds.recording is None else fds.recording.console
    return _serial("console", f"socket,id=console,fd={fds.console}", file)


def report(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """A second serial port, by which a guest reports while it is recorded."""
    file = None if fds.recording is None else fds.recording.report
    return _serial("report", "null,id=report", file) if spec.hardware.recorded else []


def _serial(name: str, usual: str, file: int | None) -> list[str]:
    """A serial port, and what it writes to: a file if there is one."""
    chosen = usual if file is None else f"file,id={name},path=/dev/fdset/{file}"
    its = [] if file is None else _descriptor_set(file)
    return [*its, "-chardev", chosen, "-serial", f"chardev:{name}"]


def helper(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The serial port for the helper in the guest. It needs no network."""
    return [
        *("-device", f"{virtio('serial', spec)},id=serial"),
        *("-chardev", f"socket,id=helper,fd={fds.helper}"),
        *("-device", f"virtserialport,id=helper,chardev=helper,name={HELPER_PORT}"),
    ]


def virtio(what: str, spec: MachineSpec) -> str:
    """The name of a virtio device on the machine's bus."""
    return f"virtio-{what}-{spec.architecture.bus}"


def display(spec: MachineSpec) -> list[str]:
    """A graphics card for `Guest.screenshot`."""
    card, *options = spec.architecture.display.split(",")
    return ["-display", "none", "-device", ",".join([card, "id=display", *options])]


def kernel(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The kernel, which QEMU boots without a boot loader, and its command line.

    QEMU before 9.0 translates a program again for each address that it is loaded at. That is most of
    the cost of a process. So under emulation by such a QEMU, addresses are not randomized.
    """
    if fds.kernel is None:
        return []
    initrd = [] if fds.initrd is None else ["-initrd", f"/proc/self/fd/{fds.initrd}"]
    words = [spec.append]
    if spec.accelerator == "tcg":
        words += [spec.architecture.append_emulated]
        words += ["norandmaps"] if spec.version < (9, 0) else []
    append = " ".join(filter(None, words))
    return ["-kernel", f"/proc/self/fd/{fds.kernel}", *initrd, "-append", append]


def firmware(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The flash memory of UEFI firmware; and the order of boot, if firmware boots the guest.

    The guest boots from its root disk or not at all. Else firmware would try the network, which takes
    minutes. With Secure Boot, only the firmware may write its variables: the guest cannot in any mode.
    """
    args = [] if fds.kernel is not None else ["-boot", "strict=on"]
    if spec.uefi is not None and fds.code is not None and fds.variables is not None:
        for node, number, read_only in (
            ("code", fds.code, True),
            ("variables", fds.variables, False),
        ):
            device = flash(node, number, spec.uefi.format, read_only=read_only)
            args += [*_descriptor_set(number), "-blockdev", json.dumps(device)]
        if spec.uefi.secure_boot:
            args += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    return args


def flash(node: str, number: int, kind: str, *, read_only: bool) -> dict[str, object]:
    """A block device for flash memory: a file of a format, in a set of descriptors."""
    options = {"read-only": read_only, "cache": {"no-flush": True}}
    file = {"driver": "file", "filename": f"/dev/fdset/{number}", **options}
    return {"node-name": node, "driver": kind, **options, "file": file}


def tpm(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """A TPM 2.0, which another process emulates. Its state is part of the machine's."""
    if fds.tpm is None:
        return []
    return [
        *("-chardev", f"socket,id=tpm,fd={fds.tpm}"),
        *("-tpmdev", "emulator,id=tpm0,chardev=tpm"),
        *("-device", f"{spec.architecture.tpm},tpmdev=tpm0"),
    ]


def disks(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The root disk, which is an overlay on the image's disk, and the blank disks."""
    args: list[str] = []
    names = disk_names(spec.hardware, has_base=fds.base is not None)
    if fds.base is not None:
        args += _descriptor_set(fds.base)
        args += ["-blockdev", json.dumps(_base("base", fds.base))]
    for name, layers in zip(names, fds.overlays, strict=True):
        below = "base" if name == ROOT_DISK else None
        for depth, number in enumerate(layers):
            is_top = depth == len(layers) - 1
            node = name if is_top and fds.recording is None else f"{name}.{depth}"
            args += _descriptor_set(number)
            args += ["-blockdev", json.dumps(overlay(node, number, below, read_only=not is_top))]
            below = node
        args += _replayed(name, below, fds, read_only=False)
        device = _disk(spec.architecture, name, node=name)
        if name == ROOT_DISK and fds.kernel is None:
            device["bootindex"] = "0"
        args += ["-device", _device(device)]
    return args


def modules(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """A read-only disk, after all others, with the modules of a kernel that is not the image's own."""
    if fds.modules is None:
        return []
    name = MODULES_DISK
    block = json.dumps(_base(name, fds.modules))
    device = _device(_disk(spec.architecture, name, node=name))
    return [*_descriptor_set(fds.modules), "-blockdev", block, "-device", device]


def request(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The last disk of a guest that can be recorded. It is blank until the guest is recorded."""
    if fds.request is None:
        return []
    node = REQUEST_DISK if fds.recording is None else f"{REQUEST_DISK}.0"
    return [
        *_descriptor_set(fds.request),
        *("-blockdev", json.dumps(_base(node, fds.request))),
        *_replayed(REQUEST_DISK, node, fds, read_only=True),
        *("-device", _device(_disk(spec.architecture, REQUEST_DISK, node=REQUEST_DISK))),
    ]


def _replayed(name: str, below: str | None, fds: Descriptors, *, read_only: bool) -> list[str]:
    """A block device that ends requests when they ended in the recording."""
    device = {"driver": "blkreplay", "node-name": name, "read-only": read_only, "image": below}
    return [] if fds.recording is None else ["-blockdev", json.dumps(device)]


def _disk(architecture: Architecture, name: str, *, node: str) -> dict[str, str]:
    """A disk as a device. Its name is also its serial number, which the guest sees.

    It passes errors of its block device on to the guest: QEMU does not stop the guest then. With the
    id, another block device can be put under it while the guest runs.
    """
    return {
        "driver": f"virtio-blk-{architecture.bus}",
        "id": disk_id(name),
        "drive": node,
        "serial": name,
        "werror": "report",
        "rerror": "report",
    }


def disk_id(name: str) -> str:
    """The id of a disk's device in the monitor."""
    return f"disk-{name}"


def _device(properties: Mapping[str, str]) -> str:
    """The value of ``-device``. In the monitor, ``device_add`` takes the properties themselves."""
    return ",".join(
        [properties["driver"], *(f"{k}={v}" for k, v in properties.items() if k != "driver")]
    )


def disk_names(hardware: Hardware, *, has_base: bool) -> list[str]:
    """The names of the disks that are always there. The root disk comes first if there is one."""
    blank = [f"disk{number}" for number in range(len(hardware.disks))]
    return [ROOT_DISK, *blank] if has_base else blank


def overlay(
    node: str, number: int, below: str | None, *, read_only: bool = False
) -> dict[str, object]:
    """A block device: a qcow2 file in a set of descriptors, on top of another device."""
    options: dict[str, object] = {"discard": "unmap", "cache": {"no-flush": True}}
    options["read-only"] = read_only  # no-flush: if the host crashes, the guest is lost anyway
    device = {
        "node-name": node,
        "driver": "qcow2",
        **options,
        "file": {"driver": "file", "filename": f"/dev/fdset/{number}", **options},
    }
    return device if below is None else {**device, "backing": below}


def _base(node: str, number: int) -> dict[str, object]:
    """A block device: a file in a set of descriptors, which is only read."""
    file = {"driver": "file", "filename": f"/dev/fdset/{number}", "read-only": True}
    return {"node-name": node, "driver": "raw", "read-only": True, "file": file}


def plugged_disks(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """The disks in root ports, for a machine that starts with them."""
    args: list[str] = []
    for disk in fds.plugged:
        for number, node in plugged_nodes(disk):
            args += [*_descriptor_set(number), "-blockdev", json.dumps(node)]
        args += ["-device", _device(plugged_device(spec.architecture, disk))]
    return args


def plugged_nodes(disk: PluggedDescriptors) -> list[tuple[int, dict[str, object]]]:
    """The block devices of a disk in a root port, lowest first, and the descriptor of each."""
    nodes: list[tuple[int, dict[str, object]]] = []
    top = plugged_node(disk.name)
    if disk.base is not None:
        nodes.append((disk.base, _base(f"{top}.base", disk.base)))
    for depth, number in enumerate(disk.layers):
        is_top = depth == len(disk.layers) - 1
        below = str(nodes[-1][1]["node-name"]) if nodes else None
        name, read_only = (top, disk.read_only) if is_top else (f"{top}.{depth}", True)
        nodes.append((number, overlay(name, number, below, read_only=read_only)))
    return nodes


def plugged_node(name: str) -> str:
    """The block device that a disk in a root port writes into. Names are short enough for this."""
    return f"at-{name}"


def plugged_device(architecture: Architecture, disk: PluggedDescriptors) -> dict[str, str]:
    """A disk in a root port as a device."""
    device = _disk(architecture, disk.name, node=plugged_node(disk.name))
    return {**device, "bus": disk.port} if architecture.hot_plug == "port" else device


def plugged_cards(fds: Descriptors) -> list[str]:
    """The network cards in root ports, for a machine that starts with them."""
    args: list[str] = []
    for card, number in fds.cards:
        if number is not None:
            args += ["-netdev", cards.cable_argument(card, number)]
        device = cards.properties(card, has_cable=number is not None)
        args += ["-device", _device({**device, cards.QUIET: "off"})]
    return args


def _descriptor_set(number: int) -> list[str]:
    return ["-add-fd", f"fd={number},set={number}"]


def network(spec: MachineSpec, fds: Descriptors) -> list[str]:
    """One network card, on a network inside QEMU.

    If it is isolated, nothing leaves it, and we forward ports by the monitor. If its network is a list, all
    frames come to us, and QEMU drops them if we are gone; only then there is IPv6. A clone does not announce itself, because nobody
    else is on the network.

    Raises:
        ValueError: the network is a list, and nobody looks at the frames.
    """
    has_gate = spec.hardware.network not in NETWORKS
    if has_gate != bool(fds.gate):
        raise ValueError(f"a gate for network={spec.hardware.network!r}: {fds.gate}")
    restrict = "on" if spec.hardware.network == "isolated" else "off"
    rom = "romfile=," if spec.architecture.bus == "pci" else ""
    card = f"id={NETWORK_CARD},netdev={NETDEV},{rom}guest_announce=off,mac=52:54:00:12:34:56"
    versions = "ipv4=on,ipv6=on" if has_gate else "ipv6=off"
    netdev = f"user,id={NETDEV},{versions},restrict={restrict}"
    return [
        "-netdev",
        netdev,
        "-device",
        f"{virtio('net', spec)},{card}",
        *options.filters(fds.gate, NETDEV),
    ]


def entropy(spec: MachineSpec) -> list[str]:
    """Random numbers, and a generation id that tells a kernel that it was cloned.

    QEMU does not record what its source of random numbers gives. So a guest that can be recorded has none.
    """
    guid = RECORDED_GENERATION if spec.hardware.recorded else spec.generation
    generation = ["-device", f"vmgenid,id=generation,guid={guid}"]
    return [
        *([] if spec.hardware.recorded else ["-device", f"{virtio('rng', spec)},id=entropy"]),
        *(generation if spec.architecture.has_generation else []),
    ]


def panic(spec: MachineSpec) -> list[str]:
    """A kernel panic becomes an event of the monitor, and the guest is paused."""
    device = spec.architecture.panic
    return [*(["-device", f"{device},id=panic"] if device else []), "-action", "panic=pause"]


def ports(spec: MachineSpec) -> list[str]:
    """PCI Express root ports. Each takes one device while the guest runs.

    The set of devices cannot change once a guest is saved, but what is in a port can. Four ports cost
    nothing that we could measure. Their addresses do not depend on the number of disks. A guest of x86
    needs ACPI hot-plug (CONFIG_HOTPLUG_PCI_ACPI in Linux), one of arm64 CONFIG_HOTPLUG_PCI_PCIE. On
    channel devices, a disk is plugged without a port.
    """
    args: list[str] = []
    for number, name in enumerate(PORTS if spec.architecture.hot_plug == "port" else ()):
        place = f"bus=pcie.0,addr={_PORTS_SLOT:#x}.{number}"
        first = ",multifunction=on" if number == 0 else ""
        slot = f"chassis={number + 1},slot={number + 1}"
        args += ["-device", f"pcie-root-port,id={name},{place}{first},{slot}"]
    return args


def confinement() -> list[str]:
    """QEMU's seccomp sandbox: it may not start programs or change its user."""
    deny = ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")
    return ["-sandbox", ",".join(["on", *(f"{what}=deny" for what in deny)])]


def loading(spec: MachineSpec) -> list[str]:
    """Let a machine with a saved state wait, first for the state and then for our command."""
    return ["-incoming", "defer", "-S"] if spec.start.is_loaded else []
