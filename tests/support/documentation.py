"""The examples in README.md and below docs/, as tests run them.

CONTRIBUTING.md has the rules. What breaks one is in `Page.problems`, and is no example.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
FILE, PYTEST, NOT_RUN, STATUS = "file", "pytest", "not run", "status"

_COMMENT = re.compile(r"<!--\s*(?:([\w ]+?):)?\s*(.*?)\s*-->\s*", re.DOTALL)
_INSTEAD = {  # languages whose blocks would not run, though they look as if
    **dict.fromkeys(("py", "py3", "python3", "pycon"), "python"),
    **dict.fromkeys(("bash", "sh", "shell", "shell-session", "zsh"), "console"),
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """A block that runs.

    Attributes:
        page: where it is, relative to the project.
        line: of its beginning there.
        files: the name and the content of each file that it needs.
        status: what pytest, or the last command, has to end with.
    """

    page: str
    line: int
    files: Mapping[str, str]
    status: int = 0

    @property
    def place(self) -> str:
        """Its page and line, for people."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Suite(Example):
    """A block of tests.

    Attributes:
        arguments: of pytest.
        name: of the first test.
        count: how many there are, in all of the files.
    """

    arguments: Sequence[str]
    name: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Commands(Example):
    """A block of commands, which a shell reads one by one."""

    lines: Sequence[str]


@dataclass
class Page:
    """What is in a page: its examples, and what is wrong with it, each with its place."""

    name: str
    examples: list[Example] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def pages() -> list[Page]:
    """All pages whose examples run."""
    return [
        read(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
        for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    ]


def read(text: str, name: str) -> Page:
    """Read a page.

    Args:
        text: its Markdown.
        name: what it is called, with its suffix.
    """
    reader = _Reader(Page(name))
    for line, comments, fence in _blocks(MarkdownIt("commonmark").parse(text)):
        try:
            reader.take(line, comments, fence)
        except ValueError as error:
            reader.page.problems.append(f"{name}:{line}: {error}")
    reader.end()
    return reader.page


def _blocks(
    tokens: Sequence[Token], offset: int = 1
) -> Iterator[tuple[int, list[str], Token | None]]:
    """The line, the comments before, and the block; no block where comments are followed by none.

    Comments that are none of ours count on the line right before a block: they may be misspelt.
    """
    comments: list[str] = []
    begin = end = 0
    for token in tokens:
        line = (token.map[0] if token.map else 0) + offset
        if token.type == "html_block":
            begin = begin if comments else line
            end = (token.map[1] if token.map else 0) + offset
            comments.append(token.content)
        elif token.type == "fence" and token.info.startswith("{"):  # a directive of MyST
            if token.info.startswith(("{code", "{sourcecode")):
                token.info = "{code}"
                yield line, comments, token
            elif not token.info.startswith("{eval-rst"):
                yield from _blocks(MarkdownIt("commonmark").parse(token.content), line + 1)
            comments = []
        elif token.type == "fence":
            yield line, comments if end == line else [*filter(_is_ours, comments)], token
            comments = []
        elif comments:
            yield begin, [*filter(_is_ours, comments)], None
            comments = []
    if comments:
        yield begin, [*filter(_is_ours, comments)], None


class _Reader:
    """Reads one block after the other.

    A file lies beside the blocks that follow, up to the next block of tests, which it belongs to.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self._files: dict[str, str] = {}
        self._unused: dict[str, int] = {}  # and their lines

    def take(self, line: int, comments: Sequence[str], fence: Token | None) -> None:
        """Take a block.

        Raises:
            ValueError: it breaks a rule.
        """
        notes = _notes(comments)
        if fence is None:
            if notes:
                raise ValueError(f"the comment {next(iter(notes))!r} stands right before no block")
            return
        language = fence.info.split()[0] if fence.info.split() else ""
        if NOT_RUN in notes:
            if len(notes) > 1 or len(notes[NOT_RUN].split()) < 3:
                raise ValueError("'not run' stands alone, with a reason of at least three words")
        elif FILE in notes:
            if len(notes) > 1:
                raise ValueError("a block with a file's name is no example by itself")
            self._take_file(notes[FILE], fence.content, line)
        elif language == "python":
            self._take_tests(notes, fence.content, line)
        elif language == "console":
            self._take_commands(notes, fence.content, line)
        elif language == "{code}":
            raise ValueError("write a fenced block with a language instead of this directive")
        elif language in _INSTEAD:
            raise ValueError(
                f"a {language!r} block does not run: make it {_INSTEAD[language]!r}, or put "
                "<!-- not run: REASON --> before it"
            )
        elif notes:
            raise ValueError(f"the comment {next(iter(notes))!r} does nothing for this block")

    def _take_file(self, name: str, text: str, line: int) -> None:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} is no path in the example's folder")
        if name in self._unused:
            raise ValueError(f"{name} is written again before anything has used it")
        if path.suffix == ".py":
            _parsed(text)
        self._files[name] = text
        self._unused[name] = line

    def _take_tests(self, notes: Mapping[str, str], text: str, line: int) -> None:
        tests = _tests_of(text)
        if not tests:
            raise ValueError(
                "this python block has no test: write a whole test file, or put "
                "<!-- file: NAME --> before it"
            )
        own = f"test_{re.sub(r'[^a-z0-9]', '_', Path(self.page.name).stem.lower())}.py"
        files = {**self._files, own: text}
        self.page.examples.append(
            Suite(
                page=self.page.name,
                line=line,
                files=files,
                status=_status(notes),
                arguments=shlex.split(notes.get(PYTEST, "")),
                name=tests[0],
                count=sum(
                    len(_tests_of(content))
                    for name, content in files.items()
                    if re.fullmatch(r"test_.*\.py|.*_test\.py", PurePosixPath(name).name)
                ),
            )
        )
        self._files, self._unused = {}, {}

    def _take_commands(self, notes: Mapping[str, str], text: str, line: int) -> None:
        if PYTEST in notes:
            raise ValueError("'pytest' is for python blocks; write the arguments into the command")
        joined = text.replace("\\\n> ", "")
        lines = [part.removeprefix("$ ") for part in joined.splitlines() if part.startswith("$ ")]
        if not lines:
            raise ValueError("this console block has no line that begins with '$ '")
        self.page.examples.append(
            Commands(
                page=self.page.name,
                line=line,
                files=dict(self._files),
                status=_status(notes),
                lines=lines,
            )
        )
        self._unused = {}

    def end(self) -> None:
        """Nothing more comes."""
        for name, line in self._unused.items():
            self.page.problems.append(
                f"{self.page.name}:{line}: no block after this one uses the file {name}"
            )


def _is_ours(comment: str) -> bool:
    match = _COMMENT.fullmatch(comment)
    return match is not None and match[1] in (FILE, PYTEST, NOT_RUN, STATUS)


def _notes(comments: Sequence[str]) -> dict[str, str]:
    """What comments say about the block that follows."""
    notes: dict[str, str] = {}
    for comment in comments:
        match = _COMMENT.fullmatch(comment)
        if match is None or not _is_ours(comment):
            raise ValueError(f"{comment.strip()!r} is no comment that a block can have")
        notes[match[1]] = match[2]
    return notes


def _status(notes: Mapping[str, str]) -> int:
    text = notes.get(STATUS, "0")
    if not text.isdecimal():
        raise ValueError(f"{text!r} is no exit status")
    return int(text)


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"its line {error.lineno} is no Python: {error.msg}") from error


def _tests_of(text: str) -> list[str]:
    """The names of the tests in a file, also of those in classes."""
    body = list(_parsed(text).body)
    for node in _parsed(text).body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            body += node.body
    functions = (node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [node.name for node in functions if node.name.startswith("test_")]
