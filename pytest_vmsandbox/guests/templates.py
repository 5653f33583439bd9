"""Templates: guests that were sealed while they were quiet, in the user's cache.

A template is a folder: the guest's memory, the state of its devices, what it had written to each
disk, and the key that opens it. Nobody writes to it. It is named by the digest of all that it
depends on, so it is never stale, only unused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.files import (
    locked,
    private_folder,
    remove_tree,
    size_on_disk,
    sync_tree,
)
from pytest_vmsandbox.core.errors import TeardownError
from pytest_vmsandbox.core.spec import GIB

MEMORY, STATE, KEY = "memory", "state", "key"
METADATA, IN_USE = "template.json", "in-use.lock"
SCHEMA = 1
LIMIT = 12 * GIB  # bytes that templates may take on the disk
_INCOMING = ".incoming-"
_GONE = ".gone-"


def layer_name(disk: int, depth: int) -> str:
    """The file with what was written to a disk."""
    return f"disk{disk}.{depth}.qcow2"


@dataclass(frozen=True, kw_only=True)
class Template:
    """A sealed guest.

    Attributes:
        key: what it is called: the digest of all that it depends on.
        folder: where its files lie.
        image: the name of its image.
        name: what the guest was called when it booted.
        layers: for each disk the files with what was written to it, lowest first.
        digests: of each file.
        disk: the digest of the image's disk below them; empty where there is none.
        facts: what whoever sealed it wants to know of it.
    """

    key: str
    folder: Path
    image: str
    name: str
    layers: tuple[tuple[Path, ...], ...]
    digests: dict[str, str]
    disk: str
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def memory(self) -> Path:
        """The guest's memory."""
        return self.folder / MEMORY

    @property
    def private_key(self) -> str:
        """The key that opens it, in OpenSSH's format."""
        return (self.folder / KEY).read_text(encoding="utf-8")

    @property
    def size_on_disk(self) -> int:
        """Bytes that it takes on the disk, holes not counted."""
        return size_on_disk(self.folder)

    def state(self) -> IO[bytes]:
        """The state of its devices, to be read once."""
        return (self.folder / STATE).open("rb", buffering=0)

    def damage(self) -> str:
        """Which file is not as it was when the guest was sealed; empty if all are."""
        if not (self.folder / IN_USE).exists():
            return f"{IN_USE} is missing"
        return integrity.damage(self.folder, self.digests)


