"""Every Python block of README.md that stands for itself does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parents[2]

README = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], path=str(ROOT), patterns=["README.md"]
).parse(ROOT / "README.md")


@pytest.mark.parametrize(
    "example", [pytest.param(example, id=f"line-{example.line}") for example in README.examples()]
)
def test_readme(example: Example) -> None:
    example.evaluate()
