"""The built images: where they are, whether they are current, and who uses them."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.files import problem, size_on_disk, unusable
from pytest_vmsandbox.cache.store import IMAGES, IN_USE, PRIVATE_KEY, Store
from pytest_vmsandbox.catalogue import variants
from pytest_vmsandbox.catalogue.catalogue import Catalogue, standard_folders
from pytest_vmsandbox.catalogue.definition import ImageDefinition, check_name
from pytest_vmsandbox.catalogue.origin import ADOPTED
from pytest_vmsandbox.core.architecture import debian_name, native_architecture
from pytest_vmsandbox.core.errors import ConfigError, ImageError
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.core.text import one_line

KERNEL, INITRD, DISK, HOST_KEY = "vmlinuz", "initrd.img", "disk.raw", "host_key.pub"
PACKAGES = "packages.txt"  # a line for each package, with its version
ARCHIVE = "archive.txt"  # a line for each suite that they came from: URL, name, date, keys
NOTES = "notes.txt"  # what people should know of this build: a line for each
LOG = "build.log"
_WITHOUT_DIGESTS = 1  # the schema of images that were built before digests were kept


class ImageState(StrEnum):
    """What the store has for a definition: the current build, only an older one, or nothing."""

    BUILT = "built"
    STALE = "stale"
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """One image, for people and programs.

    Attributes:
        name: of the image.
        state: an `ImageState`: ``built``, ``stale`` (built from an older definition) or ``missing``;
            ``other`` for a build without a definition here; or ``invalid`` if its definition is wrong.
        size_bytes: on the disk, of all builds with that name.
        architecture: such as ``x86_64``. This and what follows is empty if the definition is wrong.
        debian_architecture: the same as names of images have it, such as ``amd64``.
        description: one line.
        system: such as ``debian``, if the definition says so.
        version: of the system, likewise.
        origin: what makes it: ``recipe``, ``from`` or ``source``.
        base: the image that it derives from.
        firmware: what boots it: ``kernel``, ``uefi`` or ``bios``.
        in_vm: whether tests can run inside. Otherwise it is host-driven.
        problem: what is wrong with its definition, and the remedy.
        notes: what its recipe has noted about the build, such as missing updates.
    """

    name: str
    state: str
    size_bytes: int
    architecture: str = ""
    debian_architecture: str = ""
    description: str = ""
    system: str = ""
    version: str = ""
    origin: str = ""
    base: str = ""
    firmware: str = ""
    in_vm: bool = False
    problem: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    """An image that guests can boot.

    Attributes:
        definition: what it was built from.
        digest: the digest of the definition at that time.
        folder: holds its files.
    """

    definition: ImageDefinition
    digest: str
    folder: Path

    @property
    def kernel(self) -> Path | None:
        """The Linux kernel; None for an image that a firmware boots."""
        return self._path(KERNEL)

    @property
    def initrd(self) -> Path | None:
        """The initial RAM disk; None for an image without one."""
        return self._path(INITRD)

    @property
    def disk(self) -> Path | None:
        """The raw root disk, which is never written; None for an image without one."""
        return self._path(DISK)

    @property
    def key(self) -> Path | None:
        """The private SSH key of an image that does not take ours at each boot; None for others."""
        return self._path(PRIVATE_KEY)

    def _path(self, name: str) -> Path | None:
        return self.folder / name if name in files_of(self.definition) else None

    @property
    def host_key(self) -> str:
        """The public SSH host key of the guest, as in ``known_hosts``: type and key.

        Raises:
            ImageError: the image is gone.
        """
        try:
            text = (self.folder / HOST_KEY).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise self._gone() from error
        return " ".join(text.split()[:2])

    @property
    def notes(self) -> tuple[str, ...]:
        """What its recipe has noted about this build for people: lines."""
        return _notes(self.folder)

    @property
    def size_on_disk(self) -> int:
        """Bytes that it takes on the disk, without holes."""
        return size_on_disk(self.folder)

    @property
    def build_id(self) -> str:
        """Identifies a build. It differs between builds of one definition, not between copies.

        Raises:
            ImageError: the image is damaged.
        """
        try:  # the record has the time of the build and the digests of its files
            return hashlib.sha256((self.folder / IMAGES.record).read_bytes()).hexdigest()
        except OSError as error:
            raise self._damaged(f"{IMAGES.record} cannot be read: {error.strerror}") from error

    def record(self) -> dict[str, Any]:
        """What was noted when it was built.

        Raises:
            ImageError: the image is damaged.
        """
        try:
            return _record(self.folder)
        except (OSError, ValueError) as error:
            raise self._damaged(f"{IMAGES.record} cannot be read: {error}") from error

    def as_base(self) -> dict[str, str]:
        """What the record of a derived image has of this one.

        Raises:
            ImageError: the image is damaged.
        """
        key = f"{self.folder.parent.name}/{self.folder.name}"
        return {"key": key, "build": self.build_id}

    def verified(self) -> dict[str, str]:
        """Check the files that guests need, and return their digests. They are read once per object.

        Changes of an image that was built before digests were kept go unnoticed.

        Raises:
            ImageError: a file cannot be read, or has changed since the image was built.
        """
        return self._digests

    @cached_property
    def _digests(self) -> dict[str, str]:
        digests: dict[str, str] = {}
        name = ""
        try:
            for name in files_of(self.definition):
                digests[name] = integrity.file_digest(self.folder / name)
            name = IMAGES.record
            built = _record(self.folder).get("digests", digests)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise self._damaged(f"{name} cannot be read: {why}") from error
        for name, digest in digests.items():
            if digest != built.get(name):
                raise self._damaged(f"{name} has changed since it was built")
        return digests

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the image from being removed.

        Raises:
            ImageError: it was removed before it could be held.
        """
        with suppress(OSError):  # the file is empty: a copy of the cache may lack it
            (self.folder / IN_USE).touch(mode=0o600)
        with ExitStack() as stack:
            try:
                stack.enter_context(Store.hold(self.folder))
            except FileNotFoundError as error:
                raise self._gone() from error
            yield

    def _damaged(self, what: str) -> ImageError:
        return damaged(self.definition, f"{self.folder}/{what}")

    def _gone(self) -> ImageError:
        return ImageError(
            f"the image {self.definition.name!r} was removed from {self.folder}",
            remedy=build_command(self.definition),
        )


