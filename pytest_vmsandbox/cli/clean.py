"""``vmsandbox clean``: removes what killed runs left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from pytest_vmsandbox.cache.store import (
    CLUSTERS,
    EMULATORS,
    ENVIRONMENTS,
    HELPERS,
    KERNELS,
    TEMPLATES,
    Entry,
    Kind,
    Store,
    tidy,
)
from pytest_vmsandbox.cli.kept import by_image, total
from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.machine import orphans


@click.command
@click.option(
    "--templates",
    is_flag=True,
    help="Also remove all templates, sealed clusters, prepared kernels of yours and helpers, that no run uses now.",
)
@click.option(
    "--environments",
    is_flag=True,
    help="Also remove all cached Python packages for tests inside guests that no run uses now.",
)
def clean(*, templates: bool, environments: bool) -> None:
    """Remove processes and files that killed runs and builds left behind.

    Running tests are not touched. With --templates, clean also removes the saved guests from which
    clones are made. With --environments, it also removes the Python packages for tests inside guests.
    The next run that needs these makes them again. The kept guests of failed tests stay; 'kept rm'
    removes them.
    """
    screen = Screen()
    cache = paths.cache_dir()
    said: list[str] = []
    if ended := orphans.end_ownerless():
        said.append(f"ended: {_number(len(ended), 'launcher')} of killed runs, with all guests")
    if folders := orphans.remove_dead_runs(paths.runtime_dir()):
        said.append(f"removed: {_number(len(folders), 'folder')} of killed runs")
    if freed := tidy(cache, said.append):
        said.append(f"removed: incomplete files in the cache; freed {format_size(freed)}")
    if templates:
        said += _emptied(cache, TEMPLATES, "template")
        said += _emptied(cache, CLUSTERS, "sealed cluster")
        said += _emptied(cache, KERNELS, "kernel")
        said += _emptied(cache, HELPERS, "helper")
        said += _emptied(cache, EMULATORS, "emulator")
    if environments:
        said += _emptied(cache, ENVIRONMENTS, "environment")
    if sizes := [size for its in by_image(cache).values() for size in its]:
        said.append(f"kept: {total(sizes)}. To remove them: vmsandbox kept rm --all")
    for line in said or ["there is nothing to clean"]:
        screen.say(line)


def _emptied(cache: Path, kind: Kind, what: str) -> Iterator[str]:
    """Remove all things of a kind that nobody uses, and their locks."""
    store = Store(cache, kind, Entry)
    removed, freed, in_use = store.discard(store.folders())
    store.sweep()
    if removed:
        yield f"removed: {_number(removed, what)}; freed {format_size(freed)}"
    if in_use:
        yield f"kept: {_number(len(in_use), what)} in use"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
