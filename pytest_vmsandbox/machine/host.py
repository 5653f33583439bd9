"""What this host has and allows: memory, users, the device of its accelerator; and how slow it is.

Limits on QEMU and on guests follow what was seen so far. A limit that suits most machines ends guests
of a slow one that are well. The accelerator's name says only half of it: KVM inside an emulated host
is as slow as emulation.
"""

from __future__ import annotations

import os
import pwd
import resource
import socket
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.core.spec import MIB, format_size
from pytest_vmsandbox.machine.process import Identity

KVM = Path("/dev/kvm")
QEMU_OVERHEAD = 96 * MIB  # of a QEMU process, beside the guest's memory
CLONE_GROWTH = 64 * MIB  # that a clone writes of memory that it shares at first
LOOPBACK_REMEDY = (
    "switch the loopback interface on: ip link set lo up. A network namespace (unshare -n, a "
    "container without a network) begins without it"
)
USUAL_GREETING = 0.25  # seconds; QEMU greets within 0.04 s on an idle machine
USUAL_PROOF = 3.0  # seconds; a kernel that runs natively starts its first program within about 1 s
MOST_SLOWNESS = 30.0  # how far limits are stretched, emulation included
_LOOPBACK_SECONDS = 5.0
_MANY_DESCRIPTORS = 65_536  # enough; and programs that close all there may be stay quick
_FEWEST_DESCRIPTORS = 256  # with which the launcher starts a guest
_SPARE_DESCRIPTORS = 64  # for a guest, and what is made ahead meanwhile; one that runs takes nine
_CGROUP = Path("/sys/fs/cgroup")  # in a container, its own
_SETGID, _SETUID = 6, 7  # bits of a capability set
_UIDS = range(61184, 65520)  # systemd's range for users that exist only while a service runs


def available_memory() -> int | None:
    """Bytes that a new process can use without swapping; None where the host does not tell."""
    lines = _lines("/proc/meminfo")
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        limit = int((_CGROUP / "memory.max").read_text(encoding="utf-8"))
        used = int((_CGROUP / "memory.current").read_text(encoding="utf-8"))
        sizes.append(limit - used + _page_cache())
    return min(sizes, default=None)


def _lines(path: str) -> list[str]:
    """What the kernel tells in a file of `/proc`, line by line; nothing where it has no such file."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def total_memory() -> int:
    """Bytes of memory that this host, or the container we are in, has at all."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int((_CGROUP / "memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return total


def _page_cache() -> int:
    """Bytes of a container's memory that hold files, and are given up when memory is needed."""
    words = map(str.split, _lines(os.fspath(_CGROUP / "memory.stat")))
    return sum(int(size) for name, size in words if name in {"active_file", "inactive_file"})


def require_memory(size: int) -> None:
    """Check that a guest with `size` bytes of memory fits.

    Raises:
        LaunchError: it does not.
    """
    available = available_memory()
    if available is not None and size + QEMU_OVERHEAD > available:
        raise LaunchError(
            f"a guest with {format_size(size)} of memory does not fit: this host has "
            f"{format_size(max(0, available))} left, QEMU itself takes {format_size(QEMU_OVERHEAD)}",
            remedy="give it less: memory= (in a test), --memory (vmsandbox); or end what else runs here",
        )


