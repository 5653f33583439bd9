"""Judges a machine: one plain function for each check.

They judge their arguments. `examine` looks at the machine.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.core.architecture import Architecture
from pytest_vmsandbox.core.spec import MIB, format_size

OLDEST_QEMU = (7, 2)  # the oldest tested version
SUBORDINATE_IDS = 65536
_FIRST_SUBORDINATE_ID = 100000
_LITTLE_DISK = 256 * MIB


class Status(StrEnum):
    """The result of a check, from good to bad. `FAILED` means that it keeps guests from running."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check of one thing.

    Attributes:
        name: of the thing.
        status: the result.
        found: what was found, in one line.
        remedy: what you can do; empty if there is nothing to do.
        install: the Debian packages that solve the problem.
        commands: command lines for root that solve the problem.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    install: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()


def _ok(name: str, found: str) -> Check:
    return Check(name=name, status=Status.OK, found=found)


def _bad(name: str, found: str, remedy: str, *, needed: bool = True) -> Check:
    """A check that found a problem.

    Args:
        needed: whether no guest can run because of it.
    """
    status = Status.FAILED if needed else Status.WARNING
    return Check(name=name, status=status, found=found, remedy=remedy)


def _missing(name: str, found: str, *lacking: str, needed: bool = True) -> Check:
    """A check that found missing programs, or missing packages with these names."""
    wanted = tuple(sorted({programs.package_of(program) for program in lacking}))
    return replace(_bad(name, found, programs.install_line(wanted), needed=needed), install=wanted)


def firmware(lacking: Sequence[str], *, needed: bool) -> Check:
    """`lacking`: packages for UEFI and TPMs; `needed`: whether an image here needs one of them."""
    check = "UEFI and TPM"
    if not lacking:
        return _ok(check, "installed")
    if not needed:
        return _ok(check, f"no image here needs what is missing: {', '.join(lacking)}")
    return _missing(check, "an image here needs UEFI or a TPM", *lacking, needed=False)


def operating_system(platform: str, name: str) -> Check:
    """`platform` as in `sys.platform`; `name` for people."""
    check = "operating system"
    if platform == "linux":
        return _ok(check, name)
    if platform == "darwin":
        return _bad(check, name, "build images on Linux: they cannot be built here", needed=False)
    return _bad(check, name, "use Linux: on other systems, the plugin loads and does nothing")


def python(version: str, path: str) -> Check:
    """The Python that runs this. pip installs the package only on supported versions."""
    return _ok("Python", f"{version}, {path}")


def qemu(path: Path, version: Sequence[int], name: str = "QEMU") -> Check:
    """A QEMU that runs."""
    found = f"{'.'.join(map(str, version))}, {path}"
    if tuple(version) < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        remedy = f"install QEMU {oldest} or newer. Older versions are not tested"
        return _bad(name, found, remedy, needed=False)
    return _ok(name, found)


def no_qemu(problem: str, remedy: str, program: str, *, missing: bool) -> Check:
    """A QEMU that is missing, or does not run.

    Args:
        problem, remedy: what `find_qemu` says.
        program: the program that it looked for.
        missing: whether the program is missing.
    """
    if not missing:
        return _bad("QEMU", problem, remedy)
    if program not in programs.PACKAGES:
        return _bad("QEMU", problem, remedy)
    return _missing("QEMU", problem, program)


def wrong_emulator(architecture: Architecture, problem: str, remedy: str) -> Check:
    """An emulator for another architecture that a variable of the environment chooses, and that is no use."""
    return _bad(emulator_name(architecture), problem, remedy, needed=False)


def no_emulator(architecture: Architecture, problem: str, remedy: str, *, missing: bool) -> Check:
    """An emulator that the chosen image needs, and that is missing or does not run.

    Args:
        architecture: of the image.
        problem, remedy: what `find_qemu` says.
        missing: whether packages of Debian would help.
    """
    packages = programs.emulator_packages(architecture) if missing else []
    return replace(_bad(emulator_name(architecture), problem, remedy), install=tuple(packages))


def emulator_name(architecture: Architecture) -> str:
    """The name of the check of an emulator for another architecture."""
    return f"QEMU for {architecture.debian}"


def unknown_machine(machine: str, there: Sequence[str]) -> Check:
    """A machine for whose architecture there are no images.

    Args:
        machine: its architecture.
        there: the architectures that can be emulated here.
    """
    found = f"no image is for {machine}, which this machine is"
    if not there:
        return _missing("QEMU", f"{found}, and no other can be emulated yet", "qemu-system-x86_64")
    remedy = "name images with their architecture, as 'vmsandbox images list --all' shows them"
    return _bad("QEMU", f"{found}. Emulated: {', '.join(there)}", remedy, needed=False)


