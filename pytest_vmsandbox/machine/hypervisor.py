"""The one owner of everything that a process needs to run guests."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.loop import LoopThread
from pytest_vmsandbox.machine.process import Launcher

_LOCK = ".lock"
_RUN = re.compile(r"\d+-[0-9a-f]{8}")  # names of folders of runs


@dataclass(frozen=True, kw_only=True)
class Hypervisor:
    """What all guests of one process share.

    Attributes:
        folder: of this run, private to the user; gone after it, however it ends.
        cache: the user's cache folder, on a file system with room.
        launcher: spawns and owns every QEMU.
        loop: the thread that listens to them.
        pace: what is known of this host's speed.
    """

    folder: Path
    cache: Path
    launcher: Launcher
    loop: LoopThread
    pace: host.Pace = field(default_factory=host.Pace)

    def own(self, folder: Path) -> None:
        """Have a folder that lies elsewhere removed when this process is killed.

        Whoever has made it removes it otherwise.
        """
        (self.folder / f"owned-{secrets.token_hex(4)}").symlink_to(folder.absolute())

    @classmethod
    @contextmanager
    def running(cls, *, runtime: Path | None, cache: Path) -> Iterator[Hypervisor]:
        """A running launcher and loop; at the end every guest is gone, and so are they.

        Raises:
            ConfigError: one of the folders cannot be used.
        """
        with paths.usable(cache, paths.CACHE):
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        host.raise_descriptor_limit()
        with ExitStack() as stack:
            folder = stack.enter_context(_run_folder(runtime or paths.runtime_dir()))
            launcher = stack.enter_context(Launcher(folder))
            loop = stack.enter_context(LoopThread())
            yield cls(folder=folder, cache=cache, launcher=launcher, loop=loop)


@contextmanager
def _run_folder(root: Path) -> Iterator[Path]:
    """A folder for this run. Those of runs that are gone are removed first."""
    with ExitStack() as stack:
        with paths.usable(root, paths.RUNTIME):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _guarded(root):
                _sweep(root)
                folder = root / f"{os.getpid()}-{secrets.token_hex(4)}"
                folder.mkdir(mode=0o700)
                stack.enter_context(locked(folder / _LOCK, on_busy=lambda: None))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def remove_dead_runs(root: Path) -> list[Path]:
    """Remove the folders of runs that are gone; those that were removed.

    Raises:
        ConfigError: `root` is not private to this user.
    """
    if not root.exists():
        return []
    with paths.usable(root, paths.RUNTIME), _guarded(root):
        return _sweep(root)


@contextmanager
def _guarded(root: Path) -> Iterator[None]:
    """Be the only one who makes or removes folders of runs."""
    status = root.lstat()  # a link that somebody else has put there is none of ours
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    if not private or status.st_uid != os.geteuid():
        raise ConfigError(
            f"{root} is not private to this user",
            remedy=f"remove it, or name another folder in {paths.RUNTIME}",
        )
    with locked(root / _LOCK, on_busy=lambda: None):
        yield


def _sweep(root: Path) -> list[Path]:
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
        with locked(folder / _LOCK, shared=True):
            return False
    except OSError as error:
        return isinstance(error, BlockingIOError)