class TemplateStore:
    """The templates of one cache folder: ``<cache>/templates/<key[:32]>/``.

    Args:
        cache: the folder.
    """

    def __init__(self, cache: Path) -> None:
        self.root = cache / "templates"

    def find(self, key: str) -> Template | None:
        """The template of that key, if there is one that can be read."""
        return self._read(self.root / key[:32])

    def all(self) -> list[Template]:
        """All templates, the least recently used first."""
        folders = sorted(self.root.glob(f"[!.]*/{METADATA}"), key=_last_use)
        return [found for file in folders if (found := self._read(file.parent)) is not None]

    def folders(self, image: str | None = None) -> list[Path]:
        """Where the templates lie: those of an image, or all, also those that cannot be read."""
        if image is not None:
            return [it.folder for it in self.all() if it.image == image]
        return sorted(it for it in self.root.glob("[!.]*") if it.is_dir())

    @contextmanager
    def hold(self, template: Template) -> Iterator[int]:
        """Keep a template from being removed.

        Yields:
            The descriptor of its lock.

        Raises:
            FileNotFoundError: it was removed before it could be held.
        """
        with locked(template.folder / IN_USE, shared=True, on_busy=lambda: None) as descriptor:
            with suppress(OSError):
                os.utime(template.folder / METADATA)
            yield descriptor

    @contextmanager
    def lock(self, key: str, on_busy: Callable[[], object]) -> Iterator[None]:
        """Be the only one who makes the template of a key.

        Args:
            on_busy: called before waiting for somebody else.

        Raises:
            ImageError: the cache folder cannot be made, or is somebody else's.
        """
        with locked(private_folder(self.root) / f"{key[:32]}.lock", on_busy=on_busy):
            yield

    @contextmanager
    def incoming(self, key: str) -> Iterator[Path]:
        """An empty folder for the files of a template; the lock of the key is held.

        It is gone afterwards, unless `adopt` has made it the template.
        """
        folder = self.root / f"{_INCOMING}{key[:32]}"
        remove_tree(folder)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            remove_tree(folder)

    def adopt(
        self,
        folder: Path,
        key: str,
        *,
        image: str,
        name: str,
        layers: list[list[str]],
        disk: str,
        facts: dict[str, object],
    ) -> Template:
        """Make the files in a folder of `incoming` the template, and make room for it.

        Raises:
            OSError: the disk is full.
        """
        files = sorted(it.name for it in folder.iterdir())
        content: dict[str, object] = {
            "schema": SCHEMA,
            "key": key,
            "image": image,
            "name": name,
            "layers": layers,
            "disk": disk,
            "facts": facts,
            "digests": {file: integrity.file_digest(folder / file) for file in files},
        }
        (folder / IN_USE).touch(mode=0o600)
        kept = integrity.write_record(folder / METADATA, content)
        sync_tree(folder)
        place = self.root / key[:32]
        self.throw_away(place)  # a damaged one
        folder.rename(place)
        self.shrink(keep=place)
        return _template(place, kept)

    def shrink(self, *, keep: Path | None = None, limit: int = LIMIT) -> None:
        """Remove the least recently used templates until they take no more than `limit` bytes."""
        templates = self.all()
        total = sum(it.size_on_disk for it in templates)
        for template in templates:
            if total <= limit:
                return
            if template.folder != keep and (freed := self.remove(template.folder)):
                total -= freed

    def discard(self, folders: Sequence[Path]) -> tuple[int, int, int]:
        """Remove those that nobody uses: how many those are, their bytes, and how many stay."""
        removed = freed = 0
        for folder in folders:
            if size := self.remove(folder):
                removed, freed = removed + 1, freed + size
        return removed, freed, sum(folder.exists() for folder in folders)

    def remove(self, folder: Path) -> int:
        """Remove a template that nobody uses.

        Returns:
            Bytes that are free now; 0 if it is in use, or gone.
        """
        try:
            with locked(folder / IN_USE):
                size = size_on_disk(folder)
                self.throw_away(folder)
        except (FileNotFoundError, BlockingIOError):
            return 0
        return size

    def throw_away(self, folder: Path) -> bool:
        """Remove a template that is damaged, also from under those who use it.

        They go on with what they have open, and find it gone when they want more.

        Returns:
            Whether it was there.
        """
        gone = folder.with_name(f"{_GONE}{folder.name}")
        remove_tree(gone)
        try:
            folder.rename(gone)
        except FileNotFoundError:
            return False
        remove_tree(gone)
        return True

    def throw_away_damaged(self, template: Template) -> bool:
        """Likewise, unless another run has done so, and perhaps made it anew."""
        return self._read(template.folder) == template and self.throw_away(template.folder)

    def is_unreadable(self, key: str) -> bool:
        """Whether there is a folder of that key that does not say what is in it."""
        folder = self.root / key[:32]
        return folder.exists() and _content(folder) is None

    def _read(self, folder: Path) -> Template | None:
        content = _content(folder)
        if content is None or content.get("schema") != SCHEMA:
            return None
        return _template(folder, content)

    def sweep(self) -> int:
        """Remove what others left who were killed; bytes that are free now."""
        freed = 0
        for entry in [*self.root.glob(f"{_INCOMING}*"), *self.root.glob(f"{_GONE}*")]:
            key = entry.name.removeprefix(_INCOMING).removeprefix(_GONE)
            with (
                suppress(BlockingIOError, FileNotFoundError, TeardownError),
                locked(self.root / f"{key}.lock"),
            ):
                size = size_on_disk(entry)
                remove_tree(entry)
                freed += size
        return freed

    def remove_locks(self) -> None:
        """Remove the locks of templates that are not there."""
        for lock in self.root.glob("*.lock"):
            with suppress(BlockingIOError, FileNotFoundError), locked(lock):
                if not (self.root / lock.stem).exists():
                    lock.unlink()  # who waits for it sees that, and makes a new one


def _content(folder: Path) -> dict[str, Any] | None:
    """What stands in the metadata of a template, if that is what was written there."""
    try:
        return integrity.read_record(folder / METADATA)
    except (OSError, ValueError):
        return None


def _template(folder: Path, content: Mapping[str, Any]) -> Template:
    return Template(
        key=content["key"],
        folder=folder,
        image=content["image"],
        name=content["name"],
        layers=tuple(tuple(folder / name for name in names) for names in content["layers"]),
        digests=content["digests"],
        disk=content.get("disk", ""),  # format 1 of blueprints had none
        facts=content["facts"],
    )


def _last_use(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return time.time()
