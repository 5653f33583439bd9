"""``vmsandbox doctor``: what works on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pytest_vmsandbox.cli import checks
from pytest_vmsandbox.cli.checks import Check, Status
from pytest_vmsandbox.cli.options import image_path_option
from pytest_vmsandbox.cli.screen import Screen, write_json
from pytest_vmsandbox.core.settings import Settings

if TYPE_CHECKING:
    from pytest_vmsandbox.catalogue.definition import ImageDefinition  # not on Windows

_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red"}
_INDENT = 28  # of what was found


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@image_path_option
@click.pass_context
def doctor(ctx: click.Context, *, as_json: bool, image_path: tuple[Path, ...]) -> None:
    """Check this machine, and print a remedy for each problem.

    Guests can run despite warnings. If a check has failed, no guest can run, and the exit status is 1.
    """
    screen = Screen(stderr=as_json)
    found: list[Check] = []
    with screen.waiting("checking this machine"):
        for check in examine(Settings(image_path=image_path), screen):
            found.append(check)
            if not as_json:
                show(screen, check)
    worst = checks.worst(found)
    if as_json:
        told = ("name", "status", "found", "remedy")
        content = [{name: getattr(check, name) for name in told} for check in found]
        write_json({"ok": worst is not Status.FAILED, "checks": content})
    else:
        screen.say()
        screen.say(*_SUMMARIES[worst])
    ctx.exit(1 if worst is Status.FAILED else 0)


_SUMMARIES = {
    Status.OK: ("Guests can run here.", "bold green"),
    Status.WARNING: ("Guests can run here, but see the warnings above.", "bold"),
    Status.FAILED: (
        "No guest can run here yet. Run 'vmsandbox quickstart' to install what is missing.",
        "bold red",
    ),
}


def examine(
    settings: Settings, screen: Screen, image: ImageDefinition | None = None
) -> Iterable[Check]:
    """Check this machine.

    Args:
        settings: of the guests that will run here.
        screen: shows lines about long waits.
        image: also check what this one needs.
    """
    if sys.platform == "win32":  # nothing else of ours can be imported there
        return [checks.operating_system(sys.platform, "Windows")]
    from pytest_vmsandbox.cli import examine as examination  # not on Windows

    return examination.examine(settings, screen.say, image)


def show(screen: Screen, check: Check) -> None:
    """Show a check: what was found, and below it the remedy."""
    remedy = f"Remedy: {check.remedy}" if check.remedy else ""
    first, *further = [*screen.wrapped(check.found, _INDENT), *screen.wrapped(remedy, _INDENT)]
    screen.parts(
        (f"{check.status:8}", _STYLES[check.status]),
        (f"{check.name:{_INDENT - 8}}", "bold"),
        (first, ""),
    )
    for line in further:
        screen.say(f"{'':{_INDENT}}{line}")
