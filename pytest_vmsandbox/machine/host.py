"""What this host has and allows: memory, users, KVM; and how fast it is.

Timeouts of QEMU and guests follow what we have seen so far. A timeout for usual machines would end good
guests on a slow machine. The accelerator is not enough to know: KVM inside an emulated host is as slow
as emulation.
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
QEMU_OVERHEAD = 96 * MIB  # of a QEMU process, besides the guest's memory
CLONE_GROWTH = 64 * MIB  # shared memory that a clone typically writes
LOOPBACK_REMEDY = (
    "turn on the loopback interface: ip link set lo up. In a network namespace (unshare -n, a container "
    "without a network), it is off at first"
)
USUAL_GREETING = 0.25  # seconds; QEMU greets within 0.04 s on an idle machine
USUAL_PROOF = 3.0  # seconds; a native kernel starts its first program within about 1 s
MOST_SLOWNESS = 30.0  # the largest factor for timeouts, emulation included
_LOOPBACK_SECONDS = 5.0
_MANY_DESCRIPTORS = 65_536  # enough; programs that close all possible descriptors stay quick
_FEWEST_DESCRIPTORS = 256  # that the launcher needs to start a guest
_SPARE_DESCRIPTORS = 64  # for a guest and clones made ahead; a running guest takes nine
_CGROUP = Path("/sys/fs/cgroup")  # in a container, its own
_SETGID, _SETUID = 6, 7  # bits of a capability set
_UIDS = range(61184, 65520)  # systemd's range for users that exist only while a service runs


def available_memory() -> int | None:
    """Bytes that a new process can use without swapping; None if unknown."""
    lines = _lines("/proc/meminfo")
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # no container, or no limit ("max")
        limit = int((_CGROUP / "memory.max").read_text(encoding="utf-8"))
        used = int((_CGROUP / "memory.current").read_text(encoding="utf-8"))
        sizes.append(limit - used + _page_cache())
    return min(sizes, default=None)


def _lines(path: str) -> list[str]:
    """The lines of a file of the kernel; none if it is missing."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def total_memory() -> int:
    """Bytes of memory of this host, or of the container that we are in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int((_CGROUP / "memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return total


def _page_cache() -> int:
    """Bytes of a container's memory that cache files, and are freed on demand."""
    words = map(str.split, _lines(os.fspath(_CGROUP / "memory.stat")))
    return sum(int(size) for name, size in words if name in {"active_file", "inactive_file"})


def private(path: str, flags: int) -> int:
    """Open a file that only this user can read. It is an opener for `open`."""
    return os.open(path, flags, 0o600)


def require_memory(size: int) -> None:
    """Check that a guest with `size` bytes of memory fits.

    Raises:
        LaunchError: it does not fit.
    """
    available = available_memory()
    if available is not None and size + QEMU_OVERHEAD > available:
        raise LaunchError(
            f"a guest with {format_size(size)} of memory does not fit: this machine has "
            f"{format_size(max(0, available))} left, and QEMU itself takes {format_size(QEMU_OVERHEAD)}",
            remedy="stop other programs on this machine, or give the guest less memory: memory= (marker vm, "
            "boot), vm_memory (ini file), --memory (vmsandbox)",
        )


def loopback_problem() -> str:
    """Why this machine cannot connect to itself; empty if it can."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def require_loopback() -> None:
    """Check that we can reach guests' ports.

    Raises:
        LaunchError: we cannot.
    """
    if problem := loopback_problem():
        raise LaunchError(
            f"127.0.0.1 cannot be reached, but it is needed to reach guests: {problem}",
            remedy=LOOPBACK_REMEDY,
        )


def raise_descriptor_limit() -> None:
    """Raise this process's limit on open files as far as allowed, up to 65,536.

    The usual limit of 1,024 protects programs that call ``select``, and is enough for about 100 guests.
    We do not lower it again, because the launcher and guests inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MANY_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # `require_descriptors` reports it if it matters
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def require_descriptors() -> None:
    """Check that this process can open the files of another guest.

    Raises:
        LaunchError: it cannot.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return
    try:
        count = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # called for each guest
    except OSError:  # unknown, or there is no descriptor left
        count = limit
    if limit < max(_FEWEST_DESCRIPTORS, count + _SPARE_DESCRIPTORS):
        raise LaunchError(
            f"this process has {count} files open and may open {limit}, which is too few for another guest",
            remedy="raise the limit: ulimit -n 65536 (shell), LimitNOFILE=65536 (systemd service), "
            "--ulimit nofile=65536 (container). Or use fewer guests at a time",
        )


def kvm_problem() -> str:
    """Why KVM cannot be tried here; empty if it can."""
    if sys.platform != "linux":
        return "KVM exists on Linux only"
    if not KVM.exists():
        return f"there is no {KVM}: virtualization is turned off, or this is a virtual machine"
    if not os.access(KVM, os.R_OK | os.W_OK):
        return (
            f"{KVM} is not open to this user; add the user to its group: sudo usermod -aG kvm $USER"
        )
    return ""


def guest_identity(accelerator: str) -> Identity | None:
    """The unprivileged user that QEMU runs as, if we are root; None for our own user.

    For KVM, that user gets the group of its device. If the device is open to root only, QEMU must run as
    root.
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
    """Whether `_UIDS` exist in this user namespace. In a container, they may not."""
    return any(
        int(first) <= _UIDS.start and _UIDS.stop <= int(first) + int(count)
        for first, _, count in map(str.split, _lines("/proc/self/uid_map"))
    )


def _may_change_user() -> bool:
    """Whether we may become another user. In a container, root may not."""
    lines = _lines("/proc/self/status")
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    needed = 1 << _SETUID | 1 << _SETGID
    return effective & needed == needed


@cache
def processor() -> str:
    """The model and features of this host's CPUs. A state saved under KVM needs the same."""
    lines = _lines("/proc/cpuinfo")
    names = ("vendor_id", "model", "model name", "stepping", "microcode", "flags", "Features")
    found = dict(line.split("\t", 1) for line in lines if line.startswith(names))
    return "\n".join(f"{name}{value}" for name, value in found.items())


def processor_seconds(pid: int) -> float:
    """CPU time of a process, in seconds; 0 if unknown."""
    words = " ".join(_lines(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK") if words else 0.0


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process. If nobody can tell, we assume so."""
    words = " ".join(_lines(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return not words or words[0] in {"T", "t"}


class Pace:
    """What one process knows about this machine's speed. Any thread may use it.

    Attributes:
        slowness: how many times slower this machine is than one for the usual timeouts; at least 1.

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
        """Learn from something that took `seconds` here, and takes at most `usual` elsewhere."""
        with self._lock:
            self.slowness = min(max(self.slowness, seconds / usual), MOST_SLOWNESS)

    def was_late(self) -> None:
        """Learn from a timeout that has just passed. It may have been too short."""
        self.took(2 * self.slowness, usual=1.0)

    def stretch(self, seconds: float, scale: float = 1.0) -> float:
        """A timeout for this machine.

        Args:
            seconds: the timeout on a usual machine.
            scale: how many times slower guests are with this accelerator.
        """
        return seconds * max(scale, min(scale * self.slowness, MOST_SLOWNESS))
