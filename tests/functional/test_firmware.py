"""Guests that firmware boots from their disk: UEFI, Secure Boot, BIOS, a TPM; and boots that end early.

The disk is laid out as vendors do it, and boots `tiny`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.errors import BootError, ConfigError, GuestLost, LaunchError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.machine import firmware, tpm
from support import vendor_disk


def lacks() -> str:
    """What this machine lacks for these tests."""
    try:
        firmware.find_uefi("x86_64", secure_boot=False)
        firmware.find_uefi("x86_64", secure_boot=True)
        tpm.find_swtpm()
    except LaunchError as error:
        return error.brief
    return " ".join(vendor_disk.missing_packages())


pytestmark = pytest.mark.skipif(bool(lacks()), reason=f"this machine lacks: {lacks()}")

# A TPM's random number, its PCR 16, and an endorsement key, which is made from its seed. All of them are
# the answers to raw commands, in hex.
TALK = r"""
exec 3<>/dev/tpmrm0
printf "$1" >&3
hexdump -v -e '1/1 "%02x"' <&3
"""
RANDOM = r"\x80\x01\0\0\0\x0c\0\0\x01\x7b\0\x10"
READ_16 = r"\x80\x01\0\0\0\x14\0\0\x01\x7e\0\0\0\x01\0\x0b\x03\0\0\x01"
EXTEND_16 = (
    r"\x80\x02\0\0\0\x41\0\0\x01\x82\0\0\0\x10\0\0\0\x09\x40\0\0\x09\0\0\0\0\0\0\0\0\x01\0\x0b"
    + "A" * 32
)
ENDORSEMENT = (
    r"\x80\x02\0\0\0\x43\0\0\x01\x31\x40\0\0\x0b\0\0\0\x09\x40\0\0\x09\0\0\0\0\0\0\x04\0\0\0\0"
    r"\0\x1a\0\x23\0\x0b\0\x03\0\x72\0\0\0\x06\0\x80\0\x43\0\x10\0\x03\0\x10\0\0\0\0\0\0\0\0\0\0"
)


def ask(vm, command: str) -> str:
    """The TPM's answer. It has succeeded."""
    answer = vm.run(["sh", "-c", TALK, "sh", command]).stdout
    assert answer[12:20] == "00000000", f"the TPM's error is {answer}"
    return answer


@dataclass
class Vendor:
    """A cache with images that boot by firmware."""

    images: Path
    cache: Path

    def add(self, name: str, disk: Path, more: str = "", boots_by: str = "uefi") -> None:
        """Keep a disk as an image."""
        base = ImageStore(cache_dir()).require(Catalogue().get("tiny"))
        definition = vendor_disk.define(self.images / name, firmware=boots_by, more=more)
        vendor_disk.image(definition, self.cache, base, KEY, disk)

    def factory(self, **settings):
        """Makes guests of these images."""
        return GuestFactory.open(Settings(cache=self.cache, image_path=(self.images,), **settings))


KEY = KeyPair.generate()


@pytest.fixture(scope="module")
def vendor(tmp_path_factory) -> Vendor:
    folder = tmp_path_factory.mktemp("vendor")
    vendor = Vendor(folder / "images", folder / "cache")
    base = ImageStore(cache_dir()).require(Catalogue().get("tiny"))
    # With a kernel and what is known of KVM here, no image has to prove it by its own disk.
    for part in (base.folder, cache_dir() / "accelerator"):
        if part.exists():
            shutil.copytree(part, vendor.cache / part.relative_to(cache_dir()))
    append = f"console=ttyS0 vmsandbox.key={KEY.public.split()[1]}"
    vendor_disk.tiny(folder / "disk", base, append)
    vendor.add("vendor", folder / "disk", more="tpm = true")
    vendor.add("secure", folder / "disk", more="secure_boot = true")
    empty = vendor_disk.Contents(esp={"readme": b"no boot loader"})
    vendor_disk.lay_out(folder / "empty", empty)
    vendor.add("empty", folder / "empty")
    _, core = vendor_disk.grub_images(folder, "configfile /nowhere\n")
    vendor_disk.lay_out(folder / "shell", vendor_disk.Contents(esp={}, core=core))
    vendor.add("shell", folder / "shell", boots_by="bios")
    return vendor


@pytest.fixture(scope="module")
def guests(vendor) -> Iterator[GuestFactory]:
    with vendor.factory(clones="demand") as factory:
        # What lives as long as the factory is there before the first test.
        factory.backend.accelerator("vendor")
        factory.backend.built("empty")
        _ = factory.backend.hypervisor, factory._clones._builder, factory._clones.pool
        yield factory


