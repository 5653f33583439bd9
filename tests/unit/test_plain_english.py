"""Nobody writes again in the way that users found hard to read: in the package, the quick start and the pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    ROOT / "quickstart.py",
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "pytest_vmsandbox").rglob("*.py")),
]
# The hard phrase, as a pattern, and what to write instead.
HARD = {
    r"\bselected are\b": "subject first: «tests run on the images given with --vm»",
    r"\balso runs when there was no\b": "say when it happens: «if you did not pass --vm»",
    r"\bof what (?:it|they) depends? on\b": "«its inputs»",
    r"\bbooted of\b": "«booted from»",
    r"\bwhat takes long to\b": "name it: «slow installations»",
    r"\b(?:took|takes?|taken) (?:\w+ )?(?:interpreter|guest|fixtures?) along\b": "«crashes», «ends»",
    r"\bsuch an? one\b": "name the thing",
    r"\bwhere there (?:is|are) (?:one|none|some|any)\b": "«if there is a …»",
    r"\brest that nobody\b": "«is paused»",
    r"\b(?:ours and|nobody's and) \w*(?:ownerless|nobody's)\b": "«left behind by killed runs»",
    r"\blet it be found\b": "«detect it»",
    r"\b(?:it|they) (?:was|were) to\b": "«had to», «were requested»",
    r"\bcannot be meant\b": "«is invalid»",
    r"\btime-?outs? (?:that|which) names? none\b": "«without a timeout»",
    r"\btime-outs?\b": "«timeout»",
    r"\bwhoever\b": "name the person or the thing",
    r"\banew\b": "«again», «new»",
    r"\bno affair of\b": "«does not concern»",
    r"\b(?:is|are) told of\b": "«gets a line about», «is called for»",
    r"\btells? of\b": "«reports»",
    r"\bput right\b|\bset right\b": "«correct», «restore»",
    r"\bhalf made\b": "«incomplete»",
    r"\b(?:can|cannot|could|not) be had\b": "«cannot be made», «cannot be downloaded»",
    r"\bin vain\b": "say what failed",
    r"\bhave (?:it|them) do so\b|\bhas it do so\b": "say what is done",
    r"\bgoes into the cold boot\b": "«as a ratio to the cold boot»",
    r"\bhalf characters?\b": "«lone surrogates»",
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_hard_phrase(text):
    words = " ".join(re.sub(r"(?m)^\s*#", " ", text.read_text(encoding="utf-8")).split())
    found = {
        words[max(0, hit.start() - 40) : hit.end() + 20]: instead
        for hard, instead in HARD.items()
        for hit in re.finditer(hard, words, re.IGNORECASE)
    }
    assert found == {}


def test_the_sentences_of_the_list_are_found():
    """The patterns know the sentences for which they were written."""
    said = [
        "Selected are `--vm` (repeatable), else the ini key `vm_images`, else `debian-13`.",
        "a literal name in a marker also runs when there was no `--vm`.",
        "again only when something changes of what it depends on",
        "Which network the guests have that are booted of it, `boot` says, as always.",
        "A test that takes its interpreter along fails, with the stack where there is one",
        "such a one has run its first program 14 ms after a test asks for it",
        "those rest that nobody has asked for anything in the last half second",
        "`clean` ends and deletes what is ours and nobody's",
        "let it be found out: --vm-accel=auto",
        "it was to run the tests in another order",
        "this value cannot be meant",
    ]
    for sentence in said:
        assert any(re.search(hard, sentence, re.IGNORECASE) for hard in HARD), sentence
