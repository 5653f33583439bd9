"""What guests have in common, and which of it a saved state depends on."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue.store import BuiltImage
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import GIB, MIB, Hardware
from pytest_vmsandbox.guests import blueprint as blueprint_module
from pytest_vmsandbox.guests.blueprint import (
    Blueprint,
    OwnKernel,
    check_board,
    find_firmware,
    has_tpm,
)
from pytest_vmsandbox.machine import cmdline, firmware, host
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.cmdline import Start
from pytest_vmsandbox.machine.firmware import Uefi
from pytest_vmsandbox.machine.qemu import Qemu
from support.images import DEFINITION

QEMU = Qemu(path=Path("/usr/bin/qemu-system-x86_64"), version=(7, 2, 22), build="one build")
TCG = Verdict(accelerator="tcg", processor="Nehalem", reason="asked for")
KVM = Verdict(accelerator="kvm", processor="host", reason="asked for")

UEFI = Uefi(
    code=Path("/code"), variables=Path("/vars"), format="raw", secure_boot=False, digest="1" * 64
)


@pytest.fixture
def folder(tmp_path):
    """Of a built image."""
    (tmp_path / "image.json").write_text("{}")
    return tmp_path


@pytest.fixture
def blueprint(folder):
    return Blueprint(
        built=BuiltImage(definition=DEFINITION, digest="0" * 64, folder=folder),
        qemu=QEMU,
        verdict=TCG,
        hardware=Hardware(disks=(MIB,)),
        qemu_args=lambda _: (),
    )


def with_hardware(blueprint, **changes):
    return replace(blueprint, hardware=replace(blueprint.hardware, **changes))


def with_image(blueprint, **changes):
    definition = replace(blueprint.built.definition, **changes)
    return replace(blueprint, built=replace(blueprint.built, definition=definition))


Change = Callable[[Blueprint], Blueprint]
OWN = OwnKernel(
    release="6.12.9",
    digest="3" * 64,
    image=Path("/kernels/vmlinuz"),
    initrd=Path("/proc/self/fd/7"),
    modules=Path("/kernels/modules.img"),
)

MATTERS: dict[str, Change] = {
    "the image": lambda it: replace(it, built=replace(it.built, digest="1" * 64)),
    "the image's name": lambda it: with_image(it, name="other"),
    "the kernel's command line": lambda it: with_image(it, append="root=/dev/vda ro"),
    "an image without a disk": lambda it: with_image(it, disk_size=None),
    "memory": lambda it: with_hardware(it, memory=256 * MIB),
    "processors": lambda it: with_hardware(it, cpus=2),
    "the size of the root disk": lambda it: with_hardware(it, disk=2 * GIB),
    "the size of a disk": lambda it: with_hardware(it, disks=(2 * MIB,)),
    "one more disk": lambda it: with_hardware(it, disks=(MIB, MIB)),
    "no disk": lambda it: with_hardware(it, disks=()),
    "another order of disks": lambda it: with_hardware(it, disks=(MIB, 2 * MIB)),
    "that order the other way round": lambda it: with_hardware(it, disks=(2 * MIB, MIB)),
    "QEMU's build": lambda it: replace(it, qemu=replace(QEMU, build="another build")),
    "QEMU's version": lambda it: replace(it, qemu=replace(QEMU, version=(8, 2, 0))),
    "another QEMU": lambda it: replace(it, qemu=replace(QEMU, path=Path("/opt/qemu"))),
    "the accelerator": lambda it: replace(it, verdict=KVM),
    "the processor's model": lambda it: replace(it, verdict=replace(TCG, processor="max")),
    "the firmware": lambda it: with_image(it, firmware="bios"),
    "UEFI": lambda it: replace(with_image(it, firmware="uefi"), uefi=UEFI),
    "another UEFI": lambda it: replace(
        with_image(it, firmware="uefi"), uefi=replace(UEFI, digest="2" * 64)
    ),
    "Secure Boot": lambda it: replace(
        with_image(it, firmware="uefi"), uefi=replace(UEFI, secure_boot=True)
    ),
    "a kernel of the user": lambda it: replace(it, kernel=OWN),
    "another kernel of the user": lambda it: replace(it, kernel=replace(OWN, digest="4" * 64)),
    "one without modules": lambda it: replace(it, kernel=replace(OWN, modules=None)),
    "a TPM": lambda it: with_hardware(it, tpm=True),
    "further arguments": lambda it: replace(it, qemu_args=lambda _: ["-device", "usb-host"]),
}
SAME_KERNEL = replace(OWN, image=Path("/there/vmlinuz"), initrd=Path("/proc/self/fd/9"))
DOES_NOT_MATTER: dict[str, Change] = {
    "the network": lambda it: it.with_network("nat"),
    "the user": lambda it: with_hardware(it, user="somebody"),
    "why that accelerator": lambda it: replace(it, verdict=replace(TCG, reason="no KVM here")),
    "what the proof took": lambda it: replace(it, verdict=replace(TCG, seconds=3.0)),
    "what the image says, said again": lambda it: with_hardware(it, firmware="kernel", tpm=False),
    "other objects": replace,
}


class TestDigest:
    @pytest.mark.parametrize("what", MATTERS)
    def test_changes_with(self, blueprint, what):
        changed = MATTERS[what](blueprint)
        assert re.fullmatch("[0-9a-f]{64}", changed.digest)
        assert changed.digest != blueprint.digest

    def test_is_another_one_for_each(self, blueprint):
        digests = {change(blueprint).digest for change in MATTERS.values()}
        assert len(digests) == len(MATTERS)

    @pytest.mark.parametrize("what", DOES_NOT_MATTER)
    def test_does_not_change_with(self, blueprint, what):
        assert DOES_NOT_MATTER[what](blueprint).digest == blueprint.digest

    def test_changes_when_the_same_image_is_built_again(self, blueprint, folder):
        """A recipe may not give the same twice."""
        before = blueprint.digest
        (folder / "image.json").write_text('{"built": 2}')
        assert replace(blueprint).digest != before

    def test_does_not_change_with_a_copy_of_the_image(self, blueprint, folder, tmp_path_factory):
        """A cache can be copied, and restored elsewhere."""
        there = tmp_path_factory.mktemp("there")
        (there / "image.json").write_bytes((folder / "image.json").read_bytes())
        os.utime(there / "image.json", (1, 1))
        copy = replace(blueprint, built=replace(blueprint.built, folder=there))
        assert copy.digest == blueprint.digest

    def test_changes_with_what_is_done_before_a_guest_is_saved(self, blueprint, monkeypatch):
        before = blueprint.digest
        monkeypatch.setattr(blueprint_module, "FORMAT", blueprint_module.FORMAT + 1)
        assert replace(blueprint).digest != before

    def test_depends_on_the_hosts_processor_only_where_it_runs_the_guest(
        self, blueprint, monkeypatch
    ):
        monkeypatch.setattr(host, "processor", lambda: "one")
        emulated, real = blueprint.digest, replace(blueprint, verdict=KVM).digest
        monkeypatch.setattr(host, "processor", lambda: "another")
        assert replace(blueprint).digest == emulated
        assert replace(blueprint, verdict=KVM).digest != real

    def test_does_not_change_with_the_place_of_a_kernel(self, blueprint):
        with_own = replace(blueprint, kernel=OWN)
        assert replace(blueprint, kernel=SAME_KERNEL).digest == with_own.digest

    def test_asks_for_arguments_of_a_clone(self, blueprint):
        """The hook may look at how a machine starts, and at what it is called."""
        specs = []

        def qemu_args(spec):
            specs.append(spec)
            return ()

        assert replace(blueprint, qemu_args=qemu_args).digest == blueprint.digest
        assert [(spec.start, spec.name) for spec in specs] == [(Start.CLONED, "some_image")]


class TestFirmware:
    """What boots a guest: its image's definition says it, or its hardware."""

    @pytest.fixture(autouse=True)
    def disk(self, folder, monkeypatch):
        """What is on the image's disk can be changed."""
        found = {"uefi", "bios"}
        monkeypatch.setattr(firmware, "boot_loaders", lambda _: frozenset(found))
        monkeypatch.setattr(
            firmware, "find_uefi", lambda *_, secure_boot: replace(UEFI, secure_boot=secure_boot)
        )
        return found

    def test_a_kernel_needs_none(self, blueprint):
        assert find_firmware(blueprint.built, Hardware()) is None
        assert blueprint.boots_directly

    @pytest.mark.parametrize("secure_boot", [False, True])
    def test_of_the_image(self, blueprint, secure_boot):
        built = with_image(blueprint, firmware="uefi", secure_boot=secure_boot).built
        assert find_firmware(built, Hardware()) == replace(UEFI, secure_boot=secure_boot)
        assert find_firmware(built, Hardware(firmware="bios")) is None

    def test_of_the_hardware(self, blueprint):
        assert find_firmware(blueprint.built, Hardware(firmware="uefi")) == UEFI

    @pytest.mark.parametrize("wanted", ["uefi", "bios"])
    def test_a_disk_without_a_boot_loader(self, blueprint, disk, wanted):
        """That of `debian-13` has none. It is said before a guest waits for it."""
        disk.clear()
        with pytest.raises(ConfigError, match="its disk has no") as caught:
            find_firmware(blueprint.built, Hardware(firmware=wanted))
        assert caught.value.remedy.startswith("use firmware='kernel'")
        imported = with_image(blueprint, firmware="bios").built  # it has no kernel, either
        with pytest.raises(ConfigError, match="its disk has no") as caught:
            find_firmware(imported, Hardware(firmware=wanted))
        assert "--kernel and --initrd" in caught.value.remedy

    def test_a_disk_with_the_other_boot_loader(self, blueprint, disk):
        disk.remove("uefi")
        with pytest.raises(ConfigError, match="no EFI system partition") as caught:
            find_firmware(blueprint.built, Hardware(firmware="uefi"))
        assert caught.value.remedy.startswith("use firmware='bios'")

    def test_without_a_disk(self, blueprint):
        built = with_image(blueprint, disk_size=None).built
        with pytest.raises(ConfigError, match="no disk to boot from"):
            find_firmware(built, Hardware(firmware="bios"))

    def test_without_a_kernel(self, blueprint):
        built = with_image(blueprint, firmware="bios").built
        with pytest.raises(ConfigError, match="no kernel outside of its disk") as caught:
            find_firmware(built, Hardware(firmware="kernel"))
        assert "firmware='bios'" in caught.value.remedy

    def test_its_machine_has_no_kernel(self, blueprint):
        spec = replace(with_image(blueprint, firmware="uefi"), uefi=UEFI).machine("it", "- key")
        assert (spec.kernel, spec.initrd, spec.append, spec.uefi) == (None, None, "", UEFI)
        assert not spec.tpm
        assert with_hardware(blueprint, tpm=True).machine("it", "- -").tpm
        assert with_image(blueprint, tpm=True).machine("it", "- -").tpm
        assert (
            not with_hardware(with_image(blueprint, tpm=True), tpm=False).machine("it", "- -").tpm
        )

    def test_without_it_nothing_changes(self, blueprint):
        """A guest without firmware and TPM pays nothing for those of others."""
        fds = cmdline.Descriptors(kernel=7, initrd=8, base=9, overlays=((10,), (11,)))
        argv = cmdline.argv(blueprint.machine("it", "- -"), fds)
        assert not [word for word in argv if re.search(r"pflash|tpm|bootindex|\bstrict|smm", word)]


