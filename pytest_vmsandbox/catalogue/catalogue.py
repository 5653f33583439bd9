"""The definitions of all images: our own, and those in folders that the user names."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import islice
from pathlib import Path

from pytest_vmsandbox.catalogue.definition import (
    ALL,
    DEFINITION_FILE,
    NAME,
    ImageDefinition,
    check_name,
)
from pytest_vmsandbox.core.architecture import native_architecture
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.paths import cache_dir, imported_dir

_DEPTH = 20  # images that derive from each other
_LISTED = 30  # names in an error


class Catalogue:
    """The definitions of all images. Folders are listed and definitions are read on demand.

    Args:
        image_path: folders with further images, each a folder with an ``image.toml``.
        cache: the cache, which has the imported images; None for the user's cache.
    """

    def __init__(self, image_path: Sequence[Path] = (), cache: Path | None = None) -> None:
        self._image_path = tuple(image_path)
        self._cache = cache
        self._definitions: dict[str, ImageDefinition] = {}
        self._deriving: list[str] = []  # whose base is being read

    def names(self) -> list[str]:
        """The names of all images: our own, imported ones, then folder by folder, sorted in each.

        An imported image is left out if one of the folders has an image with its name.

        Raises:
            ConfigError: a folder does not exist, or a name is invalid or used twice.
        """
        return list(self._folders)

    def get(self, name: str) -> ImageDefinition:
        """The definition of an image.

        Raises:
            ConfigError: there is no image with that name, or its definition is invalid.
        """
        if name not in self._folders:
            raise self._unknown(name)
        if name not in self._definitions:
            self._definitions[name] = ImageDefinition.read(
                self._folders[name], lambda base: self._base(base, name)
            )
        return self._definitions[name]

    def folder(self, name: str) -> Path | None:
        """The folder with the definition of an image, even an invalid one; None if there is none.

        Raises:
            ConfigError: see `names`.
        """
        return self._folders.get(name)

    def _base(self, base: str, name: str) -> ImageDefinition:
        """The definition of the base of an image."""
        where = self._folders[name] / DEFINITION_FILE
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
            if base not in self._folders:
                error = self._unknown(base)
                raise ConfigError(
                    f"{where}: from = {base!r}, but {error.brief}", remedy=error.remedy
                )
            return self.get(base)
        finally:
            self._deriving.pop()

    def valid(self) -> Iterator[tuple[str, ImageDefinition]]:
        """The names and definitions of the images for this machine, without those that are wrong."""
        for name in self._folders:
            with suppress(ConfigError):
                definition = self.get(name)
                if definition.architecture == native_architecture():
                    yield name, definition

    def select(self, patterns: Sequence[str]) -> list[str]:
        """The names that `patterns` select, in the order of the catalogue.

        Args:
            patterns: names or globs; ``all`` for the images of this machine's architecture. A
                pattern that begins with ``!`` removes matching names. If it comes first, it removes
                them from ``all``.

        Raises:
            ConfigError: a pattern matches nothing in the catalogue.

        Example:
            >>> Catalogue().select([])
            []
        """
        selected: set[str] = set()
        for position, pattern in enumerate(patterns):
            if not pattern.startswith("!"):
                selected |= self._matching(pattern)
                continue
            if position == 0:
                selected |= self._native()
            selected -= self._matching(pattern.removeprefix("!"))
        return [name for name in self._folders if name in selected]

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
                    raise ConfigError(
                        f"two images are called {folder.name!r}",
                        details=f"{other}\n{folder}",
                        remedy="remove the folder of the imported one"
                        if parent in imported
                        else "rename one of the folders",
                    )
                folders[folder.name] = folder
        return folders

    def _native(self) -> set[str]:
        machine = native_architecture()
        return {name for name in self._folders if self.get(name).architecture == machine}

    def _matching(self, pattern: str) -> set[str]:
        if pattern == ALL:
            found = self._native()
        else:
            found = {name for name in self._folders if fnmatchcase(name, pattern)}
        if not found:
            raise self._unknown(pattern)
        return found

    def _unknown(self, name: str) -> ConfigError:
        known = ", ".join(islice(self._folders, _LISTED)) or "none"
        if (more := len(self._folders) - _LISTED) > 0:
            known += f" and {more} more (vmsandbox images list)"
        close = difflib.get_close_matches(name, self._folders)
        guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        return ConfigError(
            f"there is no image {name!r}",
            remedy=f"{guess}The images are: {known}. If it is in a folder of yours, name that folder: "
            "vm_image_path (pytest), --image-path or VMSANDBOX_IMAGE_PATH (vmsandbox)",
        )


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


def own_folders() -> list[Path]:
    """The folder of our own images, if it is there: inside the package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [path for path in (package / "images", package.parent / "images") if path.is_dir()][:1]
