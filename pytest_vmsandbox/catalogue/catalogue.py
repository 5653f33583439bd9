"""The definitions of images: our own, and those in folders that the user names.

An image is described by its ``image.toml``. A digest covers everything that goes into it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Hardware, format_size

DEFINITION_FILE = "image.toml"
SCHEMA = 1
BUILD_FORMAT = 1  # part of each digest: raise it when the files that a recipe must make change
ARCHITECTURES = ("x86_64", "aarch64")
INITS = ("systemd", "busybox")
ALL = "all"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

_KEYS = ("schema", "description", "architecture", "recipe", "uses", "requires", "boot", "system")
_NATIVE = {"arm64": "aarch64", "amd64": "x86_64"}  # names of macOS and Windows → ours
_IGNORED = {"__pycache__"}  # folders that Python makes
_T = TypeVar("_T")


def check_name(name: str, where: object) -> None:
    """Check the name of an image, which is the name of its folder.

    Raises:
        ConfigError: the name is invalid.
    """
    if not NAME.fullmatch(name) or name == ALL:
        raise ConfigError(
            f"{where}: {name!r} is not a name for an image",
            remedy="use lower-case letters, digits, dots, underscores and hyphens, but not 'all'",
        )


@dataclass(frozen=True, kw_only=True)
class ImageDefinition:
    """An image that can be built.

    Attributes:
        name: the name of its folder.
        folder: holds ``image.toml``, the recipe and the recipe's files.
        description: one line for people.
        architecture: one of `ARCHITECTURES`.
        recipe: the executable in `folder` that builds the image.
        uses: further files and folders that the recipe reads, relative to `folder`.
        requires: programs of this machine that the recipe calls.
        append: the kernel's command line.
        memory_min: bytes of memory that a guest needs to boot.
        disk_size: bytes of its root disk; None for an image without one.
        python: whether the guest has Python.
        init: one of `INITS`.
        user: the default user of commands in the guest.
    """

    name: str
    folder: Path
    description: str
    architecture: str
    recipe: str
    uses: tuple[str, ...]
    requires: tuple[str, ...]
    append: str
    memory_min: int
    disk_size: int | None
    python: bool
    init: str
    user: str

    @classmethod
    def read(cls, folder: Path) -> ImageDefinition:
        """The definition in `folder`.

        Raises:
            ConfigError: a key is missing or unknown, or its value is not allowed; the recipe cannot be
                executed; or a file named in ``uses`` does not exist.
        """
        check_name(folder.name, folder)
        file = folder / DEFINITION_FILE
        try:
            with file.open("rb") as stream:
                content = tomllib.load(stream)
        except (OSError, ValueError) as error:  # ValueError: not TOML, or not UTF-8
            raise ConfigError(
                f"{file} cannot be read: {error}", remedy="make it a readable TOML file in UTF-8"
            ) from error
        top = _Table(file, "", content, _KEYS, optional=("disk",))
        top.choice("schema", SCHEMA)
        boot = top.table("boot", ("append", "memory_min"))
        system = top.table("system", ("python", "init", "user"))
        disk = top.table("disk", ("size",)) if "disk" in content else None
        executable, paths = partial(_executable, folder), partial(_paths, folder)
        size = "a size such as '256MiB'"
        return cls(
            name=folder.name,
            folder=folder,
            description=top.read("description", "one line of text", _line),
            architecture=top.choice("architecture", *ARCHITECTURES),
            recipe=top.read("recipe", "an executable file in this folder", executable),
            uses=top.read("uses", "a list of paths, relative to this folder", paths),
            requires=top.read("requires", "a list of names of programs", _programs),
            append=boot.read("append", "one line of text, or ''", _line_or_empty),
            memory_min=boot.read("memory_min", size, partial(_hardware, "memory")),
            disk_size=disk.read("size", size, partial(_hardware, "disk")) if disk else None,
            python=system.choice("python", True, False),
            init=system.choice("init", *INITS),
            user=system.read("user", "the name of a user", partial(_hardware, "user")),
        )

    def hardware(self, defaults: Hardware, arguments: Mapping[str, object]) -> Hardware:
        """The hardware of a guest of this image. Without another name, its user is the image's.

        Args:
            defaults: the run's default hardware.
            arguments: what differs, as `Hardware.changed` takes it.

        Raises:
            ConfigError: an argument is unknown, or its value is invalid.
        """
        hardware = defaults.changed(arguments)
        return replace(hardware, user=hardware.user or self.user)

    def check(self, hardware: Hardware) -> None:
        """Check that a guest of this image can have some hardware.

        Raises:
            ConfigError: it cannot.
        """
        if hardware.memory < self.memory_min:
            raise ConfigError(
                f"{format_size(hardware.memory)} of memory is too little for {self.name}",
                remedy=f"give it at least {format_size(self.memory_min)}: memory= (marker vm, boot), "
                "vm_memory (ini file), --memory (vmsandbox)",
            )
        if hardware.disk is not None and self.disk_size is None:
            raise ConfigError(
                f"disk= cannot be used with {self.name}: this image has no root disk",
                remedy="leave disk= out. To add blank disks, use disks=['1GiB']",
            )
        if hardware.disk is not None and hardware.disk < (self.disk_size or 0):
            raise ConfigError(
                f"a disk of {format_size(hardware.disk)} is smaller than that of the image "
                f"{self.name}",
                remedy=f"use at least {format_size(self.disk_size or 0)}",
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of everything that goes into the image. Computed once for each object.

        It covers every file in the image's folder and in ``uses``, and which of them are executable.
        It ignores the other bits of a file's mode, as git does: they differ between checkouts.

        Raises:
            ConfigError: a file cannot be read, or is not a regular file.
        """
        total = hashlib.sha256(f"{BUILD_FORMAT} {self.name}\n".encode())
        sources = [("", self.folder), *((use, self.folder / use) for use in self.uses)]
        for label, file in sorted(found for source in sources for found in _files(*source)):
            try:
                mode = file.stat().st_mode
                if not stat.S_ISREG(mode):  # reading a FIFO would wait for its writer
                    raise ConfigError(
                        f"{file} belongs to the image {self.name}, but is not a regular file",
                        remedy="remove it, or move it out of the image's folder",
                    )
                content = hashlib.sha256(file.read_bytes()).hexdigest()
            except OSError as error:
                raise ConfigError(
                    f"{file} belongs to the image {self.name}, but cannot be read: "
                    f"{error.strerror or error}",
                    remedy="make it readable, or remove it",
                ) from error
            kind = "x" if mode & stat.S_IXUSR else "-"
            total.update(os.fsencode(f"{label}\0{kind}{content}\n"))
        return total.hexdigest()


