"""Keeps things in the user's cache: one process makes a thing, and many use it.

The cache has one store for each kind of thing. A thing is a folder with a key. It holds files and a
record with their digests. Nothing in it depends on the cache's path, its owner or the times of its
files, so you can copy a cache. The folder of a store also has::

    NAME.lock     held by the process that makes something whose key begins with NAME
    .new-NAME     what is being made
    .work-NAME    a link to a temporary folder elsewhere
    .gone-…       what is being removed
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pytest_vmsandbox.cache import files, integrity
from pytest_vmsandbox.core.errors import CacheError
from pytest_vmsandbox.core.paths import CACHE
from pytest_vmsandbox.core.spec import GIB, format_size

IN_USE = "in-use.lock"  # users hold a shared lock on it; its time is the last use
PRIVATE_KEY = "key"  # the only file that QEMU, which may run as another user, does not open
LIMIT = 12 * GIB  # bytes of all that can be made again
_NEW, _WORK, _GONE = ".new-", ".work-", ".gone-"
# Names of older versions: for what is being made, a template, and the record of an environment.
_FORMERLY_NEW, _FORMER_TEMPLATE, _FORMER_RECORD = ".incoming-", "?" * 32, "digests.json"
_WORK_NAME = "vmsandbox-work-"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of thing in the cache.

    Attributes:
        folder: its folder in the cache.
        record: the name of the file with the record.
        schema: of that record; raise it when older records can no longer be used.
        pattern: matches the folders of its things, below the store's folder.
        private: whether only this user may read its files. Files that others link stay as they are.
    """

    folder: str
    record: str
    schema: int
    pattern: str = "[!.]*"
    private: bool = False


