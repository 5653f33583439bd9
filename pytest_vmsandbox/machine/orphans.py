"""Removes what killed runs left behind: folders and launchers without an owner.

A run holds the lock of its folder. Usually nothing is left, because a launcher ends with its run, and
removes the guests and the folder.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.errors import ConfigError

LOCK = ".lock"
_RUN = re.compile(r"\d+-[0-9a-f]{8}")  # names of folders of runs
_LAUNCHER = Path("pytest_vmsandbox", "machine", "launcher.py")
_END_SECONDS = 10.0


# -- folders ---------------------------------------------------------------------------------------


def remove_dead_runs(root: Path) -> list[Path]:
    """Remove the folders of runs that are gone. Returns the removed folders.

    Raises:
        ConfigError: `root` is not private to this user.
    """
    if not root.exists():
        return []
    with paths.usable(root, paths.RUNTIME), guarded(root):
        return sweep(root)


@contextmanager
def guarded(root: Path) -> Iterator[None]:
    """Be the only process that makes or removes folders of runs."""
    status = root.lstat()  # do not follow a link that somebody else may have put there
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    if not private or status.st_uid != os.geteuid():
        raise ConfigError(
            f"{root} is not private to this user: it must be a folder with mode 0700 that this user owns",
            remedy=f"remove it, or set the environment variable {paths.RUNTIME} to another folder",
        )
    with locked(root / LOCK, on_busy=lambda: None):
        yield


def sweep(root: Path) -> list[Path]:
    """Remove the folders of runs that are gone, under the guard. Returns the removed folders."""
    named_so = (entry for entry in root.iterdir() if _RUN.fullmatch(entry.name))
    folders = (entry for entry in named_so if entry.is_dir() and not entry.is_symlink())
    dead = [folder for folder in folders if not is_alive(folder)]
    for folder in dead:
        with suppress(OSError):  # its launcher may be removing it, too
            for link in filter(Path.is_symlink, folder.iterdir()):  # see `Hypervisor.own`
                shutil.rmtree(link.readlink(), ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    return [folder for folder in dead if not folder.exists()]


def is_alive(folder: Path) -> bool:
    """Whether the run that made this folder still holds its lock."""
    try:
        with locked(folder / LOCK, shared=True):
            return False
    except OSError as error:
        return isinstance(error, BlockingIOError)


# -- launchers -------------------------------------------------------------------------------------


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
