"""QEMU's command line: a table for each device, and the whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.spec import GIB, MIB, Hardware
from pytest_vmsandbox.machine import cmdline
from pytest_vmsandbox.machine.cmdline import Descriptors, MachineSpec, PluggedDescriptors, Start
from pytest_vmsandbox.machine.firmware import Uefi

X86_64 = ARCHITECTURES["x86_64"]
SPEC = MachineSpec(
    name="debian-13-1",
    qemu="/usr/bin/qemu-system-x86_64",
    version=(7, 2, 22),
    architecture=X86_64,
    accelerator="tcg",
    processor="Nehalem,-cx16",
    hardware=Hardware(),
    append="console=ttyS0 quiet",
)


WITHOUT_CAPABILITIES = "cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"
BOARD = "graphics=off,sata=off,memory-backend=ram"


def with_hardware(**values):
    return replace(SPEC, hardware=replace(SPEC.hardware, **values))


@pytest.mark.parametrize(
    ("changes", "argv"),
    [
        ({}, ["-machine", f"pc-q35-7.2,{BOARD}", "-accel", "tcg"]),
        (
            {"version": (10, 0, 2), "accelerator": "kvm"},
            ["-machine", f"pc-q35-10.0,{BOARD}", "-accel", "kvm"],
        ),
        ({"version": (9, 1)}, ["-machine", f"pc-q35-9.1,{BOARD}", "-accel", "tcg"]),
    ],
)
def test_machine(changes, argv):
    assert cmdline.machine(replace(SPEC, **changes)) == argv


@pytest.mark.parametrize(
    ("accelerator", "version", "cpus", "expected"),
    [
        ("tcg", (7, 2, 22), 1, "tcg"),
        ("tcg", (7, 2, 22), 2, "tcg,thread=single"),
        ("tcg", (8, 0, 5), 4, "tcg,thread=single"),
        ("tcg", (8, 1, 0), 4, "tcg"),
        ("kvm", (7, 2, 22), 2, "kvm"),
        ("hvf", (7, 2, 22), 2, "hvf"),
    ],
)
def test_threads(accelerator, version, cpus, expected):
    """An old QEMU emulates several processors in one thread."""
    spec = replace(with_hardware(cpus=cpus), accelerator=accelerator, version=version)
    assert cmdline.machine(spec)[-2:] == ["-accel", expected]


@pytest.mark.parametrize(
    ("accelerator", "version", "models"),
    [
        ("tcg", (7, 2, 22), ["Nehalem,-cx16"]),
        ("tcg", (8, 0, 0), ["Nehalem"]),
        ("tcg", (10, 0, 2), ["Nehalem"]),
        ("kvm", (7, 2, 22), ["host", "host,-arch-capabilities"]),
        ("hvf", (10, 0, 2), ["host", "host,-arch-capabilities"]),
    ],
)
def test_processor_models(accelerator, version, models):
    assert list(cmdline.processor_models(X86_64, accelerator, version)) == models


def test_processors():
    assert cmdline.processors(with_hardware(cpus=4)) == ["-cpu", "Nehalem,-cx16", "-smp", "4"]


def test_sockets():
    fds = Descriptors(monitor=8, console=9, helper=10)
    assert cmdline.monitor(SPEC, fds) == [
        *("-chardev", "socket,id=qmp,fd=8"),
        *("-mon", "chardev=qmp,mode=control"),
    ]
    assert cmdline.console(fds) == [
        *("-chardev", "socket,id=console,fd=9"),
        *("-serial", "chardev:console"),
    ]
    assert cmdline.helper(SPEC, fds) == [
        *("-device", "virtio-serial-pci,id=serial"),
        *("-chardev", "socket,id=helper,fd=10"),
        *("-device", "virtserialport,id=helper,chardev=helper,name=vmsandbox.helper"),
    ]


@pytest.mark.parametrize(
    ("version", "protocol"),
    [
        ((7, 2), ["-mon", "chardev=qmp,mode=control"]),
        ((11, 0, 2), ["-mon", "chardev=qmp,mode=control"]),
        ((11, 1), ["-object", "monitor-qmp,id=monitor,chardev=qmp"]),
        ((12, 0), ["-object", "monitor-qmp,id=monitor,chardev=qmp"]),
    ],
)
def test_monitor(version, protocol):
    """A new QEMU warns of the old way."""
    assert cmdline.monitor(replace(SPEC, version=version), Descriptors())[2:] == protocol


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((7, 2, 22), False),
        ((8, 2), False),  # there are such addresses, but not for what is passed as a descriptor
        ((9, 0, 4), False),
        ((9, 1), True),
        ((10, 0, 13), True),
        ((11, 0), True),
    ],
)
def test_by_which_address_a_state_is_saved(version, expected):
    assert cmdline.saves_to_file_addresses(version) is expected


@pytest.mark.parametrize(
    ("start", "version", "backend"),
    [
        (Start.TO_BE_SAVED, (7, 2), ",share=on"),
        (Start.CONTINUED, (10, 0), ",share=on"),
        (Start.CLONED, (7, 2), ",share=off"),
        (Start.CLONED, (8, 2), ",share=off,readonly=on,rom=off"),
        (Start.CLONED, (10, 0), ",share=off,readonly=on,rom=off"),
    ],
)
def test_memory_in_a_file(start, version, backend):
    spec = replace(with_hardware(memory=256 * MIB), start=start, version=version)
    file = "memory-backend-file,id=ram,size=256M,mem-path=/proc/self/fd/7"
    argv = ["-m", "256M", "-object", file + backend]
    assert cmdline.memory(spec, Descriptors(memory=7)) == argv


def test_memory_of_its_own():
    argv = ["-m", "512M", "-object", "memory-backend-ram,id=ram,size=512M"]
    assert cmdline.memory(SPEC, Descriptors()) == argv


@pytest.mark.parametrize("start", Start)
def test_loading(start):
    loaded = start in {Start.RESTORED, Start.CONTINUED, Start.CLONED, Start.UNPACKED}
    assert start.is_loaded is loaded
    argv = ["-incoming", "defer", "-S"] if loaded else []
    assert cmdline.loading(replace(SPEC, start=start)) == argv


@pytest.mark.parametrize(
    ("fds", "argv"),
    [
        (Descriptors(), []),
        (Descriptors(initrd=6), []),
        (
            Descriptors(kernel=5),
            ["-kernel", "/proc/self/fd/5", "-append", "console=ttyS0 quiet no_timer_check"],
        ),
        (
            Descriptors(kernel=5, initrd=6),
            [
                "-kernel",
                "/proc/self/fd/5",
                "-initrd",
                "/proc/self/fd/6",
                "-append",
                "console=ttyS0 quiet no_timer_check",
            ],
        ),
    ],
)
def test_kernel(fds, argv):
    assert cmdline.kernel(replace(SPEC, version=(10, 0)), fds) == argv


@pytest.mark.parametrize(
    ("accelerator", "version", "more"),
    [
        ("tcg", (7, 2), " no_timer_check norandmaps"),
        ("tcg", (8, 2), " no_timer_check norandmaps"),
        ("tcg", (9, 0), " no_timer_check"),
        ("kvm", (7, 2), ""),
    ],
)
def test_what_emulation_adds_to_the_command_line(accelerator, version, more):
    spec = replace(SPEC, accelerator=accelerator, version=version)
    assert cmdline.kernel(spec, Descriptors(kernel=5))[-1] == f"console=ttyS0 quiet{more}"


@pytest.fixture
def uefi(tmp_path):
    return Uefi(code=tmp_path, variables=tmp_path, format="raw", secure_boot=False, digest="0" * 64)


class TestFirmware:
    def test_a_kernel_needs_none(self):
        assert cmdline.firmware(SPEC, Descriptors(kernel=5)) == []

    def test_bios_is_what_qemu_has(self):
        assert cmdline.firmware(SPEC, Descriptors()) == ["-boot", "strict=on"]
        assert cmdline.machine(SPEC)[1] == f"pc-q35-7.2,{BOARD}"

    @pytest.mark.parametrize("kind", ["raw", "qcow2"])
    def test_uefi(self, uefi, kind):
        spec = replace(SPEC, uefi=replace(uefi, format=kind))
        argv = cmdline.firmware(spec, Descriptors(code=5, variables=6))
        pairs = list(zip(argv[::2], argv[1::2], strict=True))
        code, variables = (json.loads(value) for name, value in pairs if name == "-blockdev")
        assert [value for name, value in pairs if name == "-add-fd"] == ["fd=5,set=5", "fd=6,set=6"]
        assert (code["node-name"], code["driver"], code["read-only"]) == ("code", kind, True)
        assert (variables["driver"], variables["read-only"]) == (kind, False)
        assert variables["file"]["filename"] == "/dev/fdset/6"
        assert ("-boot", "strict=on") in pairs
        assert "-global" not in argv
        assert cmdline.machine(spec)[1] == f"pc-q35-7.2,{BOARD},pflash0=code,pflash1=variables"

    def test_secure_boot_locks_the_flash_memory(self, uefi):
        spec = replace(SPEC, uefi=replace(uefi, secure_boot=True))
        argv = cmdline.firmware(spec, Descriptors(code=5, variables=6))
        assert argv[-2:] == ["-global", "driver=cfi.pflash01,property=secure,value=on"]
        assert cmdline.machine(spec)[1].endswith(",smm=on")

    def test_a_tpm(self):
        assert cmdline.tpm(SPEC, Descriptors()) == []
        assert cmdline.tpm(SPEC, Descriptors(tpm=7)) == [
            *("-chardev", "socket,id=tpm,fd=7", "-tpmdev", "emulator,id=tpm0,chardev=tpm"),
            *("-device", "tpm-crb,tpmdev=tpm0"),
        ]


@pytest.mark.parametrize(("network", "restrict"), [("isolated", "on"), ("nat", "off")])
def test_network(network, restrict):
    netdev, device = cmdline.network(with_hardware(network=network), Descriptors())[1::2]
    assert f"restrict={restrict}" in netdev.split(",")
    assert "ipv6=off" in netdev.split(",")
    assert "hostfwd" not in netdev
    assert device.startswith("virtio-net-pci,id=nic0,netdev=n0")


def test_a_network_that_is_a_list_has_a_gate():
    spec = with_hardware(network="example.org:443")
    netdev, _, *gate = cmdline.network(spec, Descriptors(gate=(7, 8, 9, 10)))[1::2]
    assert netdev == "user,id=n0,ipv4=on,ipv6=on,restrict=off"
    assert gate == [
        *(f"socket,id=gate{number},fd={number}" for number in (7, 8, 9, 10)),
        "filter-redirector,id=leaving,netdev=n0,queue=rx,outdev=gate7,indev=gate8",
        "filter-redirector,id=arriving,netdev=n0,queue=tx,outdev=gate9,indev=gate10",
    ]
    with pytest.raises(ValueError, match="gate"):
        cmdline.network(spec, Descriptors())
    with pytest.raises(ValueError, match="gate"):
        cmdline.network(with_hardware(network="nat"), Descriptors(gate=(7, 8, 9, 10)))


def test_devices_that_are_always_there():
    assert cmdline.display(SPEC) == ["-display", "none", "-device", "VGA,id=display,vgamem_mb=4"]
    rng, vmgenid = "virtio-rng-pci,id=entropy", "vmgenid,id=generation,guid=auto"
    assert cmdline.entropy(SPEC) == ["-device", rng, "-device", vmgenid]
    assert cmdline.panic(SPEC) == ["-device", "pvpanic-pci,id=panic", "-action", "panic=pause"]


def test_ports_have_an_address_that_no_other_device_changes():
    devices = cmdline.ports(SPEC)[1::2]
    assert devices == [
        "pcie-root-port,id=port0,bus=pcie.0,addr=0x1c.0,multifunction=on,chassis=1,slot=1",
        "pcie-root-port,id=port1,bus=pcie.0,addr=0x1c.1,chassis=2,slot=2",
        "pcie-root-port,id=port2,bus=pcie.0,addr=0x1c.2,chassis=3,slot=3",
        "pcie-root-port,id=port3,bus=pcie.0,addr=0x1c.3,chassis=4,slot=4",
    ]


def test_modules_of_a_kernel_of_the_user():
    assert cmdline.modules(SPEC, Descriptors()) == []
    add, descriptors, option, block, device, disk = cmdline.modules(SPEC, Descriptors(modules=9))
    assert (add, descriptors, option, device) == ("-add-fd", "fd=9,set=9", "-blockdev", "-device")
    assert json.loads(block) == {
        "node-name": "modules",
        "driver": "raw",
        "read-only": True,
        "file": {"driver": "file", "filename": "/dev/fdset/9", "read-only": True},
    }
    assert disk.startswith("virtio-blk-pci,id=disk-modules,drive=modules,serial=modules")
    whole = cmdline.argv(SPEC, Descriptors(base=8, overlays=((7,),), modules=9))
    drives = [word for word in whole if word.startswith("virtio-blk-pci")]
    assert [word.partition("serial=")[2].partition(",")[0] for word in drives] == [
        "root",
        "modules",
    ]


class TestArchitectures:
    """What differs between the boards."""

    @staticmethod
    def spec(name, **values):
        its = ARCHITECTURES[name]
        return replace(SPEC, **{"architecture": its, "version": (10, 0, 13), **values})

    @classmethod
    def devices(cls, name):
        argv = cmdline.argv(cls.spec(name, hardware=Hardware(disks=(MIB,))), TestWhole.FDS)
        return {argv[i + 1].split(",")[0] for i, word in enumerate(argv) if word == "-device"}

    @pytest.mark.parametrize(
        ("name", "accelerator", "board"),
        [
            ("x86_64", "tcg", f"pc-q35-10.0,{BOARD}"),
            ("i686", "kvm", f"pc-q35-10.0,{BOARD}"),
            ("aarch64", "tcg", "virt-10.0,gic-version=2,highmem=off,memory-backend=ram"),
            ("aarch64", "kvm", "virt-10.0,gic-version=host,memory-backend=ram"),
            ("armv7l", "tcg", "virt-10.0,gic-version=2,highmem=off,memory-backend=ram"),
            ("riscv64", "tcg", "virt,memory-backend=ram"),
            (
                "ppc64le",
                "tcg",
                f"pseries-10.0,{WITHOUT_CAPABILITIES},memory-backend=ram",
            ),
            ("ppc64le", "kvm", "pseries-10.0,memory-backend=ram"),
            ("s390x", "tcg", "s390-ccw-virtio-10.0,memory-backend=ram"),
        ],
    )
    def test_boards(self, name, accelerator, board):
        assert cmdline.machine(self.spec(name, accelerator=accelerator))[1] == board

    @pytest.mark.parametrize("name", ["aarch64", "armv7l", "riscv64", "ppc64le", "s390x"])
    def test_devices_of_x86_alone(self, name):
        assert not self.devices(name) & {"VGA", "vmgenid", "pvpanic-pci"}

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_the_bus_of_all_devices(self, name):
        bus = "ccw" if name == "s390x" else "pci"
        found = {device for device in self.devices(name) if device.startswith("virtio-")}
        wanted = {f"virtio-{what}-{bus}" for what in ("blk", "net", "rng", "serial")}
        assert wanted <= found
        assert all(device.endswith(f"-{bus}") for device in found)

    @pytest.mark.parametrize(
        ("name", "count"), [("i686", 4), ("aarch64", 4), ("riscv64", 0), ("s390x", 0)]
    )
    def test_root_ports(self, name, count):
        assert len(cmdline.ports(self.spec(name))) == 2 * count

    def test_a_disk_that_is_plugged_needs_no_port_on_every_board(self):
        disk = PluggedDescriptors(
            name="more", port="port1", read_only=False, base=None, layers=(5,)
        )
        here, there = (
            cmdline.plugged_device(ARCHITECTURES[name], disk) for name in ("aarch64", "s390x")
        )
        assert (here["driver"], here["bus"]) == ("virtio-blk-pci", "port1")
        assert there["driver"] == "virtio-blk-ccw"
        assert "bus" not in there

    @pytest.mark.parametrize("case", ["booted", "cloned", "uefi"])
    def test_templates_of_x86_stay_valid(self, case):
        """The whole command line of x86 is what it was before there were other architectures."""
        known = json.loads(Path(__file__).with_name("argv_x86_64.json").read_text("utf-8"))
        assert cmdline.argv(*self.known_cases()[case]) == known[case]

    @staticmethod
    def known_cases():
        spec = with_hardware(cpus=2, disks=(MIB,))
        uefi = Uefi(
            code=Path("c"), variables=Path("v"), format="raw", secure_boot=True, digest="0" * 64
        )
        plugged = PluggedDescriptors(
            name="extra", port="port2", read_only=True, base=13, layers=(14, 15)
        )
        cloned = replace(
            spec,
            version=(10, 0, 13),
            accelerator="kvm",
            processor="host",
            start=Start.CLONED,
            hardware=Hardware(network="nat", memory=GIB),
        )
        firmware = replace(
            spec,
            version=(11, 1, 3),
            append="",
            uefi=uefi,
            tpm=True,
            hardware=Hardware(),
            start=Start.TO_BE_SAVED,
            more_args=("-boot", "menu=on"),
        )
        return {
            "booted": (spec, Descriptors(kernel=6, initrd=7, base=8, overlays=((9,), (10,)))),
            "cloned": (
                cloned,
                Descriptors(
                    kernel=6,
                    initrd=7,
                    memory=8,
                    base=9,
                    modules=11,
                    overlays=((10, 12),),
                    plugged=(plugged,),
                ),
            ),
            "uefi": (
                firmware,
                Descriptors(code=6, variables=7, tpm=8, memory=9, base=10, overlays=((11,),)),
            ),
        }


def test_confinement():
    option, value = cmdline.confinement()
    assert option == "-sandbox"
    assert value.split(",") == ["on"] + [
        f"{what}=deny" for what in ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")
    ]


def device(disk):
    """A disk: it can be found by an id, and an error is the guest's to handle."""
    errors = "werror=report,rerror=report"
    return f"virtio-blk-pci,id=disk-{disk},drive={disk},serial={disk},{errors}"


