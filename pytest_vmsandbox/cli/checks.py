"""What is good and bad about a machine: one plain function for each thing that is looked at.

They judge what they are given; `examine` looks at the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.cli import packages
from pytest_vmsandbox.core.spec import MIB, format_size

OLDEST_PYTHON = (3, 11)
OLDEST_QEMU = (7, 2)  # of those that were tested
SUBORDINATE_IDS = 65536
_FIRST_SUBORDINATE_ID = 100000
_LITTLE_DISK = 256 * MIB


class Status(StrEnum):
    """How a check ended: `FAILED` means that no guest can run because of it."""

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


def operating_system(platform: str, name: str) -> Check:
    """`platform` as in `sys.platform`; `name` for people."""
    if platform == "linux":
        return Check(name="operating system", status=Status.OK, found=name)
    if platform == "darwin":
        return Check(
            name="operating system",
            status=Status.WARNING,
            found=name,
            remedy="images cannot be built here: build them on Linux",
        )
    return Check(
        name="operating system",
        status=Status.FAILED,
        found=name,
        remedy="guests run on Linux and macOS; elsewhere the plugin loads and stays inert",
    )


def python(version: Sequence[int], path: str) -> Check:
    found = f"{'.'.join(map(str, version[:3]))}, {path}"
    if tuple(version[:2]) < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        return Check(
            name="Python", status=Status.FAILED, found=found, remedy=f"use Python {needed} or newer"
        )
    return Check(name="Python", status=Status.OK, found=found)


def qemu(path: Path, version: Sequence[int]) -> Check:
    """A QEMU that is there and runs."""
    found = f"{'.'.join(map(str, version))}, {path}"
    if tuple(version) < OLDEST_QEMU:
        return Check(
            name="QEMU",
            status=Status.WARNING,
            found=found,
            remedy=f"use {'.'.join(map(str, OLDEST_QEMU))} or newer; older ones were not tested",
        )
    return Check(name="QEMU", status=Status.OK, found=found)


def no_qemu(problem: str, remedy: str, program: str, *, missing: bool) -> Check:
    """A QEMU that is missing, or does not run.

    Args:
        problem, remedy: what `find_qemu` says.
        program: the one that was looked for.
        missing: there is none.
    """
    if not missing:
        return Check(name="QEMU", status=Status.FAILED, found=problem, remedy=remedy)
    if program not in programs.PACKAGES:
        return Check(
            name="QEMU", status=Status.FAILED, found=problem, remedy="mend or unset VMSANDBOX_QEMU"
        )
    wanted = (programs.package_of(program),)
    return Check(
        name="QEMU",
        status=Status.FAILED,
        found=problem,
        remedy=packages.install_line(wanted),
        install=wanted,
    )


def qemu_img(path: str | None) -> Check:
    if path is not None:
        return Check(name="qemu-img", status=Status.OK, found=path)
    wanted = (programs.package_of("qemu-img"),)
    return Check(
        name="qemu-img",
        status=Status.FAILED,
        found="missing: guests get no disks",
        remedy=packages.install_line(wanted),
        install=wanted,
    )


def accelerator(kvm: str, verdict: tuple[str, str] | None, *, platform: str = "linux") -> Check:
    """Which accelerator guests have.

    Args:
        kvm: why KVM cannot even be tried; empty where it can.
        verdict: the accelerator that is known to run guests, and why it is that one.
        platform: as in `sys.platform`.
    """
    name = "accelerator"
    emulation = "guests run under emulation, several times slower"
    if verdict is not None and verdict[0] != "tcg":
        return Check(name=name, status=Status.OK, found=f"{verdict[0]}: {verdict[1]}")
    if verdict is not None:
        remedy = (
            _kvm_remedy(kvm)
            if kvm and platform == "linux"
            else "use a machine whose hardware virtualization works (in a virtual machine: one "
            "with nested virtualization)"
        )
        return Check(
            name=name, status=Status.WARNING, found=f"{emulation}: {verdict[1]}", remedy=remedy
        )
    if platform == "linux" and kvm:
        return Check(
            name=name, status=Status.WARNING, found=f"{emulation}: {kvm}", remedy=_kvm_remedy(kvm)
        )
    candidate = "hvf" if platform == "darwin" else "/dev/kvm"
    return Check(
        name=name,
        status=Status.OK,
        found=f"{candidate} is here; whether it runs guests is proven with the first one",
    )


def _kvm_remedy(kvm: str) -> str:
    if "usermod" in kvm:  # it is in what was found
        return "do that, and log in anew"
    return "switch virtualization on in the firmware, or nested virtualization in the hypervisor"


def loopback(problem: str, remedy: str) -> Check:
    """`problem`: why a connection of this machine to itself fails; empty if it works."""
    if not problem:
        return Check(name="loopback", status=Status.OK, found="works")
    return Check(
        name="loopback",
        status=Status.FAILED,
        found=f"127.0.0.1 cannot be reached: {problem}",
        remedy=remedy,
    )


def image_tools(missing: Sequence[str], *, needed: bool) -> Check:
    """The programs that building images takes.

    Args:
        missing: those that are not here.
        needed: no image is built, so that no guest can run without them.
    """
    if not missing:
        return Check(name="image tools", status=Status.OK, found="all here")
    wanted = tuple(sorted({programs.package_of(program) for program in missing}))
    return Check(
        name="image tools",
        status=Status.FAILED if needed else Status.WARNING,
        found=f"missing: {', '.join(missing)}",
        remedy=packages.install_line(wanted),
        install=wanted,
    )


def keyring(exists: bool, *, needed: bool) -> Check:
    """The keys that Debian's packages are signed with."""
    if exists:
        return Check(name="Debian's keys", status=Status.OK, found="here")
    wanted = ("debian-archive-keyring",)
    return Check(
        name="Debian's keys",
        status=Status.FAILED if needed else Status.WARNING,
        found="missing: images cannot be built from Debian's packages",
        remedy=packages.install_line(wanted),
        install=wanted,
    )