def qemu_img(path: str | None) -> Check:
    if path is not None:
        return _ok("qemu-img", path)
    return _missing("qemu-img", "missing: guests need it for their disks", "qemu-img")


def accelerator(kvm: str, verdict: tuple[str, str] | None) -> Check:
    """The accelerator of guests.

    Args:
        kvm: why KVM cannot be tried; empty if it can.
        verdict: the accelerator that is known to run guests, and the reason for it.
    """
    name = "accelerator"
    if verdict is None and not kvm:
        return _ok(name, "/dev/kvm is there. The first guest will show whether it works")
    accelerator, reason = verdict or ("tcg", kvm)
    if accelerator != "tcg":
        return _ok(name, f"{accelerator}: {reason}")
    if "usermod" in kvm:  # the reason has the command
        remedy = "run that command, and log in again"
    elif kvm:
        remedy = (
            "turn on virtualization in the firmware. In a virtual machine, turn on nested virtualization "
            "in its hypervisor"
        )
    else:
        remedy = (
            "use a machine with working hardware virtualization. In a virtual machine, use one with "
            "nested virtualization"
        )
    found = f"guests are emulated, which is 10 to 20 times slower: {reason}"
    return _bad(name, found, remedy, needed=False)


def loopback(problem: str, remedy: str) -> Check:
    """`problem`: why this machine cannot connect to itself; empty if it can."""
    if not problem:
        return _ok("loopback", "works")
    return _bad("loopback", f"127.0.0.1 cannot be reached: {problem}", remedy)


def image_tools(missing: Sequence[str], *, needed: bool) -> Check:
    """The programs that build images.

    Args:
        missing: those that are not installed.
        needed: whether guests cannot run without them, because no image is built.
    """
    if not missing:
        return _ok("image tools", "all installed")
    return _missing("image tools", f"missing: {', '.join(missing)}", *missing, needed=needed)


def keyring(exists: bool, *, needed: bool) -> Check:
    """The keys that sign Debian's packages."""
    if exists:
        return _ok("Debian's keys", "installed")
    found = "missing: images cannot be built from Debian's packages"
    return _missing("Debian's keys", found, "debian-archive-keyring", needed=needed)


def subordinate_ids(user: str, uid: int, subuid: str, subgid: str, *, needed: bool) -> Check:
    """The subordinate ids that an ordinary user needs to build images.

    Args:
        user, uid: the user.
        subuid, subgid: the content of ``/etc/subuid`` and ``/etc/subgid``.
        needed: as in `image_tools`.
    """
    name = "subordinate ids"
    options = {"--add-subuids": subuid, "--add-subgids": subgid}
    lacking = [option for option, text in options.items() if not _has_range(user, uid, text)]
    if not lacking:
        return _ok(name, f"{user} has them")
    taken = [first + count for text in options.values() for _, first, count in _ranges(text)]
    first = max([_FIRST_SUBORDINATE_ID, *taken])
    chosen = f"{first}-{first + SUBORDINATE_IDS - 1}"
    command = ("usermod", *(word for option in lacking for word in (option, chosen)), user)
    files = " and ".join(f"/etc/{option.removeprefix('--add-')[:-1]}" for option in lacking)
    found = f"{user} has no range of {SUBORDINATE_IDS} ids in {files}; building images needs one"
    check = _bad(name, found, f"sudo {' '.join(command)}", needed=needed)
    return replace(check, commands=(command,))


def _ranges(text: str) -> list[tuple[str, int, int]]:
    found = re.findall(r"^([^:\n]*):(\d+):(\d+)\s*$", text, re.MULTILINE)
    return [(name, int(first), int(count)) for name, first, count in found]


def _has_range(user: str, uid: int, text: str) -> bool:
    return any(
        name in (user, str(uid)) and count >= SUBORDINATE_IDS for name, _, count in _ranges(text)
    )


def user_namespaces(problem: str, *, needed: bool) -> Check:
    """`problem`: the error when an ordinary user makes a user namespace; empty if it works."""
    name = "user namespaces"
    if not problem:
        return _ok(name, "work")
    return _bad(
        name,
        f"the kernel refuses them, and building images needs them: {problem}",
        "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), "
        "sudo sysctl kernel.unprivileged_userns_clone=1 (older Debian), or build images as root",
        needed=needed,
    )