IMAGES = Kind(folder="images", record="image.json", schema=2, pattern="[!.]*/[!.]*")
TEMPLATES = Kind(folder="templates", record="template.json", schema=2)
ENVIRONMENTS = Kind(folder="environments", record="environment.json", schema=1)
CLUSTERS = Kind(folder="clusters", record="cluster.json", schema=1)
KERNELS = Kind(folder="kernels", record="kernel.json", schema=1)
HELPERS = Kind(folder="helpers", record="helper.json", schema=1)
EMULATORS = Kind(folder="emulators", record="emulator.json", schema=1)
DOWNLOADS = Kind(folder="downloads", record="download.json", schema=1)
KEPT = Kind(folder="kept", record="kept.json", schema=1, private=True)
RECORDED = Kind(folder="recorded", record="recorded.json", schema=1, private=True)
# An image takes minutes to build: only a command removes it. Nobody can make a kept guest again.
_MADE_ANEW = (TEMPLATES, CLUSTERS, ENVIRONMENTS, KERNELS, HELPERS, EMULATORS)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Something in a store, with its record. The record has the digests of its files by path."""

    folder: Path
    record: Mapping[str, Any] = field(repr=False)

    @property
    def size_on_disk(self) -> int:
        """Bytes that it takes on the disk, without holes."""
        return files.size_on_disk(self.folder)

    def damage(self) -> str:
        """Which file has changed since it was made; empty if none has."""
        if not (self.folder / IN_USE).exists():
            return f"{IN_USE} is missing"
        return integrity.damage(self.folder, self.record["digests"])


class Discarded(NamedTuple):
    """What was removed: how many things, how many bytes, and which are in use and stay."""

    removed: int
    freed: int
    in_use: list[Path]


E = TypeVar("E")


class Store(Generic[E]):
    """All things of one kind.

    Args:
        cache: the user's cache folder. It is made only when something is made in it.
        kind: the kind.
        entry: makes an object from a folder and its record.

    Attributes:
        root: the folder that holds them.
    """

    def __init__(self, cache: Path, kind: Kind, entry: Callable[..., E]) -> None:
        self.root = cache / kind.folder
        self._kind = kind
        self._entry = entry

    def get(self, key: str) -> E | None:
        """The thing with that key, if it is there and can be read."""
        folder = self.root / key
        with suppress(OSError, ValueError, TypeError, KeyError):
            record = integrity.read_record(folder / self._kind.record)
            if record["schema"] == self._kind.schema:
                return self._entry(folder=folder, record=record)
        return None

    def all(self) -> list[E]:
        """All things that can be read, the least recently used first."""
        found = (self.get(os.fspath(folder.relative_to(self.root))) for folder in self.folders())
        return [entry for entry in found if entry is not None]

    def folders(self) -> list[Path]:
        """The folders of all things, readable or not, the least recently used first."""
        folders = (folder for folder in self.root.glob(self._kind.pattern) if folder.is_dir())
        return sorted(folders, key=_last_use)

    def unreadable(self, key: str) -> str:
        """Why `get` does not return something that is there; otherwise empty."""
        there = (self.root / key).exists() and self.get(key) is None
        return f"{self._kind.record} cannot be read" if there else ""

    def make(
        self,
        key: str,
        fill: Callable[[Path, int], Mapping[str, object]],
        *,
        on_busy: Callable[[], object],
        replace: bool = False,
        is_current: Callable[[str], bool] = lambda _: True,
    ) -> E:
        """Make something, unless another process makes it meanwhile.

        Args:
            fill: puts files into an empty folder, and returns the content of the record. Under
                ``digests``, that may have digests of files that are known already. It also
                gets the descriptor of the lock. A child process that inherits it and outlives us
                still holds the lock, so nobody else touches its files.
            on_busy: called before waiting for another process.
            replace: make it even if it is there.
            is_current: whether the thing with that key may stay. Otherwise it is replaced.

        Raises:
            CacheError: the cache cannot be used, the disk is full, or the thing to be replaced is in
                use.
            TeardownError: making it failed, and what was made cannot be removed.
        """
        name = key.partition("/")[0]
        with (
            _told(
                f"{files.private_folder(self.root)} cannot be written",
                remedy=f"make room there, or set the environment variable {CACHE} to another folder",
            ),
            files.locked(self.root / f"{name}.lock", on_busy=on_busy) as lock,
        ):
            place = self.root / key
            if not replace and (found := self.get(key)) is not None:
                if is_current(key):
                    return found
                replace = True
            if replace:
                _check_unused(place)  # before, too: making it can take long
            self._clear(name)
            with files.removed_afterwards(self.root / f"{_NEW}{name}") as folder:
                folder.mkdir(mode=0o700)
                record = self._recorded(folder, fill(folder, lock))
                if replace:
                    _check_unused(place)
                self._throw_away(place)
                place.parent.mkdir(mode=0o700, exist_ok=True)
                folder.rename(place)
            files.sync_tree(place.parent)
            self.shrink(keep=place)
            return self._entry(folder=place, record=record)

    def _recorded(self, folder: Path, content: Mapping[str, object]) -> Mapping[str, Any]:
        """Complete what was made: add its record and its lock, and sync it to the disk."""
        files_in_it = (file for file in folder.rglob("*") if file.is_file())
        names = sorted(os.fspath(file.relative_to(folder)) for file in files_in_it)
        known: Any = content.get("digests", {})
        digests = {name: known.get(name) or integrity.file_digest(folder / name) for name in names}
        (folder / IN_USE).touch(mode=0o600)
        content = {"schema": self._kind.schema, **content, "digests": digests}
        record = integrity.write_record(folder / self._kind.record, content)
        if self._kind.private:
            _let_nobody_read(folder)
        else:
            _let_others_read(folder)
        for sub in sorted({(folder / name).parent for name in names} | {folder}):
            files.sync_tree(sub)
        return record

    @contextmanager
    def work_folder(self, name: str, base: Path) -> Iterator[Path]:
        """An empty folder outside of the cache, for use while something of that name is made.

        Its mode is 0711. If this process is killed, `sweep` removes it.

        Args:
            name: what `make` has locked: the key, up to its first slash. Without that lock, `sweep` of
                another process would remove the folder while it is used.
            base: where to make the folder.

        Raises:
            ValueError: nothing of that name is being made.
            CacheError: it cannot be made.
            TeardownError: it cannot be removed.
        """
        if not (self.root / f"{name}.lock").exists():
            raise ValueError(f"nobody makes {name!r}: a work folder needs the lock of its name")
        link = self.root / f"{_WORK}{name}"
        work = base.absolute() / f"{_WORK_NAME}{secrets.token_hex(4)}"
        link.symlink_to(work)  # first, so that `sweep` always finds the folder
        try:
            with _told(
                f"no temporary folder can be made in {base}",
                remedy="set the environment variable TMPDIR to a folder with room",
            ):
                work.mkdir(mode=0o700)
            with files.removed_afterwards(work):
                work.chmod(0o711)
                yield work
        finally:
            link.unlink()

    @staticmethod
    @contextmanager
    def hold(folder: Path) -> Iterator[int]:
        """Keep something from being removed.

        Yields:
            The descriptor of its lock.

        Raises:
            FileNotFoundError: it was removed before it could be held.
        """
        with files.locked(folder / IN_USE, shared=True, on_busy=lambda: None) as descriptor:
            with suppress(OSError):  # the cache may be read-only
                os.utime(folder / IN_USE)
                if not any((folder / kind.record).exists() for kind in (KEPT, RECORDED)):
                    _let_others_read(folder)  # a copy of the cache may have lost these modes
            yield descriptor

    def discard(self, folders: Iterable[Path]) -> Discarded:
        """Remove those of `folders` that nobody uses.

        Raises:
            TeardownError: files cannot be removed.
        """
        freed, in_use = [], []
        for folder in folders:
            try:
                with files.locked(folder / IN_USE):
                    freed.append(self._throw_away(folder))
            except FileNotFoundError:  # somebody else was faster
                pass
            except OSError:  # in use, or the cache is read-only
                in_use.append(folder)
        return Discarded(len(freed), sum(freed), in_use)

    def throw_away(self, key: str, damaged: E) -> bool:
        """Remove something damaged, even while others use it.

        They go on with the files that they have open, and cannot open further ones.

        Returns:
            Whether it was there. Another process may have removed it and made it again.
        """
        return self.get(key) == damaged and self._throw_away(self.root / key) > 0

    def _throw_away(self, folder: Path) -> int:
        if not folder.exists():
            return 0
        # Rename it first: a half-removed folder must not look like a whole one.
        size = files.own_size([folder])
        try:
            folder.rename(tempfile.mkdtemp(prefix=_GONE, dir=self.root))
        except FileNotFoundError:  # somebody else was faster
            size = 0
        for gone in self.root.glob(f"{_GONE}*"):
            files.remove_tree(gone)
        return size

    def sweep(self) -> int:
        """Remove files that killed processes left behind, and locks that nobody needs.

        Returns:
            Bytes that were freed.

        Raises:
            TeardownError: something cannot be removed.
        """
        freed = sum(map(files.remove_tree, self.root.glob(f"{_GONE}*")))
        locks = {lock.stem for lock in self.root.glob("[!.]*.lock")}
        names = {name for name in locks if not (self.root / name).exists()}
        if self._kind is IMAGES:  # older versions built images beside the finished ones
            names |= {path.parent.name for path in self.root.glob("*/.*")}
        for prefix in (_NEW, _FORMERLY_NEW, _WORK):
            names |= {path.name.removeprefix(prefix) for path in self.root.glob(f"{prefix}*")}
        for name in names:
            lock = self.root / f"{name}.lock"
            # OSError: somebody is making it, or the cache is read-only.
            with suppress(OSError), files.locked(lock):
                freed += self._clear(name)
                with suppress(OSError):
                    (self.root / name).rmdir()  # the folder of an image without any build
                if not (self.root / name).exists():
                    lock.unlink()  # a process that waits for it notices, and makes a new one
        return freed

    def _clear(self, name: str) -> int:
        """Remove what a killed process left while it made something. We hold the lock of that name."""
        link = self.root / f"{_WORK}{name}"
        former = (self.root / f"{_FORMERLY_NEW}{name}", *(self.root / name).glob(".*"))
        freed = sum(map(files.remove_tree, (self.root / f"{_NEW}{name}", *former)))
        with suppress(OSError):
            work = link.readlink()
            status = work.lstat()
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if ours and work.name.startswith(_WORK_NAME):
                freed += files.remove_tree(work)
        link.unlink(missing_ok=True)
        return freed

    def shrink(self, *, keep: Path | None = None, limit: int = LIMIT) -> None:
        """Remove templates and environments until they take at most `limit` bytes together.

        The least recently used go first. What is in use stays. Files that kept guests have, too, do not
        count.

        Args:
            keep: a folder that stays in any case.
        """
        stores = [Store(self.root.parent, kind, Entry) for kind in _MADE_ANEW]
        found = [(folder, store) for store in stores for folder in store.folders()]
        total = sum(files.own_size([folder]) for folder, _ in found)
        for folder, store in sorted(found, key=lambda pair: _last_use(pair[0])):
            if total <= limit:
                return
            if folder != keep:
                total -= store.discard([folder]).freed


def tidy(cache: Path, say: Callable[[str], object]) -> int:
    """Remove files of killed processes from a cache, and files of older versions of this package.

    Built images stay.

    Args:
        say: is told which files of older versions were removed.

    Returns:
        Bytes of killed processes' files that were freed.

    Raises:
        TeardownError: something cannot be removed.
    """
    freed = sum(
        Store(cache, kind, Entry).sweep()
        for kind in (IMAGES, DOWNLOADS, KEPT, RECORDED, *_MADE_ANEW)
    )
    old = [
        Store(cache, TEMPLATES, Entry).discard(
            cache.glob(f"{TEMPLATES.folder}/{_FORMER_TEMPLATE}")
        ),
        Store(cache, ENVIRONMENTS, Entry).discard(
            record.parent for record in cache.glob(f"{ENVIRONMENTS.folder}/*/{_FORMER_RECORD}")
        ),
    ]
    if any(discarded.removed for discarded in old):
        size = format_size(sum(discarded.freed for discarded in old))
        say(
            f"removed {size} of templates and environments of an older version. New ones are made "
            "when they are needed"
        )
    return freed


@contextmanager
def _told(brief: str, *, remedy: str) -> Iterator[None]:
    """Turn an OSError into a `CacheError`."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{brief}: {error.strerror or error}", remedy=remedy) from error


def _let_others_read(folder: Path) -> None:
    """Let a QEMU that runs as another user read the files, whatever the umask was."""
    for file in folder.iterdir():
        mode = stat.S_IMODE(file.lstat().st_mode)
        if file.is_file() and file.name not in (IN_USE, PRIVATE_KEY) and mode & 0o444 != 0o444:
            file.chmod(mode | 0o644)


def _let_nobody_read(folder: Path) -> None:
    """Let only this user read the files, unless they are links to files that others have, too."""
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            path.chmod(0o700)
        elif stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            path.chmod(0o600)


def _check_unused(folder: Path) -> None:
    try:
        with suppress(FileNotFoundError), files.locked(folder / IN_USE):
            pass
    except BlockingIOError as error:
        remedy = "end the test runs and the vmsandbox commands that use it, then try again"
        raise CacheError(f"{folder} is in use", remedy=remedy) from error


def _last_use(folder: Path) -> float:
    try:
        return (folder / IN_USE).stat().st_mtime
    except OSError:
        return 0.0