class TestDisks:
    def nodes(self, hardware, fds):
        args = cmdline.disks(replace(SPEC, hardware=hardware), fds)
        pairs = list(zip(args[::2], args[1::2], strict=True))
        nodes = [json.loads(value) for option, value in pairs if option == "-blockdev"]
        return nodes, [pair for pair in pairs if pair[0] != "-blockdev"]

    def test_none(self):
        assert cmdline.disks(SPEC, Descriptors()) == []

    def test_an_image_and_its_overlay(self):
        nodes, others = self.nodes(Hardware(), Descriptors(kernel=5, base=7, overlays=((8,),)))
        base, root = nodes
        assert base["driver"] == "raw"
        assert base["read-only"] is base["file"]["read-only"] is True
        assert base["file"]["filename"] == "/dev/fdset/7"
        assert (root["node-name"], root["driver"], root["backing"]) == ("root", "qcow2", "base")
        assert root["file"]["filename"] == "/dev/fdset/8"
        assert root["cache"]["no-flush"] is True
        assert others == [
            ("-add-fd", "fd=7,set=7"),
            ("-add-fd", "fd=8,set=8"),
            ("-device", device("root")),
        ]

    def test_firmware_boots_from_the_root_disk_alone(self):
        _, others = self.nodes(Hardware(disks=(MIB,)), Descriptors(base=5, overlays=((6,), (7,))))
        assert [value for option, value in others if option == "-device"] == [
            device("root") + ",bootindex=0",
            device("disk0"),
        ]

    def test_blank_ones_stand_on_nothing(self):
        nodes, others = self.nodes(Hardware(disks=(GIB, MIB)), Descriptors(overlays=((5,), (6,))))
        assert [node["node-name"] for node in nodes] == ["disk0", "disk1"]
        assert not any("backing" in node for node in nodes)
        assert ("-device", device("disk1")) in others

    def test_the_root_disk_comes_first(self):
        nodes, _ = self.nodes(Hardware(disks=(MIB,)), Descriptors(base=5, overlays=((6,), (7,))))
        assert [node["node-name"] for node in nodes] == ["base", "root", "disk0"]

    def test_only_the_last_layer_is_written(self):
        nodes, others = self.nodes(Hardware(), Descriptors(kernel=4, base=5, overlays=((6, 7, 8),)))
        assert [(node["node-name"], node.get("backing")) for node in nodes] == [
            ("base", None),
            ("root.0", "base"),
            ("root.1", "root.0"),
            ("root", "root.1"),
        ]
        assert [node["read-only"] for node in nodes] == [True, True, True, False]
        assert others[-1] == ("-device", device("root"))

    def test_an_overlay_too_few_is_a_mistake(self):
        with pytest.raises(ValueError, match="zip"):
            self.nodes(Hardware(disks=(MIB,)), Descriptors(base=5, overlays=((6,),)))


