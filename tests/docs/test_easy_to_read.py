"""The pages are easy to read: README is short, and sentences are."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from support import terminal

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_LINES, MOST_WORDS = 100, 15
_MARKDOWN = MarkdownIt().enable("table")
_END = re.compile(r"(?<=[.!?])[)\"'»*_]*\s+")


def sentences(markdown: str) -> list[str]:
    """The sentences of a page's prose: of paragraphs and lists, not of headings, tables and code.

    Code within a sentence counts as one word, and a link by its text.
    """
    found: list[str] = []
    for before, token in zip([None, *(tokens := _MARKDOWN.parse(markdown))], tokens, strict=False):
        if before is not None and before.type == "paragraph_open":
            text = "".join(map(_text, token.children or ()))
            found += filter(re.compile(r"\w").search, _END.split(text))
    return [" ".join(sentence.split()) for sentence in found]


def _text(token: Token) -> str:
    if token.type in {"code_inline", "image"}:
        return "code" if token.type == "code_inline" else ""
    return " " if token.type in {"softbreak", "hardbreak"} else token.content


def mean_words(markdown: str) -> float:
    found = sentences(markdown)
    return sum(len(sentence.split()) for sentence in found) / max(len(found), 1)


class TestMeasuring:
    def test_prose_only(self):
        page = """\
# A heading has no words

One two three. Four `five five` [six](seven.md)
eight! Is 7.2 newer?

- a point

| a table | has none |
| --- | --- |
| nor its | cells. Or two |

```python
not = "a sentence. Nor two."
```

    nor. this
"""
        assert sentences(page) == [
            "One two three.", "Four code six eight!", "Is 7.2 newer?", "a point",
        ]  # fmt: skip
        assert mean_words(page) == (3 + 4 + 3 + 2) / 4

    def test_where_a_sentence_ends(self):
        assert len(sentences("**One.** (Two.) Three: and so on; still three. «Four.» Five")) == 5


def test_readme_is_short():
    text = README.read_text()
    assert sentences(text)
    assert len(text.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page):
    text = page.read_text()
    longest = sorted(sentences(text), key=lambda sentence: len(sentence.split()))[-3:]
    assert mean_words(text) <= MOST_WORDS, longest


def test_the_picture_shows_the_suite_of_today():
    """The suite has the tests that it had when tests/support/terminal.py recorded it."""
    svg = (ROOT / "docs/terminal.svg").read_text()
    shown = "".join(ET.fromstring(svg).itertext()).replace("\N{NO-BREAK SPACE}", " ")
    source = next(terminal.SUITE.glob("test_*.py")).read_text()
    names = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    wanted = {f"{name}[{image}]" for image in ("debian-12", "debian-13") for name in names}
    assert names
    assert set(re.findall(r"(test_\w+\[[\w-]+\])(?= PASSED)", shown)) == wanted
    assert f"{len(wanted)} passed" in shown
    assert terminal.COMMAND in shown
    assert "http" not in re.sub(r'"http://www\.w3\.org/\d+/svg"', "", svg).replace(
        "https://www.textualize.io", ""
    )