class TestMachine:
    def test_is_told_its_key_and_its_name(self, blueprint):
        spec = blueprint.machine("some-image-7", "ssh-ed25519 AAAAkey somebody", Start.CLONED)
        assert spec.append.split() == [
            *("root=/dev/vda", "rw"),
            *("vmsandbox.key=AAAAkey", "vmsandbox.name=some-image-7"),
        ]
        assert (spec.name, spec.start, spec.processor) == ("some-image-7", Start.CLONED, "Nehalem")
        assert spec.hardware == blueprint.hardware

    def test_is_switched_on_where_nothing_else_is_said(self, blueprint):
        assert blueprint.machine("it", "ssh-ed25519 AAAA").start is Start.POWER_ON

    def test_on_another_network(self, blueprint):
        other = blueprint.with_network("nat")
        assert other.machine("it", "- -").hardware.network == "nat"
        assert blueprint.machine("it", "- -").hardware.network == "isolated"


@pytest.mark.parametrize(
    ("name", "version", "verdict", "loses"),
    [
        ("x86_64", (7, 2), TCG, False),
        ("aarch64", (7, 2), TCG, False),
        ("s390x", (7, 2), TCG, False),
        ("ppc64le", (8, 1), TCG, True),
        ("ppc64le", (8, 2), TCG, False),
        ("ppc64le", (7, 2), KVM, False),
        ("riscv64", (7, 2), TCG, False),
    ],
)
def test_an_old_qemu_loses_timers(blueprint, name, version, verdict, loses):
    """Such a state must not be loaded: programs that sleep would never go on."""
    other = replace(
        with_image(blueprint, architecture=name),
        qemu=replace(QEMU, version=version),
        verdict=verdict,
    )
    assert (f"does not save the timers of {name}" in other.unsaved) is loses


