"""Where environments for guests are kept: each in a folder of the cache that is named by its digest."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.files import (
    locked,
    private_folder,
    remove_tree,
    size_on_disk,
    sync_tree,
)
from pytest_vmsandbox.core import deadline
from pytest_vmsandbox.core.errors import ImageError, TransferError

# Written by whoever makes an environment; its time is that of the last use.
RESOLVED = "requirements.txt"
_DIGESTS = "digests.json"  # of all files, as they were made
_NEW = ".new-"
_KEEP_SECONDS = 30 * 86_400.0


class EnvironmentsStore:
    """The environments in a cache.

    Args:
        cache: the user's cache.
    """

    def __init__(self, cache: Path) -> None:
        self._parent = cache / "environments"

    def obtain(
        self,
        digest: str,
        make: Callable[[Path, int], object],
        *,
        on_busy: Callable[[], object],
        on_damage: Callable[[str], object],
    ) -> Path:
        """The folder of an environment; it is made if it is not there, or damaged.

        Args:
            digest: names it.
            make: fills an empty folder. It also gets the descriptor of a lock: a process that
                inherits it and outlives us keeps others from touching what it writes.
            on_busy: called before waiting for another run.
            on_damage: called with the reason before a damaged one is made again.

        Raises:
            TransferError: the cache cannot take it.
            TeardownError: an unfinished one cannot be removed.
        """
        folder = self._parent / digest
        if not _fault(folder):
            return folder
        try:
            with self._locked(on_busy) as lock:
                if fault := _fault(folder):
                    if folder.exists():
                        on_damage(fault)
                        (folder / RESOLVED).unlink(missing_ok=True)
                    self._remove_unused(deadline.wall() - _KEEP_SECONDS)
                    self._make(folder, make, lock)
        except OSError as error:
            raise TransferError(
                f"the packages for the guest could not be prepared: {error}",
                remedy="free some room in the cache, or set VMSANDBOX_CACHE to another folder",
            ) from error
        return folder

    def sweep(self) -> int:
        """Remove what killed runs left unfinished; returns how many bytes that has freed.

        Raises:
            TeardownError: something of it cannot be removed.
        """
        with suppress(BlockingIOError, FileNotFoundError), locked(self._parent / "lock"):
            return self._remove_unused(-math.inf)
        return 0

    @contextmanager
    def _locked(self, on_busy: Callable[[], object]) -> Iterator[int]:
        try:
            private_folder(self._parent)
        except ImageError as error:
            raise TransferError(
                "there is no place for the guest's packages",
                details=str(error.__cause__ or error.brief),
                remedy=error.remedy,
            ) from error
        with locked(self._parent / "lock", on_busy=on_busy) as descriptor:
            yield descriptor

    def _make(self, folder: Path, make: Callable[[Path, int], object], lock: int) -> None:
        work = Path(tempfile.mkdtemp(prefix=_NEW, dir=self._parent))
        try:
            make(work, lock)
            files = [path for path in work.rglob("*") if path.is_file()]
            digests = {str(path.relative_to(work)): integrity.file_digest(path) for path in files}
            integrity.write_record(work / _DIGESTS, {"files": digests})
            sync_tree(work)
            work.rename(folder)
            sync_tree(self._parent)
        finally:
            remove_tree(work)

    def _remove_unused(self, since: float) -> int:
        """Remove what is unfinished, and what was not used `since`; returns the bytes freed."""
        freed = 0
        for entry in self._parent.iterdir():
            mark = entry / RESOLVED
            if entry.is_dir() and not (mark.exists() and mark.stat().st_mtime > since):
                size = size_on_disk(entry)
                mark.unlink(missing_ok=True)
                remove_tree(entry)
                freed += size
        return freed


def _fault(folder: Path) -> str:
    """Why an environment cannot be used; empty if it can, and then its use is noted."""
    try:
        digests = integrity.read_record(folder / _DIGESTS)["files"]
    except OSError as error:
        return f"{_DIGESTS}: {error.strerror}"
    except ValueError as error:
        return str(error)
    fault = integrity.damage(folder, digests)
    with suppress(OSError):  # the cache may be read-only
        os.utime(folder / RESOLVED)
    return fault
