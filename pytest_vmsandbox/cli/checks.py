"""What is good and bad about a machine: one plain function for each thing that is looked at.

They judge what they are given; `examine` looks at the machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.core.spec import MIB, format_size

OLDEST_QEMU = (7, 2)  # of those that were tested
SUBORDINATE_IDS = 65536
_FIRST_SUBORDINATE_ID = 100000
_LITTLE_DISK = 256 * MIB


class Status(StrEnum):
    """How a check ended, from good to bad: `FAILED` means that no guest can run because of it."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found about one thing.

    Attributes:
        name: of the thing.
        status: how good it is.
        found: what there is, in a line.
        remedy: what to do about it; empty where there is nothing to do.
        install: the Debian packages that mend it.
        commands: command lines for root that mend it.
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
    """Something that is not as it should be.

    Args:
        needed: no guest can run because of it.
    """
    status = Status.FAILED if needed else Status.WARNING
    return Check(name=name, status=status, found=found, remedy=remedy)


def _missing(name: str, found: str, *lacking: str, needed: bool = True) -> Check:
    """Something that the packages of programs bring, or packages of these names."""
    wanted = tuple(sorted({programs.package_of(program) for program in lacking}))
    return replace(_bad(name, found, programs.install_line(wanted), needed=needed), install=wanted)


def operating_system(platform: str, name: str) -> Check:
    """`platform` as in `sys.platform`; `name` for people."""
    check = "operating system"
    if platform == "linux":
        return _ok(check, name)
    if platform == "darwin":
        return _bad(check, name, "images cannot be built here: build them on Linux", needed=False)
    return _bad(
        check, name, "guests run on Linux and macOS; elsewhere the plugin loads and stays inert"
    )


def python(version: str, path: str) -> Check:
    """The Python that runs this: pip installs us on those only that are new enough."""
    return _ok("Python", f"{version}, {path}")


def qemu(path: Path, version: Sequence[int]) -> Check:
    """A QEMU that is there and runs."""
    found = f"{'.'.join(map(str, version))}, {path}"
    if tuple(version) < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        remedy = f"use {oldest} or newer; older ones were not tested"
        return _bad("QEMU", found, remedy, needed=False)
    return _ok("QEMU", found)


def no_qemu(problem: str, remedy: str, program: str, *, missing: bool) -> Check:
    """A QEMU that is missing, or does not run.

    Args:
        problem, remedy: what `find_qemu` says.
        program: the one that was looked for.
        missing: there is none.
    """
    if not missing:
        return _bad("QEMU", problem, remedy)
    if program not in programs.PACKAGES:
        return _bad("QEMU", problem, "mend or unset VMSANDBOX_QEMU")
    return _missing("QEMU", problem, program)


def qemu_img(path: str | None) -> Check:
    if path is not None:
        return _ok("qemu-img", path)
    return _missing("qemu-img", "missing: guests get no disks", "qemu-img")


def accelerator(kvm: str, verdict: tuple[str, str] | None) -> Check:
    """Which accelerator guests have.

    Args:
        kvm: why KVM cannot even be tried; empty where it can.
        verdict: the accelerator that is known to run guests, and why it is that one.
    """
    name = "accelerator"
    if verdict is None and not kvm:
        return _ok(name, "/dev/kvm is here; whether it runs guests is proven with the first one")
    accelerator, reason = verdict or ("tcg", kvm)
    if accelerator != "tcg":
        return _ok(name, f"{accelerator}: {reason}")
    if "usermod" in kvm:  # it is in what was found
        remedy = "do that, and log in anew"
    elif kvm:
        remedy = (
            "switch virtualization on in the firmware, or nested virtualization in the hypervisor"
        )
    else:
        remedy = (
            "use a machine whose hardware virtualization works (in a virtual machine: one "
            "with nested virtualization)"
        )
    found = f"guests run under emulation, several times slower: {reason}"
    return _bad(name, found, remedy, needed=False)


def loopback(problem: str, remedy: str) -> Check:
    """`problem`: why a connection of this machine to itself fails; empty if it works."""
    if not problem:
        return _ok("loopback", "works")
    return _bad("loopback", f"127.0.0.1 cannot be reached: {problem}", remedy)


