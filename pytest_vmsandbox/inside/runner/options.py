"""Options, ini keys, plugins and fixtures of the host, for pytest in the guest."""

from __future__ import annotations

import pathlib
import types
from typing import Any

import pytest


def set_options(option: Any, wanted: dict[str, Any]) -> None:
    """Set options that are known here."""
    for name, value in wanted.items():
        if hasattr(option, name):
            setattr(option, name, unpacked(value))


def let_ini_keys_be(config: Any, rows: list[tuple[list[str], Any]]) -> None:
    """Let ini keys have the host's values, as far as this side has such keys.

    Args:
        rows: the names of a key, and its value.
    """
    values: dict[str, Any] = {}
    for names, packed in rows:
        # One object for all names: `addinivalue_line` adds to it.
        values.update(dict.fromkeys(names, unpacked(packed)))
    read = config.getini

    def getini(name: str) -> Any:
        own = read(name)  # or it is unknown here
        return values.get(name, own)

    config.getini = getini


def unpacked(value: Any) -> Any:
    """A value of an option or an ini key; JSON has paths and tuples as objects with one member."""
    if isinstance(value, list):
        return [unpacked(member) for member in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(unpacked(value["tuple"]))
    if "py.path" in value:
        import py  # type: ignore[import-untyped]

        return py.path.local(value["py.path"])
    return pathlib.Path(value["path"])


def installed_plugins(names: list[str]) -> list[str]:
    """Those of the wanted plugins that are installed here."""
    from importlib.metadata import distributions

    there = {
        point.name
        for distribution in distributions()
        for point in distribution.entry_points
        if point.group == "pytest11"
    }
    return [name for name in names if name in there]


def fixtures_of(values: dict[str, object]) -> types.ModuleType:
    """A plugin: fixtures for the whole session that are values of the host's."""

    def fixture_of(name: str) -> object:
        return pytest.fixture(scope="session", name=name)(lambda: values[name])

    module = types.ModuleType("vmsandbox_fixtures")
    for name in values:
        setattr(module, name, fixture_of(name))
    return module
