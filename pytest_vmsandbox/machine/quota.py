"""What the guests of all runs of a user may take of this host together.

Every run writes what it claims into its own folder; the claims of a run that is gone count no more,
however it went, since its folder's lock is free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.orphans import is_alive

_SHARE = 0.7  # of the host's memory, up to which guests are kept that nobody has asked for yet
_CLAIM, _LOCK, _SLOT = "memory", ".quota", ".arming"


class Quota:
    """This run's claims, beside those of others.

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
            spare: only if there is enough for all; else whether or not.

        Returns:
            Whether they are claimed.
        """
        with self._locked(_LOCK):
            if spare and self._all() + size > _SHARE * host.total_memory():
                return False
            self._write(size)
        return True

    def release(self, size: int) -> None:
        """Give up what was claimed."""
        with self._locked(_LOCK):
            self._write(-size)

    @contextmanager
    def processor(self) -> Iterator[None]:
        """Wait for one of the host's processors, for what nobody waits for."""
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
