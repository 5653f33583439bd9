"""Runs one program in a jail: name spaces of its own, an empty root, a few files, no capabilities.

This file stands alone. It is executed and never imported::

    python -I -S cell.py STATUS-FD ALIVE-FD PLAN-FD

PLAN-FD is a file with JSON: ``{"root": FOLDER, "argv": […], "env": {…}, "limits": {NAME: NUMBER}, "binds": [{"path": …,
"device": N, "inode": N, "target": …, "writable": BOOL}, …]}``. FOLDER is empty, and the new root is mounted on
it. A bind is done only if the file at its path is still the one with that device and inode.

STATUS-FD gets ``{"step": …, "errno": N}`` if the program cannot be started in the jail. It is never started
outside of one. ALIVE-FD is the reading end of a pipe that our starter holds: we end with the starter.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import resource
import select
import signal
import sys
from pathlib import Path

TYPE_CHECKING = False  # type checkers know it; importing typing would take too long
if TYPE_CHECKING:
    from typing import Any, NoReturn

NEW_NAME_SPACES = (
    0x00020000  # mounts
    | 0x04000000  # host name
    | 0x08000000  # System V IPC
    | 0x10000000  # users
    | 0x20000000  # processes
    | 0x40000000  # network
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    *(0x1, 0x2, 0x4, 0x20, 0x1000, 0x4000, 0x40000),
)
# Flags that a mount has and that a user name space must keep: of statvfs, and of mount.
KEPT = {0x2: 0x2, 0x4: 0x4, 0x8: 0x8, 0x400: 0x400, 0x800: 0x800, 0x1000: 0x200000}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}
KEYCTL_JOIN_SESSION_KEYRING = 1
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
MNT_DETACH, LAST_CAPABILITY = 2, 63
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")
NOT_SEALED = "not read-only"  # the step that fails when something could be changed
LOADER = "/etc/ld.so.cache"  # paths of libraries, and nothing else

libc = ctypes.CDLL(None, use_errno=True)


class StepError(Exception):
    """A step that failed, and its errno."""


def main(status: int, alive: int, plan: dict[str, Any]) -> int:
    """Run the program of `plan`. Returns its exit status; 128 + N for signal N."""
    os.set_inheritable(status, False)
    os.set_inheritable(alive, False)
    try:
        die_with_parent(alive)
        enter_name_spaces()
    except (StepError, OSError) as error:
        return tell(status, error)
    program = os.fork()  # the first process of the new name space
    if program == 0:
        try:
            die_with_parent(alive)
            build_root(plan["root"], plan["binds"])
            drop_everything(plan["limits"])
            die_with_parent(alive)  # a change of credentials may have reset it
            start(status, plan["argv"], plan["env"])
        except Exception as error:  # noqa: BLE001  # whatever it is: the program did not start
            tell(status, error)
        finally:
            os._exit(126)
    os.close(status)
    for stream in (0, 1, 2):  # the end of the program's output is its own end
        os.close(stream)
    _, ended = os.waitpid(program, 0)
    code = os.waitstatus_to_exitcode(ended)
    return code if code >= 0 else 128 - code


def tell(status: int, error: Exception) -> int:
    """Report why the jail cannot be made."""
    number = getattr(error, "errno", 0) or 0
    step, number = error.args if isinstance(error, StepError) else (str(error), number)
    os.write(status, json.dumps({"step": step, "errno": number}).encode())
    return 126


def checked(step: str, result: int) -> None:
    """Raise a `StepError` if a call failed."""
    if result != 0:
        raise StepError(step, ctypes.get_errno())


def die_with_parent(alive: int) -> None:
    """Be killed when the parent ends, or now if the starter is gone already."""
    checked("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if select.select([alive], [], [], 0)[0]:
        os._exit(126)


def enter_name_spaces() -> None:
    """Enter new name spaces, as nobody in them, with all capabilities over them."""
    user, group = os.geteuid(), os.getegid()
    checked("unshare", libc.unshare(NEW_NAME_SPACES))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {user} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        try:
            Path("/proc/self", name).write_text(text, encoding="ascii")
        except OSError as error:
            raise StepError(f"write {name}", error.errno) from error


def mount(source: str, target: str | bytes, kind: str, flags: int, data: str = "") -> None:
    """Mount something, or change a mount."""
    words = (os.fsencode(word) for word in (source, target, kind))
    result = libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(data))
    checked(f"mount {kind or 'bind'}", result)


def build_root(root: str, binds: list[dict[str, Any]]) -> None:
    """Make the new root, with the system's programs and the given files, and enter it."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    sources = [open_same(bind) for bind in binds]  # before the new root can hide one
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for name in SYSTEM:
        if Path(name).is_symlink():
            Path(root + name).symlink_to(Path(name).readlink())
        elif Path(name).is_dir():
            Path(root + name).mkdir()
            mount(name, root + name, "", MS_BIND | MS_REC)
    if Path(LOADER).is_file():
        bind_file(LOADER, root + LOADER, writable=False)
    for source, bind in zip(sources, binds, strict=True):
        bind_file(f"/proc/self/fd/{source}", root + bind["target"], writable=bind["writable"])
        os.close(source)
    myself = os.open("/proc/self", os.O_PATH | os.O_CLOEXEC)  # there is no /proc in the new root
    os.chdir(root)
    number = PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise StepError("pivot_root: its number on this processor is unknown", 0)
    checked("pivot_root", libc.syscall(ctypes.c_long(number), b".", b"."))
    checked("umount", libc.umount2(b".", MNT_DETACH))
    os.chdir("/")
    seal(myself, binds)
    os.close(myself)