def subordinate_ids(user: str, uid: int, subuid: str, subgid: str, *, needed: bool) -> Check:
    """What an ordinary user needs to build images.

    Args:
        user, uid: who.
        subuid, subgid: the content of ``/etc/subuid`` and ``/etc/subgid``.
        needed: as in `image_tools`.
    """
    options = {"--add-subuids": subuid, "--add-subgids": subgid}
    lacking = [name for name, text in options.items() if not _has_range(user, uid, text)]
    if not lacking:
        return Check(name="subordinate ids", status=Status.OK, found=f"{user} has them")
    first = _free_id(subuid, subgid)
    chosen = f"{first}-{first + SUBORDINATE_IDS - 1}"
    command = ("usermod", *(word for name in lacking for word in (name, chosen)), user)
    return Check(
        name="subordinate ids",
        status=Status.FAILED if needed else Status.WARNING,
        found=f"{user} has no {SUBORDINATE_IDS} of them in "
        + " and ".join(f"/etc/{name[6:-1]}" for name in lacking),
        remedy=f"sudo {' '.join(command)}",
        commands=(command,),
    )


def _ranges(text: str) -> list[tuple[str, int, int]]:
    fields = [line.split(":") for line in text.splitlines()]
    return [
        (name, int(first), int(count))
        for name, first, count in (it for it in fields if len(it) == 3)
        if first.isdecimal() and count.strip().isdecimal()
    ]


def _has_range(user: str, uid: int, text: str) -> bool:
    return any(
        name in (user, str(uid)) and count >= SUBORDINATE_IDS for name, _, count in _ranges(text)
    )


def _free_id(*texts: str) -> int:
    ends = [first + count for text in texts for _, first, count in _ranges(text)]
    return max([_FIRST_SUBORDINATE_ID, *ends])


def user_namespaces(problem: str, *, needed: bool) -> Check:
    """`problem`: what the kernel says when an ordinary user makes one; empty if it works."""
    if not problem:
        return Check(name="user namespaces", status=Status.OK, found="work")
    return Check(
        name="user namespaces",
        status=Status.FAILED if needed else Status.WARNING,
        found=f"refused, and building images needs them: {problem}",
        remedy="sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), "
        "sudo sysctl kernel.unprivileged_userns_clone=1 (older Debian), or build as root",
    )


