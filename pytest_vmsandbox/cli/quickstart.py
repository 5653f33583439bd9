"""``vmsandbox quickstart``: prepares a machine, and runs a small test suite in guests."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.cli import checks, pytest_environment
from pytest_vmsandbox.cli.building import build_one
from pytest_vmsandbox.cli.checks import Check, Status
from pytest_vmsandbox.cli.doctor import examine, show
from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core import foreground
from pytest_vmsandbox.core.deadline import monotonic
from pytest_vmsandbox.core.settings import DEFAULT_IMAGE, Settings

_SUITE = Path(__file__).with_name("quickstart_suite")
_NEXT = """\
Next, ask for the fixture 'vm' in a test:   def test_it(vm): vm.run(["uname", "-a"])
Choose images, and list all options:        pytest --vm='debian-*', pytest --help
Read the suite that has just run:           {suite}"""


class Stop(Exception):
    """The quickstart cannot go on; the text has the reason."""


@click.command
@click.option("--yes", "-y", is_flag=True, help="Install missing packages without asking.")
@click.option(
    "--image", default=DEFAULT_IMAGE, show_default=True, metavar="NAME", help="The image to use."
)
@click.option("--only-install", is_flag=True, help="Only install missing packages.")
@click.pass_context
def quickstart(ctx: click.Context, *, yes: bool, image: str, only_install: bool) -> None:
    """Prepare this machine for guests, and run a small test suite in guests.

    The command checks this machine, asks before it installs missing system packages, builds an image,
    and runs a small suite of real tests in guests. You can run it again: it changes only what is missing.
    """
    screen = Screen()
    definition = Catalogue().get(image)  # an unknown one is an error now, not later
    try:
        screen.say("Checking this machine", "bold")
        _prepare(screen, definition, yes=yes)
        if only_install:
            return
        screen.say()
        build_one(definition, Settings())
        screen.say()
        screen.say("Running a small test suite. Each test gets a guest of its own", "bold")
        _run_suite(screen, image)
    except Stop as reason:
        screen.say(str(reason), "bold red")
        ctx.exit(1)
    screen.say()
    screen.say(_NEXT.format(suite=_SUITE))


# -- the machine -----------------------------------------------------------------------------------


def _check(screen: Screen, image: ImageDefinition) -> list[Check]:
    """Check the machine and show the problems."""
    with screen.waiting("checking this machine"):
        found = list(examine(Settings(), screen, image))
    for check in found:
        # A missing image is built later.
        if check.status is not Status.OK and check.name != "images":
            show(screen, check)
    return found


def _prepare(screen: Screen, image: ImageDefinition, *, yes: bool) -> None:
    """Check the machine, install what an image needs, and check again.

    Raises:
        Stop: it was not installed, or the machine has another problem.
    """
    found = _check(screen, image)
    wanted = tuple(dict.fromkeys(name for check in found for name in check.install))
    commands = [programs.as_root(argv) for check in found for argv in check.commands]
    if wanted or commands:
        _install(screen, wanted, commands, yes=yes)
        screen.say("Checking again", "bold")
        found = _check(screen, image)
    if checks.worst(found) is Status.FAILED:
        raise Stop(
            "No guest can run on this machine yet. Follow the remedies above and start again."
        )
    screen.say("This machine can run guests.", "green")


def _install(
    screen: Screen, wanted: tuple[str, ...], commands: list[list[str]], *, yes: bool
) -> None:
    """Install packages and run commands, after asking.

    Raises:
        Stop: there is nobody to ask, the answer was no, or a command failed.
    """
    if wanted and programs.find("apt-get") is None:
        raise Stop(
            "The quickstart can install packages with apt-get only. Install them yourself, as the "
            "remedies above say, and start again."
        )
    install = programs.apt_install(wanted)
    plan = [*([install] if wanted else []), *commands]
    screen.say("Some packages or settings are missing. These commands will add them:")
    for argv in plan:
        screen.say(f"  {programs.shown(argv)}")
    if not yes:
        if not sys.stdin.isatty():
            raise Stop(
                "Standard input is no terminal, so nobody can confirm. Add --yes, or run these commands "
                "yourself."
            )
        if not click.confirm("Run them now?", default=False):
            raise Stop("Nothing was installed. Run these commands yourself, or start again.")
    if os.geteuid() != 0 and programs.find("sudo") is None:
        raise Stop("These commands need root, and there is no sudo. Start again as root.")
    if wanted:
        _apt_install(screen, wanted)
    for argv in commands:
        _run(argv)


def _apt_install(screen: Screen, wanted: tuple[str, ...]) -> None:
    install = programs.apt_install(wanted)
    screen.say(f"Installing {', '.join(wanted)}")
    if programs.apt_knows(wanted) and foreground.run(install) == 0:
        return
    screen.say("Updating the package lists")  # they may be older than what the mirror has
    _run(programs.as_root([*programs.APT_GET, "update"]))
    _run(install)


def _run(argv: list[str]) -> None:
    status = foreground.run(argv)
    if status != 0:
        raise Stop(
            f"{programs.shown(argv)} ended with status {status}. Correct the cause and start again."
        )


# -- the suite -------------------------------------------------------------------------------------


def _run_suite(screen: Screen, image: str) -> None:
    """Run the tests in a folder where pytest finds no other configuration.

    Raises:
        Stop: a test failed.
    """
    began = monotonic()
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="vmsandbox-quickstart-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        suite = folder / "suite"
        shutil.copytree(_SUITE, suite, ignore=shutil.ignore_patterns("__pycache__"))
        environment = {**pytest_environment.pytest_variables(), "PYTHONDONTWRITEBYTECODE": "1"}
        argv = [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-p",
                pytest_environment.PLUGIN,
                "-v",
                f"--vm={image}",
            ),
            *("--durations=0", "--durations-min=1"),  # shows what takes time
            *(f"--rootdir={suite}", "-c", str(suite / "pytest.ini")),
            *(f"--vm-artifacts={folder / 'artifacts'}", str(suite)),
        ]
        status = foreground.run(argv, cwd=suite, env=environment)
        screen.say()
        if status != 0:
            stack.pop_all()  # keep the folder
            raise Stop(
                f"The suite failed with status {status}. You find it, and its artifacts, in {folder}"
            )
    screen.say(
        f"The tests started, restarted and destroyed real machines in {monotonic() - began:.0f} s. "
        "Nothing of these is left.",
        "bold green",
    )
