"""What a run has left that was killed: processes and folders that nobody owns any more.

Usually there is none: a launcher ends with its run, and takes guests and folder along.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from pathlib import Path

from pytest_vmsandbox.machine.hypervisor import is_alive

_LAUNCHER = Path("pytest_vmsandbox", "machine", "launcher.py")
_END_SECONDS = 10.0


def end_ownerless(proc: Path = Path("/proc")) -> list[int]:
    """End the launchers of this user whose run is gone, and so their guests; their numbers."""
    processes = filter(_is_ownerless, proc.glob("[0-9]*"))
    return [int(process.name) for process in processes if _end(process)]


def _is_ownerless(process: Path) -> bool:
    """Whether that is a launcher of this user whose run is gone."""
    with suppress(OSError):
        return (
            process.stat().st_uid == os.geteuid()
            and (folder := _folder_of(process)) is not None
            and _sees_our_files(process)
            and not is_alive(folder)
        )
    return False


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


def _end(process: Path) -> bool:
    try:
        descriptor = os.pidfd_open(int(process.name))
    except OSError:  # it has just ended by itself
        return False
    try:
        if not _is_ownerless(process):  # another process has got that number
            return False
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(_END_SECONDS * 1000))
    finally:
        os.close(descriptor)
