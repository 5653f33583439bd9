"""What people see: lines, and how long something has been going on.

On a terminal there are colours and a line that moves; elsewhere there is plain text, one line for
each thing that happens, and no escape codes.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

SCHEMA = 1  # of every --json
_NARROW = 20  # columns in which wrapping helps nobody


class Screen:
    """One of the two standard streams.

    Args:
        stderr: it is the standard error, not the standard output.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        self._console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)

    @property
    def lively(self) -> bool:
        """Whether somebody is looking at it, on something that can show movement."""
        return self._console.is_terminal and self._console.is_interactive

    def say(self, text: str = "", style: str = "") -> None:
        """Write a line; a long one is left to the terminal to wrap."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def parts(self, *parts: tuple[str, str]) -> None:
        """Write a line of pieces, each a text and a style."""
        self._console.print(Text.assemble(*parts), soft_wrap=True)

    def wrapped(self, text: str, indent: int) -> list[str]:
        """`text` in lines that fit behind `indent` columns; in one line but on a terminal."""
        width = self._console.width - indent
        if not self._console.is_terminal or width < _NARROW:
            return [text] if text else []
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show that something is going on and since when, on a terminal, while the block runs."""
        if not self.lively:
            yield
            return
        with self._progress(transient=True) as progress:
            progress.add_task(text)
            yield

    @contextmanager
    def stages(self) -> Iterator[Callable[[str], None]]:
        """Show something that goes on in stages, each with the time that it takes.

        Yields:
            A function that tells which stage begins.
        """
        if not self.lively:
            yield lambda text: self.say(f"  {text}")
            return
        with self._progress(transient=False) as progress:

            def end() -> None:
                for task in progress.task_ids:
                    progress.update(task, completed=100)

            def begin(text: str) -> None:
                end()
                progress.add_task(text)

            yield begin
            end()  # what has failed stays as it is

    def _progress(self, *, transient: bool) -> Progress:
        return Progress(
            SpinnerColumn("line", finished_text="*"),  # in ASCII, for any terminal
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=transient,
        )


def write_json(content: Mapping[str, object]) -> None:
    """Write what a program asked for with ``--json``."""
    click.echo(json.dumps({"schema": SCHEMA, **content}, indent=2))