def loopback_problem() -> str:
    """Why a connection from this machine to itself fails; empty where it works."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def require_loopback() -> None:
    """Check that a port of a guest can be reached from here.

    Raises:
        LaunchError: it cannot.
    """
    if problem := loopback_problem():
        raise LaunchError(
            f"127.0.0.1 cannot be reached: {problem}. Guests are reached through this address",
            remedy=LOOPBACK_REMEDY,
        )


def raise_descriptor_limit() -> None:
    """Let this process, and those that it starts, have as many files open as is allowed, within reason.

    The usual limit of 1,024 protects programs that call ``select``, and ends at some 100 guests. It is
    not lowered again: guests and the launcher have it from here.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MANY_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # then fewer guests fit, as `require_descriptors` tells
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def require_descriptors() -> None:
    """Check that this process can open the files of a further guest.

    Raises:
        LaunchError: it cannot.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return
    try:
        count = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # it is done for each guest
    except OSError:  # the host does not tell, or there is no number left to look
        count = limit
    if limit < max(_FEWEST_DESCRIPTORS, count + _SPARE_DESCRIPTORS):
        raise LaunchError(
            f"this process may have {limit} files open and has {count}, which leaves too few for a guest",
            remedy="allow it more: ulimit -n 65536 (a shell), LimitNOFILE=65536 (a service of systemd), "
            "--ulimit nofile=65536 (a container); or use fewer guests at a time",
        )


def kvm_problem() -> str:
    """Why KVM cannot even be tried here; empty where it can."""
    if sys.platform != "linux":
        return "there is no KVM but on Linux"
    if not KVM.exists():
        return f"there is no {KVM}: virtualization is switched off, or this is a virtual machine"
    if not os.access(KVM, os.R_OK | os.W_OK):
        return f"{KVM} is not open to this user; add them to its group: sudo usermod -aG kvm $USER"
    return ""


def guest_identity(accelerator: str) -> Identity | None:
    """Who QEMU runs as: where we are root, an unprivileged user of our own; None where not.

    With KVM the user is put into the group of its device. Where the device is open to root alone,
    QEMU has to stay root.
    """
    if os.geteuid() != 0:
        return None
    groups: tuple[int, ...] = ()
    if accelerator == "kvm" and KVM.exists():
        status = KVM.stat()
        if status.st_mode & 0o006 != 0o006:
            if status.st_mode & 0o060 != 0o060:
                return None
            groups = (status.st_gid,)
    if not (_all_users_mapped() and _may_change_user()):
        return None
    uid = _UIDS[os.getpid() % len(_UIDS)]
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return Identity(uid=uid, gid=uid, groups=groups)
    return Identity(uid=65534, gid=65534, groups=groups)


def _all_users_mapped() -> bool:
    """Whether `_UIDS` exist in this user namespace (in a container they may not)."""
    return any(
        int(first) <= _UIDS.start and _UIDS.stop <= int(first) + int(count)
        for first, _, count in map(str.split, _lines("/proc/self/uid_map"))
    )


def _may_change_user() -> bool:
    """Whether we may become another user (in a container root may not)."""
    lines = _lines("/proc/self/status")
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    needed = 1 << _SETUID | 1 << _SETGID
    return effective & needed == needed


@cache
def processor() -> str:
    """The model of this host's processors and what they can do; a state saved here needs the same."""
    lines = _lines("/proc/cpuinfo")
    names = ("vendor_id", "model", "model name", "stepping", "microcode", "flags", "Features")
    found = dict(line.split("\t", 1) for line in lines if line.startswith(names))
    return "\n".join(f"{name}{value}" for name, value in found.items())


def processor_seconds(pid: int) -> float:
    """Processor time that a process has taken, in seconds; 0 where the host does not tell."""
    words = " ".join(_lines(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK") if words else 0.0


class Pace:
    """What one process has seen of its machine; used from any thread.

    Attributes:
        slowness: by how much this machine is slower than one on which the usual limits do; at least 1.

    Example:
        >>> pace = Pace()
        >>> pace.took(2.0, usual=0.25)
        >>> pace.stretch(30.0)
        240.0
    """

    def __init__(self) -> None:
        self.slowness = 1.0
        self._lock = threading.Lock()

    def took(self, seconds: float, *, usual: float) -> None:
        """Learn from something that took so many seconds, and at most `usual` elsewhere."""
        with self._lock:
            self.slowness = min(max(self.slowness, seconds / usual), MOST_SLOWNESS)

    def was_late(self) -> None:
        """Learn from a limit that has just passed: it was too short, or what it was for hangs."""
        self.took(2 * self.slowness, usual=1.0)

    def stretch(self, seconds: float, scale: float = 1.0) -> float:
        """A limit for this machine.

        Args:
            seconds: the limit on a usual one.
            scale: by how much guests are slower than natively, as far as the accelerator's name tells.
        """
        return seconds * max(scale, min(scale * self.slowness, MOST_SLOWNESS))
