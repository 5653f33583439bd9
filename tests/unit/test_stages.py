"""How far a boot has got, and where it has ended: what firmware, boot loaders and systems write."""

import pytest

from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.machine.stages import causes, dead_end, panic_text, stage_of

OVMF = (
    '\x1b[2J\x1b[01;01HBdsDxe: loading Boot0001 "UEFI Misc Device" from PciRoot(0x0)/Pci(0x3,0x0)\r\n'
    'BdsDxe: starting Boot0001 "UEFI Misc Device" from PciRoot(0x0)/Pci(0x3,0x0)\r\n'
)
OVMF_EMPTY = (
    'BdsDxe: failed to load Boot0001 "UEFI Misc Device" from PciRoot(0x0)/Pci(0x3,0x0): Not Found\r\n'
    'BdsDxe: loading Boot0002 "EFI Internal Shell" from Fv(7CB8BDC9)/FvFile(7C04A583)\r\n'
)
OVMF_SHELL = (
    'BdsDxe: starting Boot0002 "EFI Internal Shell" from Fv(7CB8BDC9)/FvFile(7C04A583)\r\n'
    "\x1b[2J\x1b[01;01HUEFI Interactive Shell v2.2\r\nEDK II\r\n"
)
OVMF_REFUSES = (
    'BdsDxe: failed to load Boot0001 "UEFI Misc Device" from PciRoot(0x0): Access Denied\r\n'
)
OVMF_REFUSES_ITS_SHELL = 'BdsDxe: failed to start Boot0002 "EFI Internal Shell" from Fv(7CB8BDC9): Security Violation\r\n'
OVMF_NOTHING = "BdsDxe: No bootable option or device was found.\r\n"
SEABIOS = "\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS (version 1.16.2-debian-1.16.2-1)\r\n"
HARD_DISK = "Booting from Hard Disk...\r\n"
GRUB = "\x1b[0m\x1b[30m\x1b[47mWelcome to GRUB!\r\n\r\r\n"
SHIM = "    ERROR       Verification failed: (0x1A) Security Violation       OK   "
BAD_SHIM = "error: bad shim signature.\r\nerror: you need to load the kernel first.\r\n"
LINUX = (
    "[    0.000000] Linux version 6.12.118+deb13-cloud-amd64 (debian-kernel@lists.debian.org)\r\n"
)
TIMED_OUT = (
    "[\x1b[0;1;31m TIME \x1b[0m] Timed out waiting for device "
    "\x1b[0;1;39mdev-disk-by\\x2dlabel-UEFI.device\x1b[0m - /dev/disk/by-label/UEFI.\r\n"
    "[\x1b[0;1;38;5;185mDEPEND\x1b[0m] Dependency failed for \x1b[0;1;39mboot-efi.mount\x1b[0m.\r\n"
)
EMERGENCY = (
    'You are in emergency mode. After logging in, type "journalctl -xb" to view\r\n'
    "system logs.\r\n\r\nCannot open access to console, the root account is locked.\r\n"
)
ALERT = "ALERT!  UUID=cc5c does not exist.  Dropping to a shell!\r\n(initramfs) "


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("", "firmware"),
        (SEABIOS, "firmware"),
        (SEABIOS + HARD_DISK, "boot loader"),
        (OVMF_EMPTY + OVMF_SHELL, "firmware"),
        (OVMF, "boot loader"),
        (SEABIOS + HARD_DISK + "GRUB loading...\r\n" + GRUB, "boot loader"),
        (GRUB + "error: you need to load the kernel first.\r\n", "boot loader"),
        (OVMF + GRUB + LINUX, "kernel"),
        ("early console in extract_kernel\nkernel direct mapping tables\n", "kernel"),
        (LINUX + "vmsandbox: init\n", "init"),
        (LINUX + "\nWelcome to \x1b[1mDebian GNU/Linux 13 (trixie)\x1b[0m!\n", "init"),
        (LINUX + "vmsandbox: init\nvmsandbox: ssh\n", "ssh"),
    ],
)
def test_stage(text, stage):
    assert stage_of(printable(text)) == stage


