"""The architectures of images, as ``image.toml`` lists them, and the names that images have by them.

A folder can define an image for several architectures. ``debian-13`` is the one of this machine's
architecture, and ``debian-13_arm64`` is another one. So the name of an image may end with its
architecture, as Debian calls it. Its full name always does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from pytest_vmsandbox.catalogue.tables import Table
from pytest_vmsandbox.core.architecture import ARCHITECTURES, by_any_name, native_architecture
from pytest_vmsandbox.core.errors import ConfigError

ALL = "all"
SIGN = "_"  # before the architecture in a name
_GLOB = frozenset("*?[")
CONSOLE = "{console}"  # in boot.append: the kernel's name of the guest's console
_SEPARATORS = "_-.:/"  # that people write before an architecture
Stated = tuple[tuple[str, ...], str]  # a list of architectures, or one
_OVERRIDES = ("append", "memory_min")  # keys of [boot] that differ between architectures


class Base(Protocol):
    """What counts here of a base's definition."""

    @property
    def name(self) -> str:
        """See `ImageDefinition`."""

    @property
    def architecture(self) -> str:
        """Likewise."""

    @property
    def variant_of(self) -> str:
        """Likewise."""

    @property
    def of_several(self) -> bool:
        """Likewise."""


# -- names ----------------------------------------------------------------------------------------


def variant_name(stem: str, architecture: str) -> str:
    """The name of the image that the folder `stem` defines for one of several architectures."""
    if architecture == native_architecture():
        return stem
    return f"{stem}{_end(architecture)}"


def full_name(name: str, architecture: str) -> str:
    """The name of an image with its architecture. It is the same on every machine."""
    end = _end(architecture)
    return name if name.endswith(end) else f"{name}{end}"


def stem_of(name: str, architecture: str) -> str:
    """The name of an image without its architecture."""
    return name.removesuffix(_end(architecture))


def _end(architecture: str) -> str:
    return f"{SIGN}{ARCHITECTURES[architecture].debian}"


def is_glob(pattern: str) -> bool:
    """Whether a pattern is no name of an image."""
    return not _GLOB.isdisjoint(pattern)


def fits(pattern: str, name: str, architecture: str) -> bool:
    """Whether a name or a glob is for an image.

    A glob without ``_`` says nothing about architectures. So it is for names without them.

    Args:
        architecture: of the image; empty if nobody knows it.

    Example:
        >>> fits("deb-*", "deb-1_arm64", "aarch64"), fits("deb-1", "deb-1_arm64", "aarch64")
        (True, False)
    """
    full = full_name(name, architecture) if architecture else name
    if not is_glob(pattern):
        return pattern in {name, full}
    if SIGN in pattern:
        return fnmatchcase(name, pattern) or fnmatchcase(full, pattern)
    return fnmatchcase(stem_of(name, architecture) if architecture else name, pattern)


def selects(pattern: str, architecture: str) -> bool:
    """Whether a pattern that fits an image selects it.

    Globs without ``_`` and ``all`` select only images of this machine's architecture.
    """
    if is_glob(pattern) or pattern == ALL:
        return SIGN in pattern or architecture in {native_architecture(), ""}
    return True


def guessed(name: str) -> tuple[str, str] | None:
    """Stem and architecture of a name that ends with an architecture, however it is written.

    Example:
        >>> guessed("debian-13-arm64"), guessed("tiny_x86_64"), guessed("tiny")
        (('debian-13', 'aarch64'), ('tiny', 'x86_64'), None)
    """
    for place, letter in enumerate(name):
        if letter in _SEPARATORS and (found := by_any_name(name[place + 1 :].lower())):
            return name[:place], found
    return None


# -- what image.toml says ---------------------------------------------------------------------------


def listed(top: Table) -> tuple[str, ...]:
    """The architectures that a definition lists; none if it names one, or leaves that to its base.

    Raises:
        ConfigError: the list is wrong.
    """
    allowed = f"a list of architectures, each once: {', '.join(map(json.dumps, ARCHITECTURES))}"
    none: tuple[str, ...] = ()
    return top.read("architectures", allowed, _architectures, none)


