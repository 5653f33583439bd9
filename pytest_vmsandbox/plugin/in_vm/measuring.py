"""Coverage of code that runs inside guests. It is measured there, and pytest-cov here gets the result.

Guests send line numbers. They send no data file of coverage, because we would have to open an untrusted
database.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_vmsandbox.inside.tree import Tree
    from pytest_vmsandbox.inside.wire import Message

# Options that decide which lines are measured. Guests may lack coverage's plugins, so `plugins` is out.
_OPTIONS = ("branch", "concurrency", "cover_pylib", "include", "omit", "patch", "source",
            "source_dirs", "source_pkgs")  # fmt: skip
_MAX_LINE = 10_000_000  # the number of one


class Measuring:
    """Gives pytest-cov on this side what guests have measured.

    Args:
        controller: pytest-cov's.
    """

    def __init__(self, controller: Any) -> None:
        self._cov = controller.cov
        self._folder = Path(controller.topdir)

    @classmethod
    def of(cls, config: pytest.Config) -> Measuring | None:
        """The one of this run; None for a run without coverage."""
        controller = getattr(config.pluginmanager.get_plugin("_cov"), "cov_controller", None)
        return None if controller is None or controller.cov is None else cls(controller)

    def settings(self, translate: Callable[[str], str]) -> dict[str, object]:
        """How guests must measure: coverage's options, name → value.

        Args:
            translate: turns a path of the project on this machine into the guest's path.
        """
        found: dict[str, object] = {}
        for option in _OPTIONS:
            value = None
            with suppress(Exception):  # this version of coverage does not have the option
                value = self._cov.get_option(f"run:{option}")
            if isinstance(value, list | tuple):
                found[option] = [translate(str(text)) for text in value]
            elif value is not None:
                found[option] = str(value)
        return found

    def keep(self, said: Iterable[Message], tree: Tree, guest: str) -> None:
        """Write what a guest has measured to a file that pytest-cov will combine with its own.

        Args:
            said: messages of a session that has ended.
            tree: what went to the guest. Coverage of other files is left out.
            guest: the guest's name.
        """
        from coverage import CoverageData

        branch = bool(self._cov.get_option("run:branch"))
        found: dict[str, Any] = {}
        for message in said:
            name, numbers = message.get("covered"), message.get("arcs" if branch else "lines")
            if not isinstance(name, str) or not isinstance(numbers, list):
                continue
            if (entry := tree.entries.get(name)) and entry.kind == "file":
                found[str(tree.root / name)] = (
                    [tuple(pair) for pair in numbers if _is_arc(pair)]
                    if branch
                    else [line for line in numbers if _is_line(line)]
                )
        if found:
            base = self._folder / str(self._cov.get_option("run:data_file"))
            data = CoverageData(basename=str(base), suffix=f"vm-{guest}.{os.getpid()}")
            data.add_arcs(found) if branch else data.add_lines(found)
            data.close()


def _is_line(number: object) -> bool:
    return type(number) is int and 0 < number < _MAX_LINE


def _is_arc(pair: object) -> bool:
    """Whether `pair` is a jump from line to line. Negative numbers are ends of functions."""
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(number) is int and _is_line(abs(number)) for number in pair)
    )
