"""How large a function, a class and a module may be, counted with docstrings and comments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest_vmsandbox

PACKAGE = Path(pytest_vmsandbox.__file__).parent
LIMITS = {"function": 60, "class": 450, "module": 600}


def test_nothing_is_too_large():
    sizes = [size for path in PACKAGE.rglob("*.py") for size in _sizes(path)]
    assert {kind for kind, *_ in sizes} == set(LIMITS)
    assert [size for size in sizes if size[2] > LIMITS[size[0]]] == []


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
