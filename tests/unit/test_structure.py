"""How large functions, classes and modules are, with docstrings; and whether the page about them is complete."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest_vmsandbox

PACKAGE = Path(pytest_vmsandbox.__file__).parent
LIMITS = {"function": 60, "class": 450, "module": 600}


def test_nothing_is_too_large():
    sizes = [size for path in PACKAGE.rglob("*.py") for size in _sizes(path)]
    assert {kind for kind, *_ in sizes} == set(LIMITS)
    assert [size for size in sizes if size[2] > LIMITS[size[0]]] == []


def test_the_architecture_page_names_every_module_in_its_layer():
    page = (Path(__file__).parents[2] / "docs/architecture.md").read_text(encoding="utf-8")
    modules = page.partition("## Modules")[2].partition("\n## ")[0]
    named: dict[str, set[str]] = {}
    for section in modules.split("\n### ")[1:]:
        title, _, text = section.partition("\n")
        named["/".join(re.findall(r"`(\w+)/`", title))] = set(
            re.findall(r"`(?:\w+/)?(\w+\.py)`", text)
        )
    assert len(named) > 1
    for layers, names in named.items():
        files = [path for layer in layers.split("/") for path in (PACKAGE / layer).rglob("*.py")]
        there = {path.name for path in files}
        assert names - there == set(), f"{layers}: the page names what is not there"
        assert there - names - {"__init__.py"} == set(), f"{layers}: the page leaves out"
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {layer for layers in named for layer in layers.split("/")} == folders


def test_the_architecture_page_points_to_what_is_there():
    page = (Path(__file__).parents[2] / "docs/architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", page)
    assert places
    assert [f"{file}:{name}" for file, name in places if not _defines(PACKAGE / file, name)] == []


def _defines(path: Path, name: str) -> bool:
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    for part in name.split("."):
        inner = [child for node in nodes for child in ast.iter_child_nodes(node)]
        kinds = (ast.FunctionDef, ast.ClassDef)
        nodes = [child for child in inner if isinstance(child, kinds) and child.name == part]
    return bool(nodes)


def _sizes(path: Path) -> Iterator[tuple[str, str, int]]:
    """The kind, the name and the lines of a module, and of all that is defined in it."""
    text = path.read_text(encoding="utf-8")
    module = path.relative_to(PACKAGE).as_posix()
    yield "module", module, len(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            assert node.end_lineno is not None
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield kind, f"{module}:{node.name}", node.end_lineno - node.lineno + 1
