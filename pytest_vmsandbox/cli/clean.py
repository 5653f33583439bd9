"""``vmsandbox clean``: what is ours and nobody's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from pytest_vmsandbox.cache.store import ENVIRONMENTS, TEMPLATES, Entry, Kind, Store, tidy
from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.machine import orphans


@click.command
@click.option("--templates", is_flag=True, help="Also remove all templates that no run uses now.")
@click.option(
    "--environments",
    is_flag=True,
    help="Also remove all packages for tests in guests that no run uses now.",
)
def clean(*, templates: bool, environments: bool) -> None:
    """End and delete what is ours and ownerless.

    That is what runs and builds left that were killed. With --templates also the saved guests that
    clones are made of, and with --environments the Python packages for tests in guests: the next run
    that needs one makes it again.
    """
    screen = Screen()
    cache = paths.cache_dir()
    said: list[str] = []
    if ended := orphans.end_ownerless():
        said.append(f"ended: {_number(len(ended), 'launcher')} whose run is gone, with its guests")
    if folders := orphans.remove_dead_runs(paths.runtime_dir()):
        said.append(f"removed: {_number(len(folders), 'folder')} of runs that are gone")
    if freed := tidy(cache, said.append):
        said.append(
            f"removed: what was left in the cache half made or half removed; "
            f"{format_size(freed)} are free again"
        )
    if templates:
        said += _emptied(cache, TEMPLATES, "template")
    if environments:
        said += _emptied(cache, ENVIRONMENTS, "environment")
    for line in said or ["there is nothing to clean"]:
        screen.say(line)


def _emptied(cache: Path, kind: Kind, what: str) -> Iterator[str]:
    """Remove all of a kind that nobody uses, and the locks of what is gone."""
    store = Store(cache, kind, Entry)
    removed, freed, in_use = store.discard(store.folders())
    store.sweep()
    if removed:
        yield f"removed: {_number(removed, what)}; {format_size(freed)} are free again"
    if in_use:
        yield f"left alone: {_number(len(in_use), what)} in use"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
