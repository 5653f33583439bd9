"""What the guests of all runs of a user may take of this host together.

Each run writes its claims to its own folder. If a run is gone, nobody holds the lock of its folder, so
its claims do not count any more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.orphans import is_alive

_SHARE = 0.7  # of the host's memory; beyond this, no clones are made ahead of demand
_CLAIM, _LOCK, _SLOT = "memory", ".quota", ".arming"


class Quota:
    """This run's claims, among those of other runs.

    Args:
        folder: of this run.
    """

    def __init__(self, folder: Path) -> None:
        self._root = folder.parent
        self._file = folder / _CLAIM
        self._claimed = 0

    def claim(self, size: int, *, spare: bool) -> bool:
        """Claim `size` bytes of memory.

        Args:
            spare: whether to claim only if there is enough for all. If not, claim in any case.

        Returns:
            Whether the memory is claimed.
        """
        with self._locked(_LOCK):
            if spare and self._all() + size > _SHARE * host.total_memory():
                return False
            self._write(size)
        return True

    def require(self, size: int, *, spare: bool) -> None:
        """Claim memory for a clone, as `claim` does.

        Raises:
            LaunchError: there is not enough.
        """
        if not self.claim(size, spare=spare):
            raise LaunchError(
                "there is no memory left for another clone",
                remedy="stop other programs on this machine, or use fewer guests at a time",
            )

    def release(self, size: int) -> None:
        """Release claimed memory."""
        with self._locked(_LOCK):
            self._write(-size)

    @contextmanager
    def processor(self) -> Iterator[None]:
        """Wait for one of the host's CPUs, for work that nobody waits for."""
        count = os.cpu_count() or 1
        with ExitStack() as stack:
            for number in range(count):
                with suppress(BlockingIOError):
                    stack.enter_context(self._locked(f"{_SLOT}.{number}", wait=False))
                    break
            else:
                stack.enter_context(self._locked(f"{_SLOT}.{os.getpid() % count}"))
            yield

    def _all(self) -> int:
        total = 0
        for file in self._root.glob(f"*/{_CLAIM}"):
            if file == self._file or is_alive(file.parent):
                with suppress(OSError, ValueError):
                    total += int(file.read_text(encoding="utf-8"))
        return total

    def _write(self, size: int) -> None:
        self._claimed += size
        self._file.write_text(str(self._claimed), encoding="utf-8")

    def _locked(self, name: str, *, wait: bool = True) -> AbstractContextManager[int]:
        return locked(self._root / name, on_busy=(lambda: None) if wait else None)