class ImageStore(Store[BuiltImage]):
    """The built images of one cache folder: ``<cache>/images/<name>/<digest[:16]>/``."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache, IMAGES, _built)

    def get(self, key: str) -> BuiltImage | None:
        """The image of that key, if it is there and can be read."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            return image_in(self.root / key)
        return None

    def key(self, definition: ImageDefinition) -> str:
        """The key of the image of `definition` in this store.

        Raises:
            ConfigError: a file of the definition cannot be read.
        """
        return f"{definition.name}/{definition.digest[:16]}"

    def failed_log(self, name: str) -> Path:
        """The file with the output of a build that is running or has failed."""
        return self.root / f"{name}.{LOG}"

    def state(self, definition: ImageDefinition) -> ImageState:
        """Whether the image of `definition` is built.

        Raises:
            ConfigError: a file of the definition cannot be read.
        """
        key = self.key(definition)
        if (self.root / key / IMAGES.record).is_file() and (
            not definition.base or self.is_current(key)
        ):
            return ImageState.BUILT
        older = self.folders_of(definition.name, definition.architecture)
        return ImageState.STALE if older else ImageState.MISSING

    def is_current(self, key: str) -> bool:
        """Whether no base of an image was built again since the image was made.

        A base that was removed does not matter.
        """
        with suppress(OSError, ValueError):  # it is damaged, which others find out
            base = _record(self.root / key).get("base")
            if base is not None:
                found = (self.root / base["key"] / IMAGES.record).read_bytes()
                is_same = hashlib.sha256(found).hexdigest() == base["build"]
                return is_same and self.is_current(base["key"])
        return True

    def require(self, definition: ImageDefinition) -> BuiltImage:
        """The built image of `definition`.

        Raises:
            ImageError: it is not built, or was built from an older definition.
            CacheError: it is not built, and the cache cannot be used.
            ConfigError: a file of the definition cannot be read.
        """
        name = definition.name
        state, folder = self.state(definition), self.root / self.key(definition)
        if state is ImageState.BUILT:
            return BuiltImage(definition=definition, digest=definition.digest, folder=folder)
        if (folder / IMAGES.record).is_file():
            raise ImageError(
                f"the image {name!r} is stale: its base {definition.base!r} was built again since",
                remedy=build_command(definition),
            )
        if folder.exists():
            raise damaged(definition, f"{folder / IMAGES.record} is missing")
        if state is ImageState.STALE:
            raise ImageError(
                f"the image {name!r} is stale: its definition changed since it was built",
                details=f"definition: {definition.folder}",
                remedy=build_command(definition),
            )
        for used in (self.root.parent, self.root):
            if why := problem(used):
                raise unusable(used, why)
        raise ImageError(f"the image {name!r} is not built", remedy=build_command(definition))

    def remove(self, name: str) -> int:
        """Remove all builds of an image.

        Returns:
            Bytes that were freed.

        Raises:
            ImageError: guests use a build. The unused builds are removed nevertheless.
            ConfigError: `name` is no name of an image.
            TeardownError: files cannot be removed.
        """
        check_name(name, "remove")
        discarded = self.discard(self.folders_of(name))
        with suppress(OSError):  # a failed build may have left it
            self.failed_log(name).unlink()
        with suppress(OSError):  # not empty, or never made
            (self.root / name).rmdir()
        if discarded.in_use:
            raise ImageError(
                f"the image {name!r} is in use",
                details="\n".join(map(str, discarded.in_use)),
                remedy="end the test runs and the vmsandbox commands that use it, then try again",
            )
        return discarded.freed

    def folders_of(self, name: str, architecture: str = "") -> list[Path]:
        """The folders of all builds of an image.

        Args:
            name: of the image.
            architecture: only builds for it, and those of which nobody knows; empty for all. Machines of
                different architectures may share a cache, and give one name to different images.
        """
        found = [record.parent for record in self.root.glob(f"{name}/[!.]*/{IMAGES.record}")]
        if not architecture:
            return found
        return [folder for folder in found if _architecture(folder) in {architecture, ""}]

    def entries(
        self,
        catalogue: Catalogue,
        patterns: Sequence[str] | None = None,
        *,
        foreign: bool = False,
        also: Iterable[str] = (),
    ) -> list[ImageEntry]:
        """Images of a catalogue in its order, then builds without a definition.

        Args:
            catalogue: has the definitions.
            patterns: names and globs, as `Catalogue.select` takes them; none of them for the images of this
                machine's architecture and all others that are built. None for all images.
            foreign: whether such globs are for every architecture.
            also: names of further images.

        Raises:
            ConfigError: a folder of the catalogue cannot be read, or a pattern fits nothing.
        """
        sizes: dict[str, int] = {}
        built: dict[str, ImageDefinition] = {}
        for image in sorted(self.all(), key=lambda image: image.folder):
            name = image.definition.name
            sizes[name] = sizes.get(name, 0) + image.size_on_disk
            built.setdefault(name, image.definition)
        names = catalogue.names()
        others = {name: image for name, image in built.items() if name not in names}
        if patterns:
            chosen = catalogue.fitting(patterns) if foreign else {*catalogue.select(patterns)}
            others = {}
        elif patterns is not None:
            chosen = {*catalogue.native(), *built, *also}
        else:
            chosen = {*names}
        found = []
        for name in (name for name in names if name in chosen):
            size = sizes.get(name, 0)
            try:
                definition = catalogue.get(name)
                notes = _notes(self.root / self.key(definition))
                found.append(_entry(definition, self.state(definition), size, notes))
            except ConfigError as error:
                found.append(
                    ImageEntry(name=name, state="invalid", size_bytes=size, problem=str(error))
                )
        return [*found, *(_entry(image, "other", sizes[name]) for name, image in others.items())]


