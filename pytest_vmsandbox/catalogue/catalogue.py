"""The definitions of all images: our own, and those in folders that the user names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pytest_vmsandbox.catalogue import unknown, variants
from pytest_vmsandbox.catalogue.definition import (
    DEFINITION_FILE,
    NAME,
    ImageDefinition,
    check_name,
)
from pytest_vmsandbox.catalogue.own import own_folders
from pytest_vmsandbox.catalogue.tables import load
from pytest_vmsandbox.catalogue.unknown import Known
from pytest_vmsandbox.catalogue.variants import ALL, SIGN
from pytest_vmsandbox.core.architecture import ARCHITECTURES, debian_name, native_architecture
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.paths import cache_dir, imported_dir

_DEPTH = 20  # images that derive from each other


class _Place(NamedTuple):
    """Where the definition of an image is.

    Attributes:
        folder: it can define several images.
        architecture: of this one; empty if the definition is wrong.
    """

    folder: Path
    architecture: str


class Catalogue:
    """The definitions of all images. Folders are listed and definitions are read on demand.

    An image has one name, and perhaps a longer spelling of it: with its architecture. On a machine that
    is amd64, ``debian-13_amd64`` is ``debian-13``.

    Args:
        image_path: folders with further images, each a folder with an ``image.toml``.
        cache: the cache, which has the imported images; None for the user's cache.
    """

    def __init__(self, image_path: Sequence[Path] = (), cache: Path | None = None) -> None:
        self._image_path = tuple(image_path)
        self._cache = cache
        self._definitions: dict[str, ImageDefinition] = {}
        self._deriving: list[str] = []  # whose base is being read
        self._fits: dict[str, frozenset[str]] = {}  # names, by pattern

    def names(self) -> list[str]:
        """The names of all images: our own, imported ones, then folder by folder, sorted in each.

        An imported image is left out if one of the folders has an image with its name.

        Raises:
            ConfigError: a folder does not exist, or a name is invalid or used twice.
        """
        return list(self._places)

    def name_of(self, spelling: str) -> str:
        """The name of an image that may be spelled with its architecture.

        Raises:
            ConfigError: there is no such image.
        """
        if spelling not in self._places and spelling not in self.spellings:
            raise self._unknown(spelling)
        return self.spellings.get(spelling, spelling)

    def get(self, name: str) -> ImageDefinition:
        """The definition of an image.

        Raises:
            ConfigError: there is no image with that name, or its definition is invalid.
        """
        name = self.name_of(name)
        if name not in self._definitions:
            folder, architecture = self._places[name]
            self._definitions[name] = ImageDefinition.read(
                folder, lambda base: self._base(base, name), architecture
            )
        return self._definitions[name]

    def folder(self, name: str) -> Path | None:
        """The folder with the definition of an image, even an invalid one; None if there is none.

        Raises:
            ConfigError: see `names`.
        """
        place = self._places.get(self.spellings.get(name, name))
        return None if place is None else place.folder

    def native(self) -> list[str]:
        """The names of the images for this machine's architecture, and of those whose own is unknown.

        Raises:
            ConfigError: see `names`.
        """
        here = (native_architecture(), "")
        return [name for name, place in self._places.items() if place.architecture in here]

    def _base(self, base: str, name: str) -> ImageDefinition:
        """The definition of the base of an image, for its architecture."""
        where = self._places[name].folder / DEFINITION_FILE
        base = self.spellings.get(base, base)
        if base in self._folders and (architecture := self._places[name].architecture):
            variant = variants.variant_name(base, architecture)
            base = variant if variant in self._places else base
        self._deriving.append(name)
        try:
            if base in self._deriving:
                circle = self._deriving[self._deriving.index(base) :]
                raise ConfigError(
                    f"{where}: from = {base!r} closes a circle of images that derive from each other",
                    details=" from ".join([*circle, base]),
                    remedy="let one of them derive from another image, or give it a recipe",
                )
            if len(self._deriving) > _DEPTH:
                raise ConfigError(
                    f"{where}: from = {base!r} makes a chain of more than {_DEPTH} images",
                    remedy="let it derive from an image that is nearer to the end of the chain",
                )
            if base not in self._places:
                error = self._unknown(base)
                raise ConfigError(
                    f"{where}: from = {base!r}, but {error.brief}", remedy=error.remedy
                )
            return self.get(base)
        finally:
            self._deriving.pop()

    def valid(self, *, foreign: bool = False) -> Iterator[tuple[str, ImageDefinition]]:
        """The names and definitions of the images for this machine, without those that are wrong.

        Args:
            foreign: whether to add those for other architectures.
        """
        for name in self.names() if foreign else self.native():
            with suppress(ConfigError):
                yield name, self.get(name)

    def select(self, patterns: Sequence[str]) -> list[str]:
        """The names that `patterns` select, in the order of the catalogue.

        Args:
            patterns: names or globs; ``all`` for the images of this machine's architecture. A glob
                without ``_`` selects only these, too. A pattern that begins with ``!`` removes
                matching names. If it comes first, it removes them from ``all``.

        Raises:
            ConfigError: a pattern matches nothing in the catalogue.

        Example:
            >>> Catalogue().select([])
            []
        """
        selected: set[str] = set()
        for position, pattern in enumerate(patterns):
            if not pattern.startswith("!"):
                selected |= self._selected(pattern)
                continue
            if position == 0:
                selected |= self._selected(ALL)
            selected -= self._fitting(pattern.removeprefix("!"))
        return [name for name in self._places if name in selected]

    def fitting(self, patterns: Sequence[str]) -> set[str]:
        """The names that `patterns` leave if they filter what somebody has selected.

        Here globs and ``all`` stand for images of every architecture. Otherwise it is like `select`.

        Raises:
            ConfigError: a pattern matches nothing in the catalogue.
        """
        left: set[str] = set()
        for position, pattern in enumerate(patterns):
            if not pattern.startswith("!"):
                left |= self._fitting(pattern)
                continue
            if position == 0:
                left |= {*self._places}
            left -= self._fitting(pattern.removeprefix("!"))
        return left

    def named(self, patterns: Iterable[str]) -> list[str]:
        """The names of the images that `patterns` name exactly: not by a glob, ``all`` or ``!``.

        Raises:
            ConfigError: there is no image with such a name.
        """
        exact = (each for each in patterns if not variants.is_glob(each) and each != ALL)
        return [self.name_of(each) for each in exact if not each.startswith("!")]

    def _selected(self, pattern: str) -> set[str]:
        found = self._fitting(pattern)
        selected = {
            name for name in found if variants.selects(pattern, self._places[name].architecture)
        }
        for name in selected if pattern == ALL else ():
            self.get(name)  # so a wrong definition is an error here, and not later for each test
        if found and not selected:
            raise self._only_foreign(pattern, found)
        return selected

    def _fitting(self, pattern: str) -> frozenset[str]:
        """The names that a pattern fits. Each test of a suite may ask for the same ones."""
        if pattern not in self._fits:
            if pattern == ALL:
                found = [*self._places]
            elif not variants.is_glob(pattern):
                found = [self.name_of(pattern)]
            else:
                places = self._places.items()
                found = [name for name, (_, at) in places if variants.fits(pattern, name, at)]
            if not found and pattern != ALL:
                raise self._unknown(pattern)
            self._fits[pattern] = frozenset(found)
        return self._fits[pattern]

    @cached_property
    def _places(self) -> dict[str, _Place]:
        """The images by name, in order. Each folder's native one comes first."""
        places: dict[str, _Place] = {}
        native = native_architecture()
        for stem, (several, one) in self._stated().items():
            folder = self._folders[stem]
            found = {stem: _Place(folder, one)}
            if several:
                ordered = sorted(several, key=lambda architecture: architecture != native)
                found = {
                    variants.variant_name(stem, each): _Place(folder, each) for each in ordered
                }
            for name, place in found.items():
                if (other := places.setdefault(name, place)) is not place:
                    raise self._twice(name, other.folder, folder)
        return places

    @cached_property
    def spellings(self) -> dict[str, str]:
        """Names with their architecture → the names of these images, if they differ.

        Raises:
            ConfigError: see `names`.
        """
        found = {
            variants.full_name(name, place.architecture): name
            for name, place in self._places.items()
            if place.architecture
        }
        return {full: name for full, name in found.items() if full not in self._places}

    def _stated(self) -> dict[str, variants.Stated]:
        """For each folder, the architectures that its definition lists, or the one that it names.

        A derived image that says nothing has those of its base.
        """
        nothing: variants.Stated = ((), "")
        known: dict[str, variants.Stated] = {}
        for first in self._folders:
            following: list[str] = []
            stem, found = first, nothing
            while stem in self._folders and stem not in known:
                known[stem] = nothing  # for circles
                following.append(stem)
                found, stem = variants.stated(_content(self._folders[stem]))
            known.update(dict.fromkeys(following, known.get(stem, found)))
        return known

    @cached_property
    def _folders(self) -> dict[str, Path]:
        folders: dict[str, Path] = {}
        imported = _imported(self._cache)
        for parent in (*standard_folders(self._cache), *self._image_path):
            try:
                entries = sorted(
                    folder
                    for folder in parent.iterdir()
                    if not folder.name.startswith(".") and _is_image(folder)
                )
            except OSError as error:
                raise ConfigError(
                    f"the folder of images {parent} cannot be read: {error.strerror}",
                    remedy="correct vm_image_path or the hook pytest_vmsandbox_images (pytest), "
                    "--image-path or VMSANDBOX_IMAGE_PATH (vmsandbox)",
                ) from error
            for folder in entries:
                check_name(folder.name, parent)
                other = folders.get(folder.name, folder)
                if other.parent in imported and parent in self._image_path:
                    folders.pop(folder.name, None)  # a project means its own, on every machine
                elif other != folder:
                    raise self._twice(folder.name, other, folder)
                folders[folder.name] = folder
        return folders

    def _twice(self, name: str, one: Path, other: Path) -> ConfigError:
        imported = [folder for folder in (one, other) if folder.parent in _imported(self._cache)]
        return ConfigError(
            f"two images are called {name!r}",
            details=f"{one}\n{other}",
            remedy="remove the folder of the imported one"
            if imported
            else "rename one of the folders",
        )

    def _only_foreign(self, pattern: str, found: Collection[str]) -> ConfigError:
        others = [name for name in self._places if name in found]
        ending = ARCHITECTURES[self._places[others[0]].architecture].debian
        glob = "*" if pattern == ALL else pattern
        return ConfigError(
            f"no image for {debian_name(native_architecture())} fits {pattern!r}",
            details=f"for other architectures: {unknown.some(others)}",
            remedy="name the one that you mean, or add its architecture to the glob: "
            f"{glob}{SIGN}{ending}",
        )

    def _unknown(self, name: str) -> ConfigError:
        images = [Known(each, place.architecture) for each, place in self._places.items()]
        return ConfigError(f"there is no image {name!r}", remedy=unknown.remedy(name, images))


def _content(folder: Path) -> dict[str, Any]:
    """The content of a definition, checked as little as possible; empty if it cannot be read."""
    with suppress(ConfigError):
        return load(folder / DEFINITION_FILE)
    return {}


def standard_folders(cache: Path | None = None) -> list[Path]:
    """The folders that every catalogue has: that of our own images, and that of imported ones.

    Args:
        cache: the cache; None for the user's cache.
    """
    return [folder for folder in (*own_folders(), *_imported(cache)) if folder.is_dir()]


def _imported(cache: Path | None) -> list[Path]:
    """The folder of imported images."""
    with suppress(ConfigError):  # without a home folder, there is no cache
        return [imported_dir(cache or cache_dir())]
    return []


def _is_image(folder: Path) -> bool:
    try:
        return (folder / DEFINITION_FILE).is_file()
    except PermissionError:  # who asks for that image is told, but it may be something else
        return NAME.fullmatch(folder.name) is not None