def memory(available: int | None, *, default: int, smallest: int, overhead: int) -> Check:
    """Bytes that are free; what a guest has by default, and at least; what QEMU itself takes."""
    if available is None:
        return Check(name="free memory", status=Status.OK, found="this system does not tell")
    found = format_size(max(0, available))
    wanted = f"a guest of the default size takes {format_size(default + overhead)}"
    if available < smallest + overhead:
        return Check(
            name="free memory",
            status=Status.FAILED,
            found=f"{found}; {wanted}",
            remedy="end what else runs on this machine",
        )
    if available < default + overhead:
        return Check(
            name="free memory",
            status=Status.WARNING,
            found=f"{found}; {wanted}",
            remedy="end what else runs here, or give guests less: --memory, vm_memory",
        )
    count = available // (default + overhead)
    guests = "one guest" if count == 1 else f"{count} guests"
    return Check(
        name="free memory",
        status=Status.OK,
        found=f"{found}: room for {guests} of the default size",
    )


def disk(name: str, folder: Path, free: int, *, needed: int, variable: str) -> Check:
    """Bytes that are free in `folder`; what a build takes; the variable that moves the folder."""
    found = f"{format_size(free)} in {folder}"
    if free < _LITTLE_DISK:
        status, what = Status.FAILED, "guests write there, too"
    elif free < needed:
        status, what = Status.WARNING, f"building an image takes {format_size(needed)}"
    else:
        return Check(name=name, status=Status.OK, found=found)
    return Check(
        name=name,
        status=status,
        found=f"{found}; {what}",
        remedy=f"make room, or set {variable} to a folder on a larger disk",
    )


def folder(name: str, path: Path, problem: str, *, variable: str) -> Check:
    """`problem`: why the folder cannot be used; empty if it can."""
    if not problem:
        return Check(name=name, status=Status.OK, found=str(path))
    return Check(
        name=name,
        status=Status.FAILED,
        found=f"{path} {problem}",
        remedy=f"mend it, or name another folder in {variable}",
    )


def qemu_user(euid: int, user: str, identity: tuple[int, int] | None) -> Check:
    """Who QEMU runs as.

    Args:
        euid, user: we ourselves.
        identity: user and group of an unprivileged one; None for ourselves.
    """
    if identity is not None:
        uid, gid = identity
        return Check(
            name="QEMU runs as", status=Status.OK, found=f"user {uid}, group {gid}, who own nothing"
        )
    if euid != 0:
        return Check(name="QEMU runs as", status=Status.OK, found=f"{user}, an ordinary user")
    return Check(
        name="QEMU runs as",
        status=Status.WARNING,
        found="root: there is no other user here who could",
        remedy="run as an ordinary user, or open /dev/kvm to a group",
    )


def images(states: dict[str, str], default: str) -> Check:
    """The states of the images by name, as `ImageStore` tells them."""
    built = [name for name, state in states.items() if state == "built"]
    stale = [name for name, state in states.items() if state == "stale"]
    found = ", ".join(
        f"{', '.join(names)} {word}"
        for names, word in ((built, "built"), (stale, "stale"))
        if names
    )
    if built and not stale:
        return Check(name="images", status=Status.OK, found=found)
    wanted = " ".join(stale or [default])
    return Check(
        name="images",
        status=Status.WARNING,
        found=found or "none is built",
        remedy=f"vmsandbox images build {wanted}",
    )


def ssh_client(path: str | None) -> Check:
    if path is not None:
        return Check(name="SSH client", status=Status.OK, found=path)
    wanted = (programs.package_of("ssh"),)
    return Check(
        name="SSH client",
        status=Status.WARNING,
        found="missing: 'vmsandbox shell' needs it",
        remedy=packages.install_line(wanted),
        install=wanted,
    )


def worst(checks: Sequence[Check]) -> Status:
    """The worst status among `checks`."""
    order: Callable[[Status], int] = list(Status).index
    return max((check.status for check in checks), key=order, default=Status.OK)
