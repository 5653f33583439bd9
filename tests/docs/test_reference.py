"""The reference is complete: nothing public is without a text, and nothing is missing on a page.

What Sphinx can see for itself is checked by docs/_extensions/reference.py while it builds the site.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cached_property
from pathlib import Path

import click
import pytest

import pytest_vmsandbox
from pytest_vmsandbox import cli, plugin
from pytest_vmsandbox.catalogue import definition, origin
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.cli import Application, application
from pytest_vmsandbox.core import spec
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import INFRASTRUCTURE, VMSandboxError
from pytest_vmsandbox.machine.console import Console
from pytest_vmsandbox.plugin import cluster_marker, config, hookspecs, plan
from pytest_vmsandbox.plugin.in_vm import guest_config

PACKAGE = Path(pytest_vmsandbox.__file__).parent
PAGES = Path(__file__).parents[2] / "docs/reference"
TABLES = definition._TABLES


def page(name):
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


# -- docstrings and help ----------------------------------------------------------------------------


def public_objects():
    """Each public class, and its public methods and properties."""
    for name in (*pytest_vmsandbox.__all__, "Console"):
        found = Console if name == "Console" else getattr(pytest_vmsandbox, name)
        yield name, found
        for attribute, value in ours(found):
            if callable(value) or isinstance(value, property | cached_property):
                yield f"{name}.{attribute}", value


def ours(kind):
    """The attributes of a class that it does not have from Python, with those of its parts."""
    members = [name for base in kind.mro() if base.__module__ != "builtins" for name in vars(base)]
    for name in dict.fromkeys(members):
        if not name.startswith("_"):
            yield name, inspect.getattr_static(kind, name)


def hooks():
    return [name for name in vars(hookspecs) if name.startswith("pytest_vmsandbox_")]


@pytest.mark.parametrize(("name", "value"), [*public_objects()])
def test_each_public_name_has_a_docstring(name, value):
    assert own_doc(value)


def own_doc(value):
    """A docstring that somebody has written: neither inherited, nor made by `dataclass`."""
    doc = inspect.unwrap(value).__doc__ if callable(value) else value.__doc__
    is_made = inspect.isclass(value) and doc and doc.startswith(f"{value.__name__}(")
    return "" if is_made else doc


@pytest.mark.parametrize("name", hooks())
def test_each_hook_has_a_docstring(name):
    assert getattr(hookspecs, name).__doc__
    assert name in page("hooks")


def fixtures():
    return [
        name
        for name, value in vars(plugin).items()
        if type(value).__name__ == "FixtureFunctionDefinition" and not name.startswith("_")
    ]


def test_fixtures():
    assert set(fixtures()) == {"vm", "vm_cluster", "vm_factory", "vm_prepared", "vm_artifacts"}
    assert all(getattr(plugin, name).__doc__ for name in fixtures())


def commands(command=application, path="vmsandbox"):
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), f"{path} {name}")


@pytest.mark.parametrize(("path", "command"), [*commands()])
def test_each_command_and_its_options_have_a_help(path, command):
    assert command.help
    if isinstance(command, Application):
        assert set(command.list_commands(click.Context(command))) == set(cli._COMMANDS)
    options = [each for each in command.params if isinstance(each, click.Option)]
    assert [each.name for each in options if not each.help] == []


class Parser:
    """Takes what is registered."""

    def __init__(self):
        self.help = {}

    def getgroup(self, *_):
        return self

    def addoption(self, name, **arguments):
        self.help[name] = arguments.get("help")

    def addini(self, name, about, **_):
        self.help[name] = about


def test_each_option_and_ini_key_has_a_help():
    parser = Parser()
    config.add_options(parser)  # type: ignore[arg-type]  # it has what is called of one
    assert len(parser.help) > 20
    assert all(parser.help.values())
    known = " ".join(parser.help)
    for about in parser.help.values():  # which the reference makes links of
        assert {*re.findall(r"--[\w-]+|\bvm_\w+", about)} <= {*known.split()}


# -- pages written by hand ----------------------------------------------------------------------------


def test_the_page_on_markers_has_each_argument():
    for name in (*plan._ARGUMENTS, *cluster_marker.ARGUMENTS):
        assert re.search(rf"^\| `{name}` \|", page("marker"), re.MULTILINE), name


def test_the_page_on_image_toml_has_each_key_in_its_section():
    keys = {
        "top": set(definition._KEYS) - {*TABLES},
        **{table: set(keys) for table, keys in TABLES.items()},
    }
    sections = re.split(r"^## ", page("image-toml"), flags=re.MULTILINE)
    named = {}
    for section in sections:
        title = re.match(r"`\[(\w+)\]`|At the (top)", section)
        if title:
            named[title[1] or title[2]] = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert named == keys
    values = (*origin.FORMATS, *origin.METHODS, *spec.FIRMWARE, *definition.INITS)
    for value in (*values, *ARCHITECTURES):
        assert f'`"{value}"`' in page("image-toml"), value


def definitions():
    """The definitions that pages have as examples: where, and their text."""
    for path in sorted(PAGES.parent.rglob("*.md")):
        for found in re.finditer(
            r"^```toml\n(schema = .*?)^```", path.read_text(), re.MULTILINE | re.DOTALL
        ):
            name = re.search(r'description = "(\w+)', found[1])
            yield pytest.param(found[1], id=f"{path.stem}-{name[1] if name else found.start()}")


@pytest.mark.parametrize("text", [*definitions()])
def test_definitions_in_the_documentation_are_valid_and_short(tmp_path, text):
    folder = tmp_path / "images" / "mine"
    folder.mkdir(parents=True)
    (folder / "image.toml").write_text(text)
    (folder / "setup.sh").touch()
    (folder / "build").touch(mode=0o755)
    assert Catalogue([folder.parent]).get("mine").digest
    assert len(text.splitlines()) < 25


def test_there_are_such_definitions():
    assert len([*definitions()]) >= 4


def test_the_page_on_exit_statuses_has_each_of_the_command():
    for status in (0, cli.FAILED, cli.USAGE, cli.UNAVAILABLE, cli.INTERRUPTED):
        assert re.search(rf"^\| {status} \|", page("exit-statuses"), re.MULTILINE), status


def test_the_page_on_errors_has_each_of_them():
    text = page("errors")
    (line,) = re.findall(r"That is so for ([^.]*)\.", text)
    assert set(re.findall(r"\w+Error|GuestLost", line)) == {one.__name__ for one in INFRASTRUCTURE}
    public = [getattr(pytest_vmsandbox, name) for name in pytest_vmsandbox.__all__]
    errors = [one.__name__ for one in public if issubclass(one, VMSandboxError)]
    assert sorted(re.findall(r"autoexception:: (\w+)\(\)", text)) == sorted(errors)


def variables():
    """The names of variables of the environment that the code reads or sets.

    Returns:
        Them, and the modules where a name is no constant.
    """
    names, computed = set(), set()
    for path in [*PACKAGE.rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        names |= set(re.findall(r"\bVMSANDBOX_[A-Z_]+\b", text))
        module = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
        for key in keys(ast.parse(text)):
            if isinstance(key, ast.Constant):
                names.add(key.value)
            elif isinstance(key, ast.Name) and key.id.isupper():
                names.add(getattr(importlib.import_module(module), key.id))
            else:
                computed.add(path.relative_to(PACKAGE).as_posix())
    return names, computed


def keys(tree):
    """What `os.environ` is asked for, as expressions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            yield node.slice
        elif isinstance(node, ast.Compare) and is_environ(node.comparators[-1]):
            yield node.left
        elif isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
            is_read = is_environ(node.func.value) and node.func.attr in ("get", "pop", "setdefault")
            if is_read or node.func.attr in ("getenv", "putenv"):
                yield node.args[0]


def is_environ(node):
    return ast.unparse(node) in ("os.environ", "environ")


def test_the_page_on_the_environment_has_each_variable():
    names, computed = variables()
    assert {"VMSANDBOX_CACHE", "VMSANDBOX_QEMU", "TMPDIR", "CI"} <= names
    # There they are those of pytest-xdist, those that users name in `vm_env`, and one for each architecture.
    assert computed == {"plugin/config.py", "plugin/in_vm/guest_config.py", "machine/qemu.py"}
    names ^= {
        "VMSANDBOX_QEMU_",
        *(f"VMSANDBOX_QEMU_{one.debian.upper()}" for one in ARCHITECTURES.values()),
    }
    named = set(
        re.findall(r"(?:`|^|} )([A-Z][A-Z_0-9]+)(?:`|$)", page("environment"), re.MULTILINE)
    )
    assert {*names, *guest_config._XDIST_VARIABLES} - named == set()