def columns(images: Sequence[ImageEntry], width: int = 0) -> list[tuple[str, str, str, str]]:
    """Name, state, size and description of each image, padded to columns.

    Args:
        width: of the names, at least.
    """
    width = max((width, *(len(image.name) for image in images)))
    return [
        (
            f"{image.name:{width}}",
            f"{image.state:7}",
            f"{format_size(image.size_bytes) if image.size_bytes else '-':>9}",
            _about(image),
        )
        for image in images
    ]


def left_out(
    catalogue: Catalogue, listed: Sequence[ImageEntry], patterns: Sequence[str] = ()
) -> str:
    """A line about the images of a catalogue that a list leaves out; empty if it has all.

    Args:
        patterns: what was asked for, as `ImageStore.entries` takes it.
    """
    all_ = catalogue.fitting(patterns) if patterns else {*catalogue.names()}
    number = len(all_ - {image.name for image in listed})
    if not number:
        return ""
    images = "image is" if number == 1 else "images are"
    return (
        f"{number} more {images} for other architectures: vmsandbox images list --all, or a glob such as "
        f"'*{variants.SIGN}arm64'"
    )


def _about(image: ImageEntry) -> str:
    if image.problem:
        return "its definition is wrong"
    is_foreign = image.architecture != native_architecture()
    about = (
        f"{image.description}, for {image.debian_architecture}" if is_foreign else image.description
    )
    about = about if image.in_vm else f"{about} (host-driven)"
    return "; ".join((about, *image.notes))


