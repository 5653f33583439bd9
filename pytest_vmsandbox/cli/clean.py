"""``vmsandbox clean``: what is ours and nobody's."""

from __future__ import annotations

import click

from pytest_vmsandbox.catalogue import intake
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.guests.templates import TemplateStore
from pytest_vmsandbox.inside.environments_store import EnvironmentsStore
from pytest_vmsandbox.machine import orphans
from pytest_vmsandbox.machine.hypervisor import remove_dead_runs


@click.command
@click.option(
    "--templates",
    "all_templates",
    is_flag=True,
    help="Also remove all sealed templates that no run uses now.",
)
def clean(*, all_templates: bool) -> None:
    """End and delete what is ours and ownerless.

    That is what runs and builds left that were killed. With --templates also the sealed guests that
    clones are made of: the next run that needs one boots and seals it again.
    """
    screen = Screen()
    cache = paths.cache_dir()
    templates = TemplateStore(cache)
    said = []
    if ended := orphans.end_ownerless():
        said.append(f"ended: {_number(len(ended), 'launcher')} whose run is gone, with its guests")
    if folders := remove_dead_runs(paths.runtime_dir()):
        said.append(f"removed: {_number(len(folders), 'folder')} of runs that are gone")
    environments = EnvironmentsStore(cache)
    if freed := intake.sweep(ImageStore(cache)) + templates.sweep() + environments.sweep():
        said.append(
            f"removed: what was left in the cache half made or half removed; "
            f"{format_size(freed)} are free again"
        )
    if all_templates:
        removed, freed, stay = templates.discard(templates.folders())
        if removed:
            said.append(
                f"removed: {_number(removed, 'sealed template')}; {format_size(freed)} are free again"
            )
        if stay:
            said.append(f"left alone: {_number(stay, 'sealed template')} in use")
    templates.remove_locks()
    for line in said or ["there is nothing to clean"]:
        screen.say(line)


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