@pytest.mark.parametrize(
    ("text", "stage", "what"),
    [
        (SEABIOS + HARD_DISK + "No bootable device.\r\n", "firmware", "nothing to boot"),
        (OVMF_EMPTY + OVMF_SHELL, "firmware", "nothing to boot"),
        (OVMF_EMPTY + OVMF_NOTHING, "firmware", "nothing to boot"),
        (OVMF_REFUSES, "firmware", "refused the boot loader"),
        (OVMF_REFUSES + OVMF_NOTHING, "firmware", "refused the boot loader"),
        (OVMF_EMPTY + OVMF_REFUSES_ITS_SHELL + OVMF_NOTHING, "firmware", "nothing to boot"),
        (OVMF + SHIM, "boot loader", "shim could not verify it"),
        (OVMF + GRUB + BAD_SHIM, "boot loader", "refused the kernel"),
        (GRUB + "error: no such device: 1234.\nEntering rescue mode...\ngrub rescue> ", "boot loader",
         "waits at its shell"),
        (GRUB + "Minimal BASH-like line editing is supported.\n", "boot loader", "waits at its shell"),
        (GRUB + "Failed to boot both default and fallback entries.\n", "boot loader", "any system"),
        (LINUX + ALERT, "kernel", "did not find the root file system"),
        (LINUX + "Entering emergency mode. Exit the shell to continue.\n", "kernel", "root file"),
        (LINUX + TIMED_OUT + EMERGENCY, "init", "emergency mode"),
    ],
)  # fmt: skip
def test_where_a_boot_ends(text, stage, what):
    end = dead_end(printable(text))
    assert end is not None
    assert end.stage == stage
    assert what in end.what
    assert end.remedy


@pytest.mark.parametrize(
    "text",
    [
        "",
        SEABIOS + HARD_DISK,
        OVMF,
        OVMF_EMPTY,  # it tries what comes next
        OVMF + GRUB,
        OVMF + GRUB + LINUX,
        LINUX + TIMED_OUT,  # a mount may be allowed to fail
        OVMF_REFUSES + OVMF,  # the second one boots
        OVMF_REFUSES + OVMF + GRUB + LINUX,
        GRUB + "error: bad shim signature.\n" + LINUX,  # an older kernel boots
        LINUX + ALERT + "exit\nvmsandbox: init\n",  # somebody has helped it
        LINUX + EMERGENCY + "vmsandbox: ssh\n",
    ],
)
def test_a_boot_that_goes_on(text):
    assert dead_end(printable(text)) is None


def test_causes():
    text = printable(OVMF + GRUB + LINUX + TIMED_OUT + TIMED_OUT + EMERGENCY)
    first, second = causes(text).splitlines()
    assert first.endswith("/dev/disk/by-label/UEFI.")
    assert "boot-efi.mount" in second
    assert causes(printable(OVMF + GRUB + BAD_SHIM)).splitlines()[0] == "error: bad shim signature."
    assert causes(LINUX) == ""
    assert len(causes("".join(f"error: {n}\n" for n in range(99))).splitlines()) == 8


def test_a_panic():
    text = LINUX + "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root\nCall Trace:\n"
    assert panic_text(text) == (
        "VFS: Unable to mount root",
        "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root\nCall Trace:\n",
    )
    assert panic_text(LINUX) is None


@pytest.mark.parametrize(
    "piece", ["[", 'BdsDxe: failed to load Boot1 "', "error: ", "Welcome to ", "\n", " "]
)
def test_a_hostile_console_costs_little(piece):
    """All of it is looked at often while a guest boots. It has at most a MiB."""
    text = piece * (100_000 // len(piece))
    stage_of(text), dead_end(text), causes(text)
