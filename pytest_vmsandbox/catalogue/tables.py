"""Checked reading of a TOML file: each error names the file, the key and the remedy."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, TypeVar

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import KIB, format_size

_T = TypeVar("_T")
_SHOWN = 60  # characters of a wrong value
_MOST = 64 * KIB  # of a file
_DOTS = 1_000  # in a file: a key of 32,000 parts takes a minute to read


class Default(Enum):
    """What a key without a value stands for."""

    NONE = auto()  # it must have a value


def load(file: Path) -> dict[str, Any]:
    """The content of a TOML file. It may begin with a byte order mark, as some editors write it.

    Raises:
        ConfigError: it cannot be read, it is not TOML in UTF-8, or it is too large.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST + 1)
        if len(content) > _MOST:
            raise ValueError(f"it is larger than {format_size(_MOST)}")
        if content.count(b".") > _DOTS:
            raise ValueError(f"it has more than {_DOTS} dots")
        return tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError:
        why = "it is nested too deeply"
    except (OSError, ValueError) as error:  # ValueError: not TOML, or not UTF-8
        why = getattr(error, "strerror", None) or str(error)
    raise ConfigError(
        f"{file} cannot be read: {why}",
        remedy="make it a readable TOML file in UTF-8. Texts are in quotes",
    )


@dataclass(frozen=True)
class Table:
    """A table of a TOML file.

    Attributes:
        file: the file.
        prefix: what comes before its keys in errors, such as ``boot.``.
        values: the keys and values.
        keys: the keys that it may have. Any other is an error at once.
        elsewhere: for keys of other tables, the places where they belong.
    """

    file: Path
    prefix: str
    values: dict[str, Any]
    keys: Sequence[str]
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.values:
            if key not in self.keys:
                close = difflib.get_close_matches(key, self.keys, n=1)
                guess = f"did you mean {close[0]!r}? The" if close else "the"
                if key in self.elsewhere:
                    guess = f"{key} belongs {self.elsewhere[key]}. The"
                raise ConfigError(
                    f"{self.file}: unknown key {_shown(self.prefix + key)}",
                    remedy=f"{guess} keys here are: {', '.join(self.keys)}",
                )

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def read(
        self,
        key: str,
        allowed: str,
        reader: Callable[[Any], _T | None],
        default: _T | Default = Default.NONE,
    ) -> _T:
        """The value of `key` as `reader` returns it. None from `reader` means a wrong value.

        Args:
            key: the key.
            allowed: what it may be, for the error.
            reader: turns the value of the file into ours.
            default: the value if the key is missing.

        Raises:
            ConfigError: it is missing and has no default, or its value is not allowed.
        """
        if key not in self.values:
            if isinstance(default, Default):
                raise self.missing(key, f"{self.prefix}{key} must be {allowed}")
            return default
        if (result := reader(self.values[key])) is None:
            raise ConfigError(
                f"{self.file}: {self.prefix}{key} = {_shown(self.values[key])} is not allowed",
                remedy=f"{self.prefix}{key} must be {allowed}",
            )
        return result

    def choice(self, key: str, choices: Sequence[_T], default: _T | Default = Default.NONE) -> _T:
        """The value of `key`, one of `choices`.

        Raises:
            ConfigError: it is missing and has no default, or it is none of them.
        """

        def read(value: object) -> _T | None:
            equal = (choice for choice in choices if choice == value)  # 1 == True, too
            return next((choice for choice in equal if type(choice) is type(value)), None)

        return self.read(key, " or ".join(map(json.dumps, choices)), read, default)

    def table(self, key: str, keys: Sequence[str]) -> Table:
        """The table `key`, empty if it is missing.

        Raises:
            ConfigError: it is not a table, or it has other keys than `keys`.
        """
        nothing: dict[str, Any] = {}
        values = self.read(
            key, "a table", lambda table: table if isinstance(table, dict) else None, nothing
        )
        return Table(self.file, f"{self.prefix}{key}.", values, keys, self.elsewhere)

    def missing(self, key: str, remedy: str) -> ConfigError:
        """The error for a key that is missing."""
        return ConfigError(f"{self.file}: missing key {self.prefix + key!r}", remedy=remedy)

    def only(self, key: str, allowed: bool, why: str, remedy: str) -> None:
        """Refuse `key` unless it is allowed here.

        Args:
            key: the key.
            allowed: whether it may have a value.
            why: where it is of no use, such as ``without a base``.
            remedy: what to do instead of removing it.

        Raises:
            ConfigError: it has a value.
        """
        if key in self.values and not allowed:
            raise ConfigError(
                f"{self.file}: {self.prefix}{key} cannot be used {why}",
                remedy=f"remove {self.prefix}{key}, or {remedy}",
            )


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def line(value: object) -> str | None:
    """`value` if it is one line of text, and not empty."""
    return line_or_empty(value) or None


def line_or_empty(value: object) -> str | None:
    """`value` if it is one line of text, or empty."""
    return value if isinstance(value, str) and value.isprintable() else None


def texts(value: object, good: Callable[[str], bool]) -> tuple[str, ...] | None:
    """`value` if it is a list of texts that are all good."""
    if isinstance(value, list) and all(isinstance(text, str) and good(text) for text in value):
        return tuple(value)
    return None
