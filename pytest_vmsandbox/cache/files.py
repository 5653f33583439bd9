"""What the cache needs from the file system: folders, locks and removal."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_vmsandbox.core.errors import CacheError, TeardownError
from pytest_vmsandbox.core.paths import CACHE

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
}


class NotRegularError(OSError):
    """A file is no regular one.

    Attributes:
        kind: what it is, for people.
    """

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(errno.EINVAL, f"it is not a regular file, but {kind}", str(path))
        self.kind = kind


def open_regular(path: Path, *, follow: bool) -> int:
    """Open a regular file for reading. Nothing else is opened, not even for a moment: a FIFO would wait.

    Args:
        follow: whether it may be a link to one.

    Raises:
        NotRegularError: it is something else.
        OSError: it cannot be opened.
    """
    # O_PATH opens no FIFO and no device. Then the file that was looked at is opened, by descriptor.
    looked = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        kind = stat.S_IFMT(os.fstat(looked).st_mode)
        if kind != stat.S_IFREG:
            raise NotRegularError(path, _KINDS.get(kind, "something else"))
        return os.open(f"/proc/self/fd/{looked}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(looked)


def problem(folder: Path, *, private: bool = False) -> str:
    """Why a folder cannot be used, or made; empty if it can.

    Args:
        private: whether other users must have no access to it.
    """
    if not os.path.lexists(folder):
        parent = next(path for path in folder.absolute().parents if os.path.lexists(path))
        if not parent.is_dir():
            return f"cannot be made, because {parent} is not a folder"
        can_make = os.access(parent, os.W_OK | os.X_OK)
        return "" if can_make else f"cannot be made, because you cannot write to {parent}"
    if not folder.is_dir():
        return "is not a folder"
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if private and status.st_mode & 0o077:
        return "is open to other users"
    return "" if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else "cannot be written"


def private_folder(folder: Path) -> Path:
    """Make `folder` and its missing parents, for this user only (mode 0700).

    Raises:
        CacheError: it cannot be made, or another user owns it.
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
        remedy=f"correct that, or set the environment variable {CACHE} to another folder",
    )


@contextmanager
def locked(
    file: Path, *, shared: bool = False, on_busy: Callable[[], object] | None = None
) -> Iterator[int]:
    """Hold a lock (flock) on a file or a folder, and yield its descriptor.

    A process that inherits the descriptor keeps the lock as long as it lives.

    Args:
        file: is made if it is missing, except for a shared lock.
        shared: whether several processes may hold the lock at a time.
        on_busy: called once before waiting for others; None to not wait.

    Raises:
        BlockingIOError: another process holds the lock, and `on_busy` is None.
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
            # Otherwise it was removed or replaced while we waited: we locked a file without a name.
        finally:
            os.close(descriptor)


def size_on_disk(folder: Path) -> int:
    """Bytes that the files in `folder` take on the disk, without holes."""
    return sum(
        (Path(parent) / name).lstat().st_blocks * 512
        for parent, _, names in os.walk(folder)
        for name in names
    )


def own_size(folders: Iterable[Path]) -> int:
    """Bytes that become free with these folders: of files that are only there, without holes."""
    found: dict[tuple[int, int], list[int]] = {}  # file → bytes, links elsewhere
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                status = (Path(parent) / name).lstat()
                known = found.setdefault(
                    (status.st_dev, status.st_ino), [status.st_blocks * 512, status.st_nlink]
                )
                known[1] -= 1
    return sum(size for size, elsewhere in found.values() if elsewhere == 0)


@contextmanager
def removed_afterwards(folder: Path) -> Iterator[Path]:
    """Remove `folder` at the end, if it is still there.

    Raises:
        TeardownError: it cannot be removed. If the block raised an error, that gets a note instead.
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
    """Remove `folder` and its content, including files of this user's subordinate ids.

    Returns:
        Bytes that were freed.

    Raises:
        TeardownError: something in it cannot be removed.
    """
    size = own_size([folder])
    shutil.rmtree(folder, ignore_errors=True)
    # Files that mmdebstrap unpacks for an ordinary user belong to that user's range in /etc/subuid.
    # Only root in a user namespace can remove these, and files in read-only folders.
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
    """Write `folder` and the files directly in it to the disk (fsync)."""
    for path in (*(path for path in folder.iterdir() if path.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