def image_tools(missing: Sequence[str], *, needed: bool) -> Check:
    """The programs that building images takes.

    Args:
        missing: those that are not here.
        needed: no image is built, so that no guest can run without them.
    """
    if not missing:
        return _ok("image tools", "all here")
    return _missing("image tools", f"missing: {', '.join(missing)}", *missing, needed=needed)


def keyring(exists: bool, *, needed: bool) -> Check:
    """The keys that Debian's packages are signed with."""
    if exists:
        return _ok("Debian's keys", "here")
    found = "missing: images cannot be built from Debian's packages"
    return _missing("Debian's keys", found, "debian-archive-keyring", needed=needed)


def subordinate_ids(user: str, uid: int, subuid: str, subgid: str, *, needed: bool) -> Check:
    """What an ordinary user needs to build images.

    Args:
        user, uid: who.
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
    found = f"{user} has no {SUBORDINATE_IDS} of them in {files}"
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
    """`problem`: what the kernel says when an ordinary user makes one; empty if it works."""
    name = "user namespaces"
    if not problem:
        return _ok(name, "work")
    return _bad(
        name,
        f"refused, and building images needs them: {problem}",
        "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), "
        "sudo sysctl kernel.unprivileged_userns_clone=1 (older Debian), or build as root",
        needed=needed,
    )


def memory(available: int | None, *, default: int, smallest: int, overhead: int) -> Check:
    """Bytes that are free; what a guest has by default, and at least; what QEMU itself takes."""
    name = "free memory"
    if available is None:
        return _ok(name, "this system does not tell")
    found = format_size(max(0, available))
    if count := max(0, available) // (default + overhead):
        guests = "one guest" if count == 1 else f"{count} guests"
        return _ok(name, f"{found}: room for {guests} of the default size")
    found += f"; a guest of the default size takes {format_size(default + overhead)}"
    if available < smallest + overhead:
        return _bad(name, found, "end what else runs on this machine")
    remedy = "end what else runs here, or give guests less: --memory, vm_memory"
    return _bad(name, found, remedy, needed=False)


def disk(name: str, folder: Path, free: int, *, needed: int, variable: str) -> Check:
    """Bytes that are free in `folder`; what a build takes; the variable that moves the folder."""
    found = f"{format_size(free)} in {folder}"
    if free >= needed:
        return _ok(name, found)
    remedy = f"make room, or set {variable} to a folder on a larger disk"
    if free < _LITTLE_DISK:
        return _bad(name, f"{found}; guests write there, too", remedy)
    return _bad(
        name, f"{found}; building an image takes {format_size(needed)}", remedy, needed=False
    )


def folder(name: str, path: Path, problem: str, *, variable: str) -> Check:
    """`problem`: why the folder cannot be used; empty if it can."""
    if not problem:
        return _ok(name, str(path))
    return _bad(name, f"{path} {problem}", f"mend it, or name another folder in {variable}")


def qemu_user(euid: int, user: str, identity: tuple[int, int] | None) -> Check:
    """Who QEMU runs as.

    Args:
        euid, user: we ourselves.
        identity: user and group of an unprivileged one; None for ourselves.
    """
    name = "QEMU runs as"
    if identity is not None:
        uid, gid = identity
        return _ok(name, f"user {uid}, group {gid}, who own nothing")
    if euid != 0:
        return _ok(name, f"{user}, an ordinary user")
    found = "root: there is no other user here who could"
    remedy = "run as an ordinary user, or open /dev/kvm to a group"
    return _bad(name, found, remedy, needed=False)


def images(states: Mapping[str, str], default: str) -> Check:
    """The states of the images by name, as `ImageStore` tells them."""
    built = [name for name, state in states.items() if state == "built"]
    stale = [name for name, state in states.items() if state == "stale"]
    there = {"built": built, "stale": stale}
    found = ", ".join(f"{', '.join(names)} {state}" for state, names in there.items() if names)
    if built and not stale:
        return _ok("images", found)
    remedy = f"vmsandbox images build {' '.join(stale or [default])}"
    return _bad("images", found or "none is built", remedy, needed=False)


def ssh_client(path: str | None) -> Check:
    if path is not None:
        return _ok("SSH client", path)
    return _missing("SSH client", "missing: 'vmsandbox shell' needs it", "ssh", needed=False)


def worst(checks: Sequence[Check]) -> Status:
    """The worst status among `checks`."""
    found = {check.status for check in checks}
    return next((status for status in reversed(Status) if status in found), Status.OK)
