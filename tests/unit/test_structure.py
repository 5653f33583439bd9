"""How large a function, a class and a module may be, counted with docstrings and comments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pytest_vmsandbox

PACKAGE = Path(pytest_vmsandbox.__file__).parent
LIMITS = {"function": 60, "class": 450, "module": 600}


@pytest.mark.parametrize("kind", LIMITS)
def test_nothing_is_too_large(kind):
    found = {
        name: lines
        for path in PACKAGE.rglob("*.py")
        for of_kind, name, lines in _sizes(path)
        if of_kind == kind
    }
    assert len(found) > 50
    too_large = {name: lines for name, lines in found.items() if lines > LIMITS[kind]}
    assert not too_large


def _sizes(path: Path) -> Iterator[tuple[str, str, int]]:
    text = path.read_text(encoding="utf-8")
    module = path.relative_to(PACKAGE).as_posix()
    yield "module", module, len(text.splitlines())
    yield from _definitions(ast.parse(text), f"{module}:")


def _definitions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, str, int]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            assert node.end_lineno is not None
            yield kind, prefix + node.name, node.end_lineno - node.lineno + 1
            yield from _definitions(node, f"{prefix}{node.name}.")
        else:
            yield from _definitions(node, prefix)
