"""Folders, locks and removal: what the cache needs of the file system."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_vmsandbox.core.errors import CacheError, TeardownError
from pytest_vmsandbox.core.paths import CACHE


def problem(folder: Path, *, private: bool = False) -> str:
    """Why a folder cannot be used, or made; empty if it can.

    Args:
        private: other users must have no access to it.
    """
    if not os.path.lexists(folder):
        parent = next(path for path in folder.absolute().parents if os.path.lexists(path))
        if not parent.is_dir():
            return f"cannot be made, since {parent} is not a folder"
        return "" if os.access(parent, os.W_OK | os.X_OK) else f"cannot be made in {parent}"
    if not folder.is_dir():
        return "is not a folder"
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if private and status.st_mode & 0o077:
        return "is open to other users"
    return "" if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else "cannot be written"


def private_folder(folder: Path) -> Path:
    """Make `folder`, and those above it that are missing, for this user alone (mode 0700).

    Raises:
        CacheError: it cannot be made, or it belongs to somebody else.
    """
    if why := problem(folder):
        raise unusable(folder, why)
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise unusable(folder, f"cannot be made: {error.strerror}") from error
    return folder


def unusable(folder: Path, why: str) -> CacheError:
    """The error for a folder of the cache that cannot be used."""
    return CacheError(
        f"the cache cannot be used: {folder} {why}",
        remedy=f"change that, or name another folder in {CACHE}",
    )


@contextmanager
def locked(
    file: Path, *, shared: bool = False, on_busy: Callable[[], object] | None = None
) -> Iterator[int]:
    """Hold a lock on `file`, or a folder (flock), and hand out its descriptor.

    A process that inherits the descriptor keeps the lock as long as it lives.

    Args:
        file: made where it is missing, unless the lock is a shared one.
        shared: several may hold it at a time.
        on_busy: called once before waiting for others; None to not wait.

    Raises:
        BlockingIOError: others hold it, and `on_busy` is None.
        FileNotFoundError: the file (for a shared lock) or its folder does not exist.
    """
    import fcntl  # Windows has none, and this module can be imported there

    flags = os.O_RDONLY if shared or file.is_dir() else os.O_RDWR | os.O_CREAT
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        descriptor = os.open(file, flags | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_busy is None:
                    raise
                on_busy()
                fcntl.flock(descriptor, kind)
            try:
                current = os.path.samestat(os.fstat(descriptor), file.stat())
            except FileNotFoundError:
                current = False
            if current:
                yield descriptor
                return
            # Else it was removed or replaced while we waited: what we locked is nobody's.
        finally:
            os.close(descriptor)


def size_on_disk(folder: Path) -> int:
    """Bytes that the files in `folder` take on the disk, holes not counted."""
    return sum(
        (Path(parent) / name).lstat().st_blocks * 512
        for parent, _, names in os.walk(folder)
        for name in names
    )


@contextmanager
def removed_afterwards(folder: Path) -> Iterator[Path]:
    """Remove `folder` at the end, if it is still there.

    Raises:
        TeardownError: it cannot be removed. An error of the caller's gets that as a note instead.
    """
    try:
        yield folder
    except BaseException as error:
        try:
            remove_tree(folder)
        except TeardownError as left:
            error.add_note(str(left))
        raise
    remove_tree(folder)


def remove_tree(folder: Path) -> int:
    """Remove `folder` and all in it, also what belongs to this user's subordinate users.

    Returns:
        Bytes that are free now.

    Raises:
        TeardownError: something of it cannot be removed.
    """
    size = size_on_disk(folder)
    shutil.rmtree(folder, ignore_errors=True)
    # What mmdebstrap unpacks for an ordinary user belongs to that user's range in /etc/subuid.
    # Only root of a user namespace may remove it, as well as what is in read-only folders.
    for mapping in (["--map-root-user", "--map-auto"], ["--map-root-user"]):
        if not os.path.lexists(folder):
            return size
        with suppress(FileNotFoundError):
            subprocess.run(
                ["unshare", "--user", *mapping, "--", "rm", "-rf", "--", os.fspath(folder)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
    if os.path.lexists(folder):
        raise TeardownError(f"{folder} cannot be removed", remedy=f"sudo rm -rf {folder}")
    return size


def sync_tree(folder: Path) -> None:
    """Bring `folder` and the files directly in it to the disk."""
    for path in (*(path for path in folder.iterdir() if path.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