@pytest.mark.parametrize(
    ("disk_size", "disks", "device"),
    [(GIB, (), "vdb"), (GIB, (MIB,) * 8, "vdj"), (None, (), "vda"), (None, (MIB,), "vdb")],
)
def test_a_kernel_of_the_user(blueprint, disk_size, disks, device):
    blueprint = with_hardware(with_image(blueprint, disk_size=disk_size), disks=disks)
    spec = replace(blueprint, kernel=OWN).machine("guest", "ssh-ed25519 AAAA")
    assert (spec.kernel, spec.initrd, spec.modules) == (OWN.image, OWN.initrd, OWN.modules)
    assert spec.append.endswith(f"vmsandbox.name=guest vmsandbox.modules=/dev/{device}")
    bare = replace(blueprint, kernel=replace(OWN, modules=None)).machine(
        "guest", "ssh-ed25519 AAAA"
    )
    assert bare.modules is None
    assert "vmsandbox.modules" not in bare.append
    assert blueprint.machine("guest", "ssh-ed25519 AAAA").modules is None


@pytest.mark.parametrize("name", ["armv7l", "riscv64", "ppc64le", "s390x"])
def test_boards_without_a_tpm(name):
    definition = replace(DEFINITION, architecture=name)
    assert has_tpm(definition, Hardware()) is False
    with pytest.raises(ConfigError, match=f"guests of {ARCHITECTURES[name].debian} have no TPM"):
        has_tpm(definition, Hardware(tpm=True))


