"""The images that are built: where they lie, whether they are current, who uses them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.files import locked, remove_tree, size_on_disk
from pytest_vmsandbox.catalogue.definition import ImageDefinition, check_name
from pytest_vmsandbox.core.errors import ImageError

KERNEL, INITRD, DISK, HOST_KEY = "vmlinuz", "initrd.img", "disk.raw", "host_key.pub"
METADATA, LOG = "image.json", "build.log"
SCHEMA = 2  # since then, with digests of the files
_WITHOUT_DIGESTS = 1
IN_USE = "in-use.lock"  # guests hold a shared flock on it


class ImageState(StrEnum):
    """What the store has of a definition: it as it is now, only an older one, or nothing."""

    BUILT = "built"
    STALE = "stale"
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    """An image that guests can boot.

    Attributes:
        definition: what it was built from.
        digest: the digest of the definition at that time.
        folder: where its files lie.
    """

    definition: ImageDefinition
    digest: str
    folder: Path

    @property
    def kernel(self) -> Path:
        """The Linux kernel."""
        return self.folder / KERNEL

    @property
    def initrd(self) -> Path:
        """The initial RAM disk."""
        return self.folder / INITRD

    @property
    def disk(self) -> Path | None:
        """The raw root disk, never to be written; None when the image has none."""
        return self.folder / DISK if self.definition.disk_size is not None else None

    @property
    def host_key(self) -> str:
        """The public half of the guest's SSH host key, as in ``known_hosts``: type and key.

        Raises:
            ImageError: the image is gone.
        """
        try:
            return " ".join(self._read(HOST_KEY).split()[:2])
        except OSError as error:
            raise self._gone() from error

    @property
    def size_on_disk(self) -> int:
        """Bytes that it takes on the disk, holes not counted."""
        return size_on_disk(self.folder)

    def verified(self) -> dict[str, str]:
        """The digests of the files that guests need; all of them are read, once per object.

        An image that was built before digests were kept may have changed unnoticed.

        Raises:
            ImageError: one of them cannot be read, or is not as it was when the image was built.
        """
        digests, damage = self._found
        if damage:
            raise damaged(self.definition.name, f"{self.folder / damage}")
        return digests

    @cached_property
    def _found(self) -> tuple[dict[str, str], str]:
        """The digests of the files, and which of them is damaged, if one is."""
        digests: dict[str, str] = {}
        for name in files_of(self.definition):
            try:
                digests[name] = integrity.file_digest(self.folder / name)
            except OSError as error:
                return digests, f"{name} cannot be read: {error.strerror}"
        try:
            built = _metadata(self.folder).get("digests", {})
        except (OSError, ValueError):
            return digests, f"{METADATA} cannot be read"
        changed = [name for name in built if digests.get(name) != built[name]]
        return digests, f"{changed[0]} has changed since it was built" if changed else ""

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the image from being removed.

        Raises:
            ImageError: it was removed before it could be held.
        """
        lock = self.folder / IN_USE
        if not lock.exists():
            with suppress(OSError):  # there is nothing in it that could have been lost
                lock.touch(mode=0o600)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(lock, shared=True, on_busy=lambda: None))
            except FileNotFoundError as error:
                raise self._gone() from error
            yield

    def _read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8", errors="replace")

    def _gone(self) -> ImageError:
        name = self.definition.name
        return ImageError(
            f"the image {name!r} was removed from {self.folder}", remedy=build_command(name)
        )


