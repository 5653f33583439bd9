"""Takes from the program what it does not need: files, other programs, and root's rights."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446  # system calls, on every architecture
_LANDLOCK_VERSION = 1  # a flag that asks for it
# Rights on files, on TCP ports, and to reach other processes, with the version of Landlock that knows them.
_FILES = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_NETWORK, _SCOPE = (4, 0b11), (6, 0b11)


def confine(uid: int, gid: int) -> None:
    """Become a user, and give up what the kernel allows to give up. Open descriptors stay.

    Args:
        uid: −1 for the present user.
        gid: likewise.
    """
    library = ctypes.CDLL(None, use_errno=True)
    parent = os.getppid()
    if uid >= 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        # That has cleared the death signal, which we got from the launcher.
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(127)
    library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    library.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # other processes of this user cannot look in
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getuid() != 0:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    _landlock(library)


def _landlock(library: ctypes.CDLL) -> None:
    """Deny every path. Kernels without Landlock (before 5.13, or where it is off) deny nothing."""
    version = library.syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)
    if version < 1:
        return
    files = sum(bit for since, bit in _FILES.items() if version >= since)
    rights = [files, *(bits for since, bits in (_NETWORK, _SCOPE) if version >= since)]
    attributes = struct.pack(f"={len(rights)}Q", *rights)
    rules = library.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if rules >= 0:
        library.syscall(_LANDLOCK_RESTRICT, rules, 0)
        os.close(rules)