def test_bios_is_for_x86_alone(blueprint, folder):
    (folder / "disk.raw").touch()
    other = with_image(blueprint, architecture="aarch64", disk_size=MIB)
    with pytest.raises(ConfigError, match="guests of arm64 have no BIOS"):
        find_firmware(other.built, Hardware(firmware="bios"))


@pytest.mark.parametrize(
    ("name", "hardware", "problem", "remedy"),
    [
        ("x86_64", Hardware(cpus=64, memory=600 * MIB), "", ""),
        ("aarch64", Hardware(cpus=8, memory=3072 * MIB), "", ""),
        ("aarch64", Hardware(cpus=9), "arm64 have at most 8", "cpus=8"),
        ("armv7l", Hardware(memory=4096 * MIB), "at most 3GiB", "memory='3GiB'"),
        ("ppc64le", Hardware(memory=512 * MIB), "", ""),
        ("ppc64le", Hardware(memory=600 * MIB), "multiples of 256MiB", "memory='768MiB'"),
    ],
)
def test_what_a_board_takes(name, hardware, problem, remedy):
    definition = replace(DEFINITION, architecture=name)
    if not problem:
        check_board(definition, hardware)
        return
    with pytest.raises(ConfigError, match=problem) as caught:
        check_board(definition, hardware)
    assert remedy in caught.value.remedy