class ImageStore:
    """The built images of one cache folder: ``<cache>/images/<name>/<digest[:16]>/``.

    Args:
        cache: the folder. It is made when an image is built, not before.

    Attributes:
        root: the folder ``images`` in it.
    """

    def __init__(self, cache: Path) -> None:
        self.root = cache / "images"

    def folder(self, definition: ImageDefinition) -> Path:
        """Where the image of `definition` lies, if it is built.

        Raises:
            ConfigError: a file of the definition cannot be read.
        """
        return self.root / definition.name / definition.digest[:16]

    def failed_log(self, name: str) -> Path:
        """The output of a build that is under way or has failed."""
        return self.root / f"{name}.{LOG}"

    def state(self, definition: ImageDefinition) -> ImageState:
        """Whether the image of `definition` is built.

        Raises:
            ConfigError: a file of the definition cannot be read.
        """
        if (self.folder(definition) / METADATA).is_file():
            return ImageState.BUILT
        return ImageState.STALE if self.folders(definition.name) else ImageState.MISSING

    def require(self, definition: ImageDefinition) -> BuiltImage:
        """The built image of `definition`.

        Raises:
            ImageError: it is not built, or only from an older state of its definition.
            ConfigError: a file of the definition cannot be read.
        """
        name = definition.name
        state, folder = self.state(definition), self.folder(definition)
        if state is not ImageState.BUILT and folder.exists():
            raise damaged(name, f"{folder / METADATA} is missing")
        match state:
            case ImageState.BUILT:
                return BuiltImage(
                    definition=definition,
                    digest=definition.digest,
                    folder=folder,
                )
            case ImageState.STALE:
                raise ImageError(
                    f"the image {name!r} is stale: its definition changed since it was built",
                    details=f"definition: {definition.folder}",
                    remedy=build_command(name),
                )
            case ImageState.MISSING:
                raise ImageError(f"the image {name!r} is not built", remedy=build_command(name))

    def all(self) -> list[BuiltImage]:
        """All images that are built, by name, stale ones and those of other projects included."""
        return [image for name in self._names() for image in self._built(name)]

    def remove(self, image: ImageDefinition | str) -> int:
        """Remove the built image of a definition, or all that are built of a name.

        Returns:
            Bytes that are free now.

        Raises:
            ImageError: guests use it. What nobody uses of that name is removed all the same.
            ConfigError: that is no name, or a file of the definition cannot be read.
            TeardownError: files cannot be removed.
        """
        if isinstance(image, str):
            check_name(image, "remove")
            name, folders = image, self.folders(image)
        else:
            name, folders = image.name, [self.folder(image)]
        freed, used = self.discard(folders)
        if used:
            raise in_use(name, *used)
        return freed

    def _names(self) -> list[str]:
        return sorted(it.name for it in self.root.glob("[!.]*") if it.is_dir())

    def folders(self, name: str) -> list[Path]:
        """The folders of the images that are built of `name`."""
        return sorted(it.parent for it in (self.root / name).glob(f"[!.]*/{METADATA}"))

    def _built(self, name: str) -> Iterator[BuiltImage]:
        for folder in self.folders(name):
            # Removed meanwhile, or written by another version of this package: not for us.
            with suppress(OSError, ValueError, TypeError, KeyError):
                metadata = _metadata(folder)
                values = metadata["definition"]
                for key, kind in (("folder", Path), ("uses", tuple), ("requires", tuple)):
                    values[key] = kind(values[key])
                definition = ImageDefinition(**values)
                yield BuiltImage(definition=definition, digest=metadata["digest"], folder=folder)

    def discard(self, folders: list[Path]) -> tuple[int, list[Path]]:
        """Remove images. Returns the bytes freed, and the folders that are in use."""
        freed, used = 0, []
        for folder in folders:
            try:
                with locked(folder / IN_USE):
                    size = size_on_disk(folder)
                    # Out of the way first: a half-removed image must not look like a built one.
                    gone = tempfile.mkdtemp(prefix=".gone-", dir=folder.parent)
                    folder.rename(gone)
                remove_tree(Path(gone))
                freed += size
            except FileNotFoundError:  # somebody else was faster
                pass
            except BlockingIOError:
                used.append(folder)
        return freed, used


def files_of(definition: ImageDefinition) -> list[str]:
    """The names of the files that guests of an image need."""
    return [KERNEL, INITRD, HOST_KEY, *([DISK] if definition.disk_size is not None else [])]


def _metadata(folder: Path) -> dict[str, Any]:
    """What stands in the metadata of a built image.

    Raises:
        OSError: they cannot be read.
        ValueError: they are damaged.
    """
    content: Any = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    if (
        isinstance(content, dict)
        and content.get("schema") == _WITHOUT_DIGESTS
        and "digests" not in content
    ):
        return content
    return integrity.read_record(folder / METADATA)


def damaged(name: str, what: str) -> ImageError:
    return ImageError(
        f"the image {name!r} is damaged: {what}", remedy=f"{build_command(name)} --force"
    )


def build_command(name: str) -> str:
    return f"vmsandbox images build {name}"


def in_use(name: str, *folders: Path) -> ImageError:
    return ImageError(
        f"the image {name!r} is in use",
        details="\n".join(map(str, folders)),
        remedy="end the test runs, and the vmsandbox commands, that use it",
    )
