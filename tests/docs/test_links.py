"""Links of the pages that are not on the site lead somewhere; Sphinx checks those of the others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "changelog.d/README.md")


def tokens(path):
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def targets(path):
    for token in tokens(path):
        if token.type in ("link_open", "image"):
            target = token.attrs.get("href") or token.attrs.get("src")
            if not re.match(r"[a-z]+:", target):
                yield target


def anchors(path):
    """The anchors that GitHub gives to headings."""
    found, heading = set(), False
    for token in tokens(path):
        if token.type == "inline" and heading:
            text = re.sub(r"[^\w\- ]", "", token.content.lower())
            found.add(text.replace(" ", "-"))
        heading = token.type == "heading_open"
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    path = ROOT / page
    for target in targets(path):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_some_are_found():
    assert any(targets(ROOT / "README.md"))
    assert "set-up" in anchors(ROOT / "CONTRIBUTING.md")