def test_clones_of_uefi_and_a_tpm(guests):
    """Firmware's variables and the TPM are a part of what is saved."""
    prepared = guests.prepare("vendor", lambda vm: ask(vm, EXTEND_16), depends_on=["PCR 16"])
    with guests.boot(prepared) as one, guests.boot(prepared) as two:
        clones = [one, two]
        assert {vm.engine.origin for vm in clones} == {"cloned"}
        assert one.run(["hostname"]).stdout != two.run(["hostname"]).stdout
        for vm in clones:
            vm.run(["test", "-d", "/sys/firmware/efi"])
        digests = {ask(vm, READ_16) for vm in clones}
        assert len(digests) == 1
        assert "00" * 32 not in digests.pop()  # it is what the template has extended
        assert len({ask(vm, ENDORSEMENT) for vm in clones}) == 1
        before, seed = ask(two, READ_16), ask(two, ENDORSEMENT)
        with one.snapshot():
            ask(one, EXTEND_16)
            assert ask(one, READ_16) != ask(two, READ_16) == before
        assert ask(one, READ_16) == before

        # Firmware leaves the ports to the system.
        disk = one.attach_disk(size="1MiB")
        assert one.run(["head", "-c", "1", disk.device]).stdout == "\0"
        one.detach(disk)

        # A power cut resets what the TPM has measured, and keeps its seeds; so it does with variables.
        variables = variables_of(one)
        assert variables != guests.backend.blueprint("vendor", one.spec).uefi.variables.read_bytes()
        one.power_cut()
        one.power_on()
        assert ask(one, ENDORSEMENT) == seed
        assert ask(one, READ_16) != before
        assert len(variables_of(one)) == len(variables)


def variables_of(vm) -> bytes:
    """The firmware's variables."""
    flash = vm.engine.machines.disks.flash
    flash.variables.seek(0)
    return flash.variables.read()


def test_forks_and_clusters_of_uefi_and_a_tpm(guests):
    """They go on with the variables and the TPM of the guest. Both survive a power cut as they do in a guest."""
    with guests.cluster({"db1": "vendor"}, networks={}) as cluster, ExitStack() as stack:
        (vm,) = cluster.values()
        ask(vm, EXTEND_16)
        measured, seed, variables = ask(vm, READ_16), ask(vm, ENDORSEMENT), variables_of(vm)
        fork, cut_off = stack.enter_context(vm.fork(2))
        clone = stack.enter_context(guests.cluster(stack.enter_context(cluster.seal())))["db1"]
        ask(vm, EXTEND_16)
        for each in (fork, cut_off, clone):
            assert ask(each, READ_16) == measured
            assert variables_of(each) == variables
        for each in (cut_off, clone):
            each.power_cut()
            each.power_on()
            each.run(["test", "-d", "/sys/firmware/efi"])
            assert ask(each, ENDORSEMENT) == seed
            assert ask(each, READ_16) != measured
        assert ask(fork, READ_16) == measured


def test_a_tpm_that_is_gone(guests):
    """A guest whose TPM has ended is lost: what it does from then on proves nothing."""
    with guests.boot("vendor") as vm:
        machine = vm.engine._on().machine
        machine._tpm.process.signal(9)
        assert machine._tpm.process.wait(10) == -9
        with pytest.raises(GuestLost, match="swtpm, its TPM, ended with signal SIGKILL"):
            vm.run(["true"])


def test_bios(vendor):
    with vendor.factory(clones="never") as guests, guests.boot("vendor", firmware="bios") as vm:
        assert vm.engine.origin == "booted"
        assert vm.run(["hostname"]).stdout == f"{vm.name}\n"
        assert "efi" not in vm.shell("ls /sys/firmware").stdout.split()
        assert vm.shell("cat /proc/cmdline").stdout.startswith("BOOT_IMAGE=/vmlinuz")


def test_what_cannot_be_booted_is_said_before(guests):
    with pytest.raises(ConfigError, match="its disk has no boot loader in its first sector"):
        guests.backend.blueprint("empty", guests.hardware("empty", {"firmware": "bios"}))
    with pytest.raises(ConfigError, match="no kernel outside of its disk"):
        guests.backend.blueprint("vendor", guests.hardware("vendor", {"firmware": "kernel"}))


@pytest.mark.parametrize(
    ("image", "stage", "what"),
    [
        ("secure", "firmware", "Secure Boot refused the boot loader"),
        ("shell", "boot loader", "GRUB does not find its files"),
    ],
)
def test_a_boot_that_ends_early(vendor, image, stage, what):
    """It is an error at once, long before the timeout."""
    with (
        vendor.factory(clones="never", boot_timeout=3600.0) as factory,
        pytest.raises(BootError, match=what) as caught,
        factory.boot(image),
    ):
        pass
    assert caught.value.stage == stage
    assert "console" in caught.value.details