def _files(label: str, source: Path) -> Iterator[tuple[str, Path]]:
    """The files in or at `source`, each with the path that the digest covers."""
    if not source.is_dir():
        yield label, source
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = (name for name in subfolders if name not in _IGNORED)
        links = (name for name in subfolders if (Path(folder) / name).is_symlink())
        for name in (*files, *links):  # a link to a folder is refused later: it is no regular file
            file = Path(folder) / name
            yield f"{label}/{file.relative_to(source)}", file


@dataclass(frozen=True)
class _Table:
    """A table of a TOML file. It must have exactly the required keys, and may have the optional."""

    file: Path
    prefix: str
    values: dict[str, Any]
    keys: Sequence[str]
    optional: Sequence[str] = ()

    def __post_init__(self) -> None:
        allowed = (*self.keys, *self.optional)
        for word, names in (
            ("unknown", [key for key in self.values if key not in allowed]),
            ("missing", [key for key in self.keys if key not in self.values]),
        ):
            if names:
                listed = ", ".join(repr(self.prefix + name) for name in names)
                remedy = f"the keys here are: {', '.join(allowed)}"
                raise ConfigError(f"{self.file}: {word} key {listed}", remedy=remedy)

    def read(self, key: str, allowed: str, reader: Callable[[Any], _T | None]) -> _T:
        """The value of `key` as `reader` returns it. None from `reader` means a wrong value."""
        value = self.values[key]
        if (result := reader(value)) is None:
            raise ConfigError(
                f"{self.file}: {self.prefix}{key} = {value!r} is not allowed",
                remedy=f"{self.prefix}{key} must be {allowed}",
            )
        return result

    def choice(self, key: str, *choices: _T) -> _T:
        """The value of `key`, one of `choices`."""

        def read(value: object) -> _T | None:
            equal = (choice for choice in choices if choice == value)  # 1 == True, too
            return next((choice for choice in equal if type(choice) is type(value)), None)

        return self.read(key, " or ".join(map(json.dumps, choices)), read)

    def table(self, key: str, keys: Sequence[str]) -> _Table:
        """The table `key`, which must have exactly `keys`."""
        values = self.read(key, "a table", lambda table: table if isinstance(table, dict) else None)
        return _Table(self.file, f"{self.prefix}{key}.", values, keys)