def _notes(folder: Path) -> tuple[str, ...]:
    """The notes beside a build; none if there is no such file."""
    try:
        text = (folder / NOTES).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(line for line in map(one_line, text.splitlines()) if line)


def _entry(
    definition: ImageDefinition, state: str, size: int, notes: tuple[str, ...] = ()
) -> ImageEntry:
    return ImageEntry(
        name=definition.name,
        state=str(state),
        size_bytes=size,
        architecture=definition.architecture,
        debian_architecture=debian_name(definition.architecture),
        description=definition.description,
        system=definition.system,
        version=definition.version,
        origin=definition.origin,
        base=definition.base,
        firmware=definition.firmware,
        in_vm=definition.in_vm,
        notes=notes,
    )


def files_of(definition: ImageDefinition) -> list[str]:
    """The names of the files that guests of an image need."""
    direct, method = definition.firmware == "kernel", definition.login.method
    needed = {
        KERNEL: direct,
        INITRD: direct and definition.has_initrd,
        HOST_KEY: method != "none",
        DISK: definition.disk_size is not None,
        PRIVATE_KEY: method in ADOPTED,
    }
    return [name for name, is_needed in needed.items() if is_needed]


def image_in(folder: Path) -> BuiltImage:
    """The image whose files are in a folder, wherever that is.

    Raises:
        OSError: its record cannot be read.
        ValueError, TypeError, KeyError: its record is damaged.
    """
    return _built(folder=folder, record=_record(folder))


def _built(*, folder: Path, record: Mapping[str, Any]) -> BuiltImage:
    definition = ImageDefinition.from_record(record["definition"])
    return BuiltImage(definition=definition, digest=record["digest"], folder=folder)


def _architecture(folder: Path) -> str:
    """The architecture of a built image; empty if its record cannot be read."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return str(_record(folder)["definition"]["architecture"])
    return ""


def _record(folder: Path) -> dict[str, Any]:
    """The record of a built image.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    content: Any = json.loads((folder / IMAGES.record).read_text(encoding="utf-8"))
    is_old = isinstance(content, dict) and content.get("schema") == _WITHOUT_DIGESTS
    if is_old and "digests" not in content:
        return dict(content)
    return integrity.read_record(folder / IMAGES.record)


class DamagedImageError(ImageError):
    """The files of an image have changed since it was built. Such an image is not just missing."""


def damaged(definition: ImageDefinition, what: str) -> DamagedImageError:
    """The error for an image whose files have changed since it was built."""
    return DamagedImageError(
        f"the image {definition.name!r} is damaged: {what}",
        remedy=f"{build_command(definition)} --force",
    )


def build_command(definition: ImageDefinition) -> str:
    """The command that builds an image, with the folder of its definition if it needs to be named."""
    command = f"vmsandbox images build {definition.name}"
    folder = definition.folder.parent
    if folder in standard_folders():
        return command
    with suppress(ValueError, OSError):  # OSError: the working folder is gone
        folder = folder.relative_to(Path.cwd())
    return f"{command} --image-path={shlex.quote(os.fspath(folder))}"
