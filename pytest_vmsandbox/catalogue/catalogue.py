"""The images that there are: our own, and those in the folders that the user names.

What an image is, its ``image.toml`` says; all that goes into it has a digest.
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
BUILD_FORMAT = 1  # goes into each digest: raise it when what a recipe must deliver changes
ARCHITECTURES = ("x86_64", "aarch64")
INITS = ("systemd", "busybox")
ALL = "all"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

_KEYS = ("schema", "description", "architecture", "recipe", "uses", "requires", "boot", "system")
_NATIVE = {"arm64": "aarch64", "amd64": "x86_64"}  # as macOS and Windows call architectures
_IGNORED = {"__pycache__"}  # folders that appear by themselves
_T = TypeVar("_T")


def check_name(name: str, where: object) -> None:
    """Check the name of an image, which is the name of its folder.

    Raises:
        ConfigError: it is not one.
    """
    if not NAME.fullmatch(name) or name == ALL:
        raise ConfigError(
            f"{where}: {name!r} is not a name for an image",
            remedy="use small letters, digits, dots, underscores and hyphens; not the word 'all'",
        )


@dataclass(frozen=True, kw_only=True)
class ImageDefinition:
    """An image that can be built.

    Attributes:
        name: the name of its folder.
        folder: where ``image.toml``, the recipe and its files lie.
        description: one line for people.
        architecture: one of `ARCHITECTURES`.
        recipe: the executable in `folder` that builds it.
        uses: further files and folders the recipe reads, relative to `folder`.
        requires: programs of the host that the recipe calls.
        append: the kernel's command line.
        memory_min: bytes of memory below which it does not boot.
        disk_size: bytes of its root disk; None when it has none.
        python: whether the guest has a Python.
        init: one of `INITS`.
        user: who runs commands in the guest where nobody is named.
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
            ConfigError: a key is missing, unknown or has a value that is not allowed; the
                recipe cannot be executed; or a file named in ``uses`` does not exist.
        """
        check_name(folder.name, folder)
        file = folder / DEFINITION_FILE
        try:
            with file.open("rb") as stream:
                content = tomllib.load(stream)
        except (OSError, ValueError) as error:  # ValueError: not TOML, or not UTF-8
            raise ConfigError(f"{file} cannot be read: {error}") from error
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
        """The hardware of a guest of this image; its user is the image's where nobody names one.

        Args:
            defaults: of the run.
            arguments: that differ from them, as `Hardware.changed` takes them.

        Raises:
            ConfigError: there is no such argument, or its value is invalid.
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
                remedy=f"it needs at least {format_size(self.memory_min)}",
            )
        if hardware.disk is not None and self.disk_size is None:
            raise ConfigError(
                f"{self.name} has no disk of its own",
                remedy="a test can add blank ones: disks=['1GiB']",
            )
        if hardware.disk is not None and hardware.disk < (self.disk_size or 0):
            raise ConfigError(
                f"a disk of {format_size(hardware.disk)} is smaller than the image's",
                remedy=f"{self.name} has {format_size(self.disk_size or 0)}",
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of all that goes into the image: every file of its folder and of
        ``uses``, and which of them are executable. Read once for each object.

        The other bits of a file's mode stay out, as in git: they differ from one checkout to
        the next.

        Raises:
            ConfigError: one of the files cannot be read, or is not a regular file.
        """
        total = hashlib.sha256(f"{BUILD_FORMAT} {self.name}\n".encode())
        sources = [("", self.folder), *((use, self.folder / use) for use in self.uses)]
        for label, file in sorted(found for source in sources for found in _files(*source)):
            try:
                mode = file.stat().st_mode
                if not stat.S_ISREG(mode):  # reading a FIFO would wait for its writer
                    raise ConfigError(f"{file} goes into {self.name}, but is not a regular file")
                content = hashlib.sha256(file.read_bytes()).hexdigest()
            except OSError as error:
                raise ConfigError(f"{file} goes into {self.name}, but: {error}") from error
            kind = "x" if mode & stat.S_IXUSR else "-"
            total.update(os.fsencode(f"{label}\0{kind}{content}\n"))
        return total.hexdigest()


def _files(label: str, source: Path) -> Iterator[tuple[str, Path]]:
    """The files in or at `source`, each with the path by which it goes into the digest."""
    if not source.is_dir():
        yield label, source
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = (name for name in subfolders if name not in _IGNORED)
        links = (name for name in subfolders if (Path(folder) / name).is_symlink())
        for name in (*files, *links):  # a link to a folder is refused later: no regular file
            file = Path(folder) / name
            yield f"{label}/{file.relative_to(source)}", file


@dataclass(frozen=True)
class _Table:
    """A table of a TOML file, with exactly the keys that it must have."""

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
                remedy = f"allowed here: {', '.join(allowed)}"
                raise ConfigError(f"{self.file}: {word} key {listed}", remedy=remedy)

    def read(self, key: str, allowed: str, reader: Callable[[Any], _T | None]) -> _T:
        """The value of `key` as `reader` returns it; None from it stands for a wrong value."""
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
        """The table `key`, with exactly `keys`."""
        values = self.read(key, "a table", lambda table: table if isinstance(table, dict) else None)
        return _Table(self.file, f"{self.prefix}{key}.", values, keys)


def _line_or_empty(value: object) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None


def _line(value: object) -> str | None:
    return _line_or_empty(value) or None


def _hardware(name: str, value: object) -> Any:
    """What a guest has of that name, if `value` stands for it."""
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