def stated(values: Mapping[str, Any]) -> tuple[Stated, str]:
    """What the content of an ``image.toml`` says about architectures, without an error if it is wrong.

    Returns:
        The list of architectures, or the one architecture. Both are empty if it says neither. Then
        the name of the base, if that has the architectures.
    """
    one, base = values.get("architecture"), values.get("from")
    if "architectures" in values:
        return (_architectures(values["architectures"]) or (), ""), ""
    if isinstance(one, str):
        return ((), one if one in ARCHITECTURES else ""), ""
    if not isinstance(base, str):
        return ((), ""), ""
    _, ending = guessed(base) or ("", "")
    return ((), ending if ending and base.endswith(_end(ending)) else ""), base


def which(top: Table, parent: Base | None, wanted: str) -> tuple[str, str, bool]:
    """The architecture of an image, its name, and whether it is one of several.

    Args:
        top: its definition.
        parent: its base for that architecture, if it has a base.
        wanted: which one of several; empty for this machine's, or else the first one.

    Raises:
        ConfigError: an architecture is wrong or missing, or its base is for another one.
    """
    stem, several, own = top.file.parent.name, listed(top), top.values.get("architecture")
    has_differences = isinstance(own, dict)  # between several
    follows = parent is not None and not several and (own is None or has_differences)
    if several:
        why = "together with architectures"
        top.only("architecture", own is None or has_differences, why, "remove architectures")
        architecture = _choose(top.file, several, wanted)
    elif parent is not None and follows:
        architecture = parent.architecture
    elif has_differences:
        raise top.missing("architectures", "[architecture.NAME] is for a definition with a list")
    else:
        architecture = top.choice("architecture", tuple(ARCHITECTURES))
    if parent is not None and architecture != parent.architecture:
        raise ConfigError(
            f"{top.file}: architecture = {architecture!r}, but its base {parent.name} is for "
            f"{parent.architecture}",
            remedy="remove architecture, or derive from another image",
        )
    of_several = bool(several)
    if (
        parent is not None and follows and parent.of_several
    ):  # as its base, unless it names a variant
        of_several = top.values["from"] == (parent.variant_of or parent.name)
    if not of_several:
        return architecture, stem, False
    if any(stem.endswith(_end(each)) for each in ARCHITECTURES):
        raise ConfigError(
            f"{top.file}: the name of the folder ends with an architecture, but the definition is for "
            "several",
            remedy=f"rename the folder, such as to {stem.rpartition(SIGN)[0]!r}",
        )
    return architecture, variant_name(stem, architecture), True


def _choose(file: Path, choices: Sequence[str], wanted: str) -> str:
    if wanted and wanted not in choices:
        raise ConfigError(
            f"{file}: {wanted} is not among its architectures",
            remedy=f"add {wanted!r} to architectures, or use another image",
        )
    native = native_architecture()
    return wanted or (native if native in choices else choices[0])


def adapted(boot: Table, top: Table, architecture: str) -> Table:
    """The table ``[boot]`` of a definition, with what ``[architecture.NAME]`` says instead.

    Raises:
        ConfigError: such a table is for no architecture, or has a wrong key.
    """
    if not isinstance(top.values.get("architecture"), dict):
        return boot
    by_name = top.table("architecture", listed(top) or tuple(ARCHITECTURES))
    found = {name: by_name.table(name, _OVERRIDES).values for name in by_name.values}
    values = {**boot.values, **found.get(architecture, {})}
    return Table(boot.file, boot.prefix, values, boot.keys, boot.elsewhere)


def with_console(append: str, architecture: str) -> str:
    """A kernel's command line with the name of the console in it."""
    return append.replace(CONSOLE, ARCHITECTURES[architecture].console)


def _architectures(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return None
    is_right = value and {*value} <= {*ARCHITECTURES} and len({*value}) == len(value)
    return tuple(value) if is_right else None
