"""What a run has left that was killed: processes and folders that nobody owns any more.

Usually there is none: a launcher ends with its run, and takes guests and folder along.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pytest_vmsandbox.machine.hypervisor import is_alive

_LAUNCHER = Path("pytest_vmsandbox", "machine", "launcher.py")
_END_SECONDS = 10.0


def end_ownerless(proc: Path = Path("/proc")) -> list[int]:
    """End the launchers of this user whose run is gone, and so their guests; their numbers."""
    return [pid for pid in _launchers(proc) if _is_ownerless(proc, pid) and _end(proc, pid)]


def _launchers(proc: Path) -> Iterator[int]:
    for entry in proc.glob("[0-9]*"):
        with suppress(OSError):
            if (
                entry.stat().st_uid == os.geteuid()
                and _folder_of(entry) is not None
                and _sees_our_files(entry)
            ):
                yield int(entry.name)


def _sees_our_files(process: Path) -> bool:
    """Whether paths mean the same there; in a container they do not."""
    return (process / "ns" / "mnt").readlink() == Path("/proc/self/ns/mnt").readlink()


def _folder_of(process: Path) -> Path | None:
    """The folder of a launcher's run; None if the process is no launcher."""
    words = (process / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    argv = [os.fsdecode(word) for word in words]
    program = argv[-4] if len(argv) >= 4 else ""
    is_ours = Path(program).parts[-3:] == _LAUNCHER.parts
    return Path(argv[-1]) if is_ours else None


def _is_ownerless(proc: Path, pid: int) -> bool:
    with suppress(OSError):
        folder = _folder_of(proc / str(pid))
        return folder is not None and not is_alive(folder)
    return False


def _end(proc: Path, pid: int) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # it has just ended by itself
        return False
    try:
        if not _is_ownerless(proc, pid):  # another process has got that number
            return False
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(_END_SECONDS * 1000))
    finally:
        os.close(descriptor)