def _line_or_empty(value: object) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None


def _line(value: object) -> str | None:
    return _line_or_empty(value) or None


def _hardware(name: str, value: object) -> Any:
    """`value` as the attribute `name` of `Hardware`; None if it is invalid."""
    with suppress(ConfigError):
        return getattr(Hardware().changed({name: value}), name)
    return None


def _texts(value: object, good: Callable[[str], bool]) -> tuple[str, ...] | None:
    if isinstance(value, list) and all(isinstance(text, str) and good(text) for text in value):
        return tuple(value)
    return None


def _programs(value: object) -> tuple[str, ...] | None:
    return _texts(value, lambda name: re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) is not None)


def _paths(folder: Path, value: object) -> tuple[str, ...] | None:
    paths = _texts(value, lambda path: path.isprintable() and not Path(path).is_absolute())
    for path in paths or ():
        if not (folder / path).exists():
            raise ConfigError(
                f"{folder / DEFINITION_FILE}: uses names {path!r}, which does not exist",
                remedy=f"paths in uses are relative to {folder}",
            )
    return paths


def _executable(folder: Path, value: object) -> str | None:
    name = _line(value)
    if name is None or Path(name).name != name:
        return None
    return name if (folder / name).is_file() and os.access(folder / name, os.X_OK) else None


# -- all of them ------------------------------------------------------------------------------------


def native_architecture() -> str:
    """The architecture of this machine, as image definitions name it."""
    machine = platform.machine().lower()
    return _NATIVE.get(machine, machine)


class Catalogue:
    """The definitions of all images. Folders are listed and definitions are read on demand.

    Args:
        image_path: folders with further images, each a folder with an ``image.toml``.
    """

    def __init__(self, image_path: Sequence[Path] = ()) -> None:
        self._image_path = tuple(image_path)
        self._definitions: dict[str, ImageDefinition] = {}

    def names(self) -> list[str]:
        """The names of all images: our own first, then folder by folder, sorted in each.

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
            self._definitions[name] = ImageDefinition.read(self._folders[name])
        return self._definitions[name]

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
        for parent in (*_own_folders(), *self._image_path):
            try:
                entries = sorted(
                    folder for folder in parent.iterdir() if (folder / DEFINITION_FILE).is_file()
                )
            except OSError as error:
                raise ConfigError(
                    f"the folder of images {parent} cannot be read: {error.strerror}",
                    remedy="correct vm_image_path (pytest), "
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
        return ConfigError(f"there is no image {name!r}", remedy=f"{guess}The images are: {known}")


def _own_folders() -> list[Path]:
    """The folder of our own images: inside the package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [path for path in (package / "images", package.parent / "images") if path.is_dir()][:1]
