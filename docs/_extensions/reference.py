"""What the reference takes from the code, and no other extension generates.

Each directive stands in an `{eval-rst}` block:

    .. pytest-fixtures::   all fixtures: scope and docstring
    .. pytest-options::    all options of pytest's command line, as they are registered
    .. pytest-ini-keys::   all ini keys, likewise
    .. bench-figures::     what `vmsandbox bench` measures

A public name that no page documents is a warning, and so an error of the build.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import pytest_vmsandbox
from pytest_vmsandbox import Faults, Guest, Process, SSHAccess, plugin
from pytest_vmsandbox.cli import bench
from pytest_vmsandbox.plugin import config, hookspecs

_WHOLE = (Faults, Guest, Process, SSHAccess)  # all of their methods and properties are public
_LOG = logging.getLogger(__name__)
_TYPES = {  # of ini keys, as pytest calls them
    None: "",
    "args": "Words, separated by blanks. Quote a word that has blanks.",
    "bool": "``true`` or ``false``.",
    "linelist": "One per line.",
    "paths": "Relative to the ini file, separated by blanks.",
}


@dataclass
class Registered:
    """What the plugin registers with pytest; it takes the place of pytest's parser.

    Attributes:
        options: name → arguments of `addoption`.
        ini_keys: name → type and help.
    """

    options: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    ini_keys: dict[str, tuple[str | None, str]] = field(default_factory=dict)

    @classmethod
    def now(cls) -> Registered:
        """What it registers."""
        found = cls()
        config.add_options(found)  # type: ignore[arg-type]  # it has what is called of a parser
        return found

    def getgroup(self, *_: str) -> Registered:
        """As of `pytest.Parser`."""
        return self

    def addoption(self, name: str, **arguments: Any) -> None:
        """As of the group of options."""
        self.options[name] = arguments

    def addini(self, name: str, about: str, *, type: str | None, default: None) -> None:  # noqa: A002, ARG002
        """As of `pytest.Parser`."""
        self.ini_keys[name] = (type, about)

    def text(self, about: str) -> str:
        """A help text as a sentence of reStructuredText, in which names are links."""
        escaped = re.sub(r"([*`|\\])", r"\\\1", about)
        linked = re.sub(r"--(in-vm|vm(-\w+)*)", r":option:`\g<0> <pytest \g<0>>`", escaped)
        linked = re.sub(r"\bvm_\w+", r":confval:`\g<0>`", linked)
        return f"{linked[0].upper()}{linked[1:]}."


def fixtures() -> dict[str, tuple[str, str]]:
    """The scope and the docstring of each fixture that users may ask for."""
    found = {}
    for name, value in vars(plugin).items():
        if type(value).__name__ == "FixtureFunctionDefinition" and not name.startswith("_"):
            marker = value._fixture_function_marker  # noqa: SLF001  # there is no public way
            found[name] = (str(marker.scope), inspect.getdoc(value) or "")
    return found


class _Generated(SphinxDirective):
    """A directive that becomes reStructuredText."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(self.lines()))

    def lines(self) -> Iterator[str]:
        """The text."""
        raise NotImplementedError

    def entry(self, directive: str, name: str, text: str) -> list[str]:
        """A directive with content."""
        lines = ["", *text.splitlines(), ""]
        return [f".. {directive}:: {name}", *(f"   {line}" if line else "" for line in lines)]


class _Fixtures(_Generated):
    def lines(self) -> Iterator[str]:
        for name, (scope, doc) in sorted(fixtures().items()):
            text = f"{GoogleDocstring(doc, self.config)}\n\nScope: {scope}."
            yield from self.entry("fixture", name, text)


class _Options(_Generated):
    def lines(self) -> Iterator[str]:
        registered = Registered.now()
        yield from (".. program:: pytest", "")  # what other pages link to is `pytest --vm`
        for name, arguments in registered.options.items():
            value = arguments.get("metavar") or "|".join(arguments.get("choices", ()))
            signature = f"{name}={value}" if value else name
            keys = [
                key
                for key, (_, about) in registered.ini_keys.items()
                if re.match(rf"like {name}\b(?!-)", about)
            ]
            text = registered.text(re.sub(r" Ini key: \w+$", "", arguments["help"]).rstrip("."))
            text += "".join(f"\n\nIni key: :confval:`{key}`" for key in keys)
            yield from self.entry("option", signature, text)


class _IniKeys(_Generated):
    def lines(self) -> Iterator[str]:
        registered = Registered.now()
        for name, (kind, about) in registered.ini_keys.items():
            yield from self.entry("confval", name, f"{registered.text(about)} {_TYPES[kind]}")


class _Figures(_Generated):
    def lines(self) -> Iterator[str]:
        for key in bench.MEASUREMENTS:
            yield from (f"``{key}``", f"   {bench.meaning(key)}", "")


def describe(_: Sphinx, __: click.Context, lines: list[str]) -> None:
    """Take the help of a command as it is: it is no reStructuredText.

    Names of options are code, and so is each line that click is not to wrap. In such a line, more
    than one blank stands between a word and its meaning.
    """
    for number, line in enumerate(lines):
        term, gap, meaning = re.sub(r" {2,}", "\0", line.removeprefix("| ")).partition("\0")
        if line.startswith("| ") and gap:
            lines[number] = f"| ``{term}``: {meaning}"
        elif line.startswith("| "):
            lines[number] = f"| ``{term}``"
        else:
            escaped = re.sub(r"([*`])", r"\\\1", line)
            lines[number] = re.sub(r"(?<![\w-])--[a-z][a-z-]*(?:=\w+)?", r"``\g<0>``", escaped)


def check_complete(_: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each public name that no page documents."""
    documented = set(env.domains.python_domain.objects)
    hooks = [name for name in vars(hookspecs) if name.startswith("pytest_vmsandbox_")]
    members = [
        f"{kind.__name__}.{name}"
        for kind in _WHOLE
        for name, value in inspect.getmembers(kind)
        if not name.startswith("_")
        and (callable(value) or isinstance(value, property | cached_property))
    ]
    wanted = {
        *(f"pytest_vmsandbox.{name}" for name in (*pytest_vmsandbox.__all__, *members)),
        *(f"{hookspecs.__name__}.{name}" for name in hooks),
    }
    for name in sorted(wanted - documented):
        _LOG.warning("no page documents %s", name)


def setup(app: Sphinx) -> dict[str, bool]:
    for directive in PythonDomain.directives.values():
        for kind in getattr(directive, "doc_field_types", ()):
            if kind.name == "variable":
                kind.label = "Attributes"  # as docstrings say
    app.add_object_type("fixture", "fixture", "%s (fixture)", objname="fixture")
    app.add_directive("pytest-fixtures", _Fixtures)
    app.add_directive("pytest-options", _Options)
    app.add_directive("pytest-ini-keys", _IniKeys)
    app.add_directive("bench-figures", _Figures)
    app.connect("sphinx-click-process-description", describe)
    app.connect("env-check-consistency", check_complete)
    return {"parallel_read_safe": True}