def memory(available: int | None, *, default: int, smallest: int, overhead: int) -> Check:
    """The free memory.

    Args:
        available: bytes that are free; None if unknown.
        default, smallest: bytes of a guest by default, and at least.
        overhead: bytes that QEMU itself takes.
    """
    name = "free memory"
    if available is None:
        return _ok(name, "unknown on this system")
    found = format_size(max(0, available))
    if count := max(0, available) // (default + overhead):
        guests = "one guest" if count == 1 else f"{count} guests"
        return _ok(name, f"{found}: room for {guests} of the default size")
    found += f"; a guest of the default size takes {format_size(default + overhead)}"
    if available < smallest + overhead:
        return _bad(name, found, "stop other programs on this machine")
    remedy = (
        "stop other programs on this machine, or give guests less memory: vm_memory (pytest), "
        "--memory (vmsandbox)"
    )
    return _bad(name, found, remedy, needed=False)


def disk(name: str, folder: Path, free: int, *, needed: int, variable: str) -> Check:
    """The free disk space in a folder.

    Args:
        free: bytes that are free.
        needed: bytes that a build takes.
        variable: the environment variable that can name another folder.
    """
    found = f"{format_size(free)} in {folder}"
    if free >= needed:
        return _ok(name, found)
    remedy = f"make room, or set the environment variable {variable} to a folder on a larger disk"
    if free < _LITTLE_DISK:
        return _bad(name, f"{found}; guests need at least {format_size(_LITTLE_DISK)}", remedy)
    return _bad(
        name, f"{found}; building an image takes {format_size(needed)}", remedy, needed=False
    )


def folder(name: str, path: Path, problem: str, *, variable: str) -> Check:
    """`problem`: why the folder cannot be used; empty if it can."""
    if not problem:
        return _ok(name, str(path))
    remedy = f"correct that, or set the environment variable {variable} to another folder"
    return _bad(name, f"{path} {problem}", remedy)


def qemu_user(euid: int, user: str, identity: tuple[int, int] | None) -> Check:
    """The user that QEMU runs as.

    Args:
        euid, user: our own user.
        identity: ids of an unprivileged user and group; None for our own.
    """
    name = "QEMU runs as"
    if identity is not None:
        uid, gid = identity
        return _ok(name, f"user {uid} and group {gid}, which own no files")
    if euid != 0:
        return _ok(name, f"{user}, an ordinary user")
    found = "root, because no other user can run it here"
    remedy = "run the tests as an ordinary user, or make /dev/kvm accessible to a group"
    return _bad(name, found, remedy, needed=False)


def images(states: Mapping[str, str], default: str) -> Check:
    """The states of the images by name, as `ImageStore` returns them."""
    built = [name for name, state in states.items() if state == "built"]
    stale = [name for name, state in states.items() if state == "stale"]
    there = {"built": built, "stale": stale}
    found = ", ".join(f"{', '.join(names)} {state}" for state, names in there.items() if names)
    if built and not stale:
        return _ok("images", found)
    remedy = f"vmsandbox images build {' '.join(stale or [default])}"
    return _bad("images", found or "none is built", remedy, needed=False)


def emulators(
    there: Sequence[str], built: Mapping[str, str], packages: Collection[str] = ()
) -> Check:
    """The emulators for other architectures.

    Args:
        there: the architectures whose guests can run here.
        built: the built images for other architectures → how to install the emulator; empty if it is here.
        packages: of Debian, which have all that is missing; empty if packages of Debian do not help.
    """
    name = "other architectures"
    found = f"emulated: {', '.join(there)}" if there else "none can be emulated"
    if built:
        found += f"; {', '.join(built)} built"
    lacking = [image for image, remedy in built.items() if remedy]
    if not lacking:
        return _ok(name, found)
    found += f"; no emulator for {', '.join(lacking)}"
    remedy = "; ".join(dict.fromkeys(filter(None, built.values())))
    if packages:
        remedy = programs.install_line(sorted(packages))
    return _bad(name, found, remedy, needed=False)


def definitions(wrong: Sequence[str]) -> Check:
    """The images whose definition is wrong; at least one."""
    found = f"the definition of {', '.join(wrong)} is wrong"
    return _bad(
        "image definitions", found, "vmsandbox images list says what is wrong", needed=False
    )


def ssh_client(path: str | None) -> Check:
    if path is not None:
        return _ok("SSH client", path)
    return _missing("SSH client", "missing: 'vmsandbox shell' needs one", "ssh", needed=False)


def worst(checks: Sequence[Check]) -> Status:
    """The worst status among `checks`."""
    found = {check.status for check in checks}
    return next((status for status in reversed(Status) if status in found), Status.OK)