class TestWhole:
    FDS = Descriptors(kernel=5, initrd=6, base=7, overlays=((8,), (9,)))

    def argv(self, **hardware):
        spec = with_hardware(**{"disks": (MIB,), **hardware})
        return cmdline.argv(spec, self.FDS)

    def test_begins_with_the_program_and_what_keeps_it_from_reading_files(self):
        argv = self.argv()
        assert argv[:3] == ["/usr/bin/qemu-system-x86_64", "-name", "debian-13-1"]
        assert {"-nodefaults", "-no-user-config"} <= set(argv)

    def test_has_every_device(self):
        argv = self.argv()
        devices = [argv[i + 1].split(",")[0] for i, word in enumerate(argv) if word == "-device"]
        assert sorted(devices) == [
            *("VGA", *("pcie-root-port",) * 4, "pvpanic-pci", "virtio-blk-pci", "virtio-blk-pci"),
            *("virtio-net-pci", "virtio-rng-pci", "virtio-serial-pci"),
            *("virtserialport", "vmgenid"),
        ]

    def test_every_device_has_an_id_of_its_own(self):
        argv = self.argv()
        devices = [argv[i + 1].split(",") for i, word in enumerate(argv) if word == "-device"]
        ids = [[part for part in device if part.startswith("id=")] for device in devices]
        assert all(len(found) == 1 for found in ids)
        assert len({found[0] for found in ids}) == len(ids)

    @pytest.mark.parametrize("memory", [128 * MIB, GIB, 3 * GIB])
    def test_memory(self, memory):
        argv = self.argv(memory=memory)
        assert argv[argv.index("-m") + 1] == f"{memory // MIB}M"

    def test_names_no_file_but_by_descriptor(self):
        paths = [word for word in self.argv()[1:] if "/" in word]
        assert len(paths) == 5
        for word in paths:
            assert "/proc/self/fd/" in word or "/dev/fdset/" in word
            assert "/work" not in word
            assert "/home" not in word

    def test_the_devices_do_not_depend_on_the_accelerator_or_the_network(self):
        def devices(argv):
            return [argv[i + 1] for i, word in enumerate(argv) if word == "-device"]

        kvm = cmdline.argv(replace(with_hardware(disks=(MIB,)), accelerator="kvm"), self.FDS)
        assert devices(kvm) == devices(self.argv()) == devices(self.argv(network="nat"))
