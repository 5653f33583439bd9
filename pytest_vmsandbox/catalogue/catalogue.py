"""The images that there are: our own, and those in the folders that the user names."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from pytest_vmsandbox.catalogue.definition import DEFINITION_FILE, ImageDefinition, check_name
from pytest_vmsandbox.core.errors import ConfigError

ALL = "all"

_ARCHITECTURES = {"arm64": "aarch64", "amd64": "x86_64"}  # as macOS and Windows call them


def native_architecture() -> str:
    """The architecture of this machine, as image definitions name it."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


class Catalogue:
    """The definitions of all images. Folders are listed, and definitions read, when needed.

    Args:
        image_path: folders that hold further images, each a folder with an ``image.toml``.
    """

    def __init__(self, image_path: Sequence[Path] = ()) -> None:
        self._image_path = tuple(image_path)
        self._definitions: dict[str, ImageDefinition] = {}

    def names(self) -> list[str]:
        """The names of all images: our own first, then folder by folder, each by name.

        Raises:
            ConfigError: a folder does not exist, a name cannot be one or is there twice.
        """
        return list(self._folders)

    def get(self, name: str) -> ImageDefinition:
        """The definition of an image.

        Raises:
            ConfigError: there is none of that name, or it is not well-formed.
        """
        if name not in self._folders:
            raise self._unknown(name)
        if name not in self._definitions:
            self._definitions[name] = ImageDefinition.read(self._folders[name])
        return self._definitions[name]

    def select(self, patterns: Sequence[str]) -> list[str]:
        """The names that `patterns` select, in the order of the catalogue.

        Args:
            patterns: names or globs; ``all`` for the images of this machine's architecture.
                With ``!`` in front, what is selected so far and matches is left out; as the
                first pattern, of ``all``.

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
        for parent in (*_own_folders(), *self._image_path):
            try:
                entries = sorted(
                    folder for folder in parent.iterdir() if (folder / DEFINITION_FILE).is_file()
                )
            except OSError as error:
                raise ConfigError(
                    f"images cannot be looked for in {parent}: {error.strerror}",
                    remedy="mend vm_image_path (pytest), "
                    "--image-path or VMSANDBOX_IMAGE_PATH (vmsandbox)",
                ) from error
            for folder in entries:
                check_name(folder.name, parent)
                other = folders.setdefault(folder.name, folder)
                if other != folder:
                    raise ConfigError(
                        f"two images are called {folder.name!r}",
                        details=f"{other}\n{folder}",
                        remedy="rename one of the folders",
                    )
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
        known = ", ".join(self._folders) or "none"
        close = difflib.get_close_matches(name, self._folders)
        guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        return ConfigError(f"there is no image {name!r}", remedy=f"{guess}there are: {known}")


def _own_folders() -> list[Path]:
    """The folder of our own images: inside the package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [path for path in (package / "images", package.parent / "images") if path.is_dir()][:1]
