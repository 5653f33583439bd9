"""How far a boot has got, and whether it has ended before its goal, as the console shows it."""

from __future__ import annotations

import re
from dataclasses import dataclass

FIRMWARE, LOADER = "firmware", "boot loader"
# What the console shows when a stage is reached, the last one first. A kernel prints the text for `kernel`
# even if it is quiet. Our images print those for `init` and `ssh`.
STAGES = {
    "ssh": r"^vmsandbox: ssh$",
    "init": r"^vmsandbox: init$|^[^\w\n]*Welcome to (?!GRUB).*!$|^systemd\[1\]: ",
    "kernel": r"Linux version|^(?!error:|[ \t]*Loading).*\bkernel\b|^\[ +\d+\.\d+\]",
    LOADER: r"Welcome to GRUB|GNU GRUB|grub(?: rescue)?> |starting Boot\w+ (?!\"EFI Internal Shell)"
    r"|^Booting from Hard Disk|^(?:ISO|SYS|EXT)LINUX |\bbootstrap loader\b",
}
_CAUSES = re.compile(
    r"^(?:error: |.*\bTimed out waiting for device|.*\bDependency failed for |ALERT! "
    r"|.*\bdoes not exist\b|BdsDxe: failed to ).*$",
    re.MULTILINE,
)
_MOST_CAUSES = 8
PANIC_END = "---[ end Kernel panic - not syncing"
_PANIC = re.compile(r"^(?:\[ *\d+\.\d+\] )?Kernel panic - not syncing: (.*)$", re.MULTILINE)
_PANIC_LINES = 30
_FIRMWARE_REMEDY = (
    "try another firmware, firmware='uefi' or 'bios' (marker vm, boot), or look at the disk: it may have "
    "no boot loader"
)
_SIGNED_REMEDY = "use what is signed with the keys of the firmware, or secure_boot = false ([boot] in image.toml)"
_DISK_REMEDY = (
    "look at the lines above. The system may look for a disk that this guest does not have"
)
_SLOW_REMEDY = f"{_DISK_REMEDY}. If it waited for a disk that is there, this machine was too slow: boot fewer guests at a time"


@dataclass(frozen=True, kw_only=True)
class DeadEnd:
    """Where a boot has ended: nothing happens any more without a person at the console.

    Attributes:
        stage: the stage that it had reached.
        what: what the guest does now, and why if that is known.
        remedy: what you can do about it.
    """

    stage: str
    what: str
    remedy: str


def _ends(stage: str, pattern: str, what: str, remedy: str) -> tuple[re.Pattern[str], DeadEnd]:
    return re.compile(pattern, re.MULTILINE), DeadEnd(stage=stage, what=what, remedy=remedy)


EMERGENCY = DeadEnd(
    stage="init",
    what="the system is in emergency mode, so it does not start its services",
    remedy=_SLOW_REMEDY,
)
_DEAD_ENDS = (
    _ends(
        FIRMWARE,
        r"^BdsDxe: failed to (?:load|start) Boot\w+ \"(?!EFI Internal Shell).*: (?:Access Denied|Security Violation)",
        "Secure Boot refused the boot loader, because its signature is missing or unknown",
        _SIGNED_REMEDY,
    ),
    _ends(
        LOADER,
        r"Verification failed: \(0x\w+\) Security Violation|SBAT self-check failed",
        "Secure Boot refused the boot loader: shim could not verify it",
        _SIGNED_REMEDY,
    ),
    _ends(
        LOADER,
        r"^error: .*(?:bad shim signature|has invalid signature|prohibited by secure boot policy)",
        "Secure Boot refused the kernel: GRUB could not verify it",
        _SIGNED_REMEDY,
    ),
    _ends(
        FIRMWARE,
        r"^No bootable device\.|^BdsDxe: No bootable option or device was found|UEFI Interactive Shell",
        "the firmware found nothing to boot on the disk",
        _FIRMWARE_REMEDY,
    ),
    _ends(
        LOADER,
        r"grub rescue> |Minimal BASH-like line editing is supported",
        "GRUB does not find its files, and waits at its shell",
        _DISK_REMEDY,
    ),
    _ends(
        LOADER,
        r"Failed to boot both default and fallback entries",
        "GRUB could not boot any system",
        _DISK_REMEDY,
    ),
    _ends(
        "kernel",
        r"^\(initramfs\) |Dropping to a shell!|^initramfs emergency recovery shell launched"
        r"|dropped into an emergency shell|^Entering emergency mode\. Exit the shell to continue",
        "the initial RAM disk did not find the root file system, and waits at its shell",
        _SLOW_REMEDY,
    ),
    (
        re.compile(
            r"You are in (?:emergency|rescue) mode|Cannot open access to console, the root account is locked"
            r"|^Give root password for maintenance",
            re.MULTILINE,
        ),
        EMERGENCY,
    ),
)
_LATER = {
    stage: re.compile("|".join(list(STAGES.values())[:place]), re.MULTILINE)
    for place, stage in enumerate((*STAGES, FIRMWARE))
    if place
}


def stage_of(console: str) -> str:
    """The last stage that a boot has reached: firmware, boot loader, kernel, init or ssh."""
    reached = (stage for stage in STAGES if re.search(STAGES[stage], console, re.MULTILINE))
    return next(reached, FIRMWARE)


def dead_end(console: str) -> DeadEnd | None:
    """Where a boot has ended; None if it may go on.

    What was refused does not count if the boot reached a later stage after it.
    """
    for pattern, end in _DEAD_ENDS:
        found = pattern.search(console)
        if found and not _LATER[end.stage].search(console, found.end()):
            return end
    return None


def causes(console: str) -> str:
    """The last lines of the console that tell why a boot failed."""
    lines = dict.fromkeys(match[0].strip() for match in _CAUSES.finditer(console))
    return "\n".join(list(lines)[-_MOST_CAUSES:])


def panic_text(console: str) -> tuple[str, str] | None:
    """Why the kernel panicked last, and the lines that it wrote then; None if there is no such text."""
    for found in list(_PANIC.finditer(console))[-1:]:
        return found[1], "\n".join(console[found.start() :].split("\n")[:_PANIC_LINES])
    return None