def open_same(bind: dict[str, Any]) -> int:
    """Open the file of a bind, and check that it is the one that was meant."""
    try:
        source = os.open(bind["path"], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        found = os.fstat(source)
        if (found.st_dev, found.st_ino) != (bind["device"], bind["inode"]):
            raise StepError("replaced", 0)
        # May the program open it, too? Even root may not, if it belongs to somebody else.
        os.close(os.open(f"/proc/self/fd/{source}", os.O_RDWR if bind["writable"] else os.O_RDONLY))
    except OSError as error:
        raise StepError("open", error.errno) from error
    return source


def bind_file(source: str, target: str, *, writable: bool) -> None:
    """Make one file visible at another place."""
    place = Path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch(mode=0o600 if writable else 0o400)
    mount(source, target, "", MS_BIND)


def seal(myself: int, binds: list[dict[str, Any]]) -> None:
    """Make all that can be seen in the new root read-only, but the outputs, and check that it is.

    Args:
        myself: the folder of this process in ``/proc``.
        binds: the given files.
    """
    outputs = {os.fsencode(bind["target"]) for bind in binds if bind["writable"]}
    given = {os.fsencode(bind["target"]) for bind in binds}
    system = {
        os.fsencode(name) for name in SYSTEM if Path(name).is_dir() and not Path(name).is_symlink()
    }
    for target in set(mount_points(myself)) - outputs:
        read_only(target)
    found = set(mount_points(myself))
    for target in {b"/", *system, *given} - found:
        raise StepError(f"{NOT_SEALED}: {os.fsdecode(target)!r} is not mounted", 0)
    for target in found - outputs:
        if not os.statvfs(target).f_flag & os.ST_RDONLY:
            raise StepError(f"{NOT_SEALED}: {os.fsdecode(target)!r}", 0)


def mount_points(myself: int) -> list[bytes]:
    """Where something is mounted. The kernel writes special characters as octal numbers."""
    with os.fdopen(os.open("mountinfo", os.O_RDONLY, dir_fd=myself), "rb") as listing:
        targets = [line.split(b" ")[4] for line in listing]
    return [re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), at) for at in targets]


def read_only(target: bytes) -> None:
    """Make one mount read-only, with no devices and no set-user-id programs."""
    has = os.statvfs(target).f_flag
    kept = sum(flag for known, flag in KEPT.items() if has & known)
    flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | kept
    mount("none", target, "", flags)


def drop_everything(limits: dict[str, int]) -> None:
    """Give up all capabilities and keys, for ever, and set the limits."""
    if (
        number := KEYCTL.get(platform.machine())
    ) is not None:  # without keys in the kernel it fails
        libc.syscall(ctypes.c_long(number), KEYCTL_JOIN_SESSION_KEYRING, None)
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those that there are not
    checked("prctl", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    checked("capset", libc.capset(header, (ctypes.c_uint32 * 6)()))
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        number = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (number, number))


def start(status: int, argv: list[str], env: dict[str, str]) -> NoReturn:
    """Become the program, with the standard streams and no other descriptor."""
    os.closerange(3, status)
    os.closerange(status + 1, os.sysconf("SC_OPEN_MAX") if status < 1024 else status + 4096)
    try:
        os.execve(argv[0], argv, env)
    except OSError as error:
        raise StepError("exec", error.errno) from error


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[3]), encoding="utf-8") as told:
        wanted = json.load(told)
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), wanted))
