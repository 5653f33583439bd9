"""Owns everything that one process needs to run guests."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.loop import LoopThread
from pytest_vmsandbox.machine.orphans import LOCK, guarded, sweep
from pytest_vmsandbox.machine.process import Launcher
from pytest_vmsandbox.machine.switch.switch import Switch


@dataclass(frozen=True, kw_only=True)
class Hypervisor:
    """What all guests of one process share.

    Attributes:
        folder: of this run, private to the user. It is removed after the run, however that ends.
        cache: the user's cache folder, on a file system with room.
        launcher: starts and owns every QEMU.
        loop: the thread that reads from them.
        switch: joins their network cards. It starts with the first network.
        pace: what we know about this host's speed.
    """

    folder: Path
    cache: Path
    launcher: Launcher
    loop: LoopThread
    switch: Switch
    pace: host.Pace = field(default_factory=host.Pace)

    def own(self, folder: Path) -> None:
        """Have a folder elsewhere removed if this process is killed. Otherwise its maker removes it."""
        (self.folder / f"owned-{secrets.token_hex(4)}").symlink_to(folder.absolute())

    @contextmanager
    def scratch(self, purpose: str) -> Iterator[Path]:
        """A folder in the cache, for this user. It is removed at the end, or if this process is killed."""
        token = secrets.token_hex(4)
        link, folder = self.folder / f"owned-{token}", self.cache / f"{purpose}-{token}"
        link.symlink_to(folder.absolute())
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            link.unlink(missing_ok=True)

    @classmethod
    @contextmanager
    def running(cls, *, runtime: Path | None, cache: Path) -> Iterator[Hypervisor]:
        """A running launcher and loop. At the end they are gone, and so are all guests.

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
            switch = stack.enter_context(Switch(launcher))
            yield cls(folder=folder, cache=cache, launcher=launcher, loop=loop, switch=switch)


@contextmanager
def _run_folder(root: Path) -> Iterator[Path]:
    """A folder for this run. Those of runs that are gone are removed first."""
    with ExitStack() as stack:
        with paths.usable(root, paths.RUNTIME):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            with guarded(root):
                sweep(root)
                folder = root / f"{os.getpid()}-{secrets.token_hex(4)}"
                folder.mkdir(mode=0o700)
                stack.enter_context(locked(folder / LOCK, on_busy=lambda: None))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder
