"""Output for people: lines and progress.

On a terminal it has colours and a moving line. Elsewhere it is plain text with one line for each event,
without escape codes.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import click

from pytest_vmsandbox.core.text import one_line, printable

if TYPE_CHECKING:  # importing rich takes longer than most commands that write a few lines
    from rich.console import Console
    from rich.progress import Progress

SCHEMA = 1  # of every --json
_NARROW = 20  # columns; we do not wrap lines for less
_FORCE = (
    "FORCE_COLOR",
    "TTY_COMPATIBLE",
)  # variables that make rich treat any stream as a terminal


class Screen:
    """One of the two standard streams.

    Args:
        stderr: whether it is the standard error; if not, it is the standard output.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        self._stderr = stderr
        stream = sys.stderr if stderr else sys.stdout
        self._is_plain = not (stream.isatty() or any(map(os.environ.get, _FORCE)))

    @cached_property
    def _console(self) -> Console:
        from rich.console import Console

        return Console(stderr=self._stderr, highlight=False, markup=False, emoji=False)

    @property
    def lively(self) -> bool:
        """Whether it is a terminal that can show moving lines."""
        return not self._is_plain and self._console.is_terminal and self._console.is_interactive

    def say(self, text: str = "", style: str = "") -> None:
        """Write a line. The terminal wraps a long one."""
        self.parts((text, style))

    def parts(self, *parts: tuple[str, str]) -> None:
        """Write a line of pieces, each a text and a style. No text has control sequences of its own."""
        parts = tuple((printable(text), style) for text, style in parts)
        if self._is_plain:
            click.echo("".join(text for text, _ in parts), err=self._stderr)
            return
        from rich.text import Text

        self._console.print(Text.assemble(*parts), soft_wrap=True)

    def wrapped(self, text: str, indent: int) -> list[str]:
        """`text` in lines that fit behind `indent` columns. Without a terminal it is one line."""
        is_terminal = not self._is_plain and self._console.is_terminal
        width = self._console.width - indent if is_terminal else 0
        if width < _NARROW:
            return [text] if text else []
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """While the block runs, show on a terminal what is going on and for how long."""
        if not self.lively:
            yield
            return
        with self._progress(transient=True) as progress:
            progress.add_task(text)
            yield

    @contextmanager
    def counting(self, text: str) -> Iterator[Callable[[int, int], object]]:
        """While the block runs, show on a terminal what is going on and how much of it is done.

        Yields:
            A function that gets how much is done, and how much there is.
        """
        if not self.lively:
            yield lambda *_: None
            return
        with self._progress(transient=True) as progress:
            task = progress.add_task(text)

            def tell(done: int, total: int) -> None:
                progress.update(task, description=f"{text}: {100 * done // max(total, 1)}%")

            yield tell

    @contextmanager
    def stages(self) -> Iterator[Callable[[str], None]]:
        """Show the stages of something, each with its time.

        Yields:
            A function that begins a stage, and gets its name. A text that begins with the name and a colon
            says how far the stage is.
        """
        if not self.lively:
            yield lambda text: self.say(f"  {one_line(text)}")
            return
        with self._progress(transient=False) as progress:

            def end() -> None:
                for task in progress.task_ids:
                    progress.update(task, completed=100)

            name = ""

            def begin(text: str) -> None:
                nonlocal name
                text = one_line(text)
                if name and text.startswith(f"{name}: "):
                    progress.update(progress.task_ids[-1], description=text)
                    return
                end()
                name = text
                progress.add_task(text)

            yield begin
            end()  # after an error, the last stage stays unfinished

    def _progress(self, *, transient: bool) -> Progress:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        return Progress(
            SpinnerColumn("line", finished_text="*"),  # in ASCII, for any terminal
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=transient,
        )


def write_json(content: Mapping[str, object]) -> None:
    """Write the output of ``--json``."""
    click.echo(json.dumps({"schema": SCHEMA, **content}, indent=2))
