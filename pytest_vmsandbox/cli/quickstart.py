"""``vmsandbox quickstart``: from a bare machine to tests that run in guests."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.cli import checks, foreground
from pytest_vmsandbox.cli.checks import Check, Status
from pytest_vmsandbox.cli.doctor import examine, show
from pytest_vmsandbox.cli.images import build_one
from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core.deadline import monotonic
from pytest_vmsandbox.core.settings import DEFAULT_IMAGE, Settings

_SUITE = Path(__file__).with_name("quickstart_suite")
_NEXT = """\
A test that asks for the fixture 'vm' gets a guest:   def test_it(vm): vm.run(["uname", "-a"])
Which guests it runs on, and all options:             pytest --vm='debian-*', pytest --help
More: the README, and the suite that ran just now:    {suite}"""


class Stop(Exception):
    """It cannot go on; the text says why."""


@click.command
@click.option("--yes", "-y", is_flag=True, help="Install what is missing without asking.")
@click.option(
    "--image", default=DEFAULT_IMAGE, show_default=True, metavar="NAME", help="The image to use."
)
@click.option("--only-install", is_flag=True, help="Install what is missing, and no more.")
@click.pass_context
def quickstart(ctx: click.Context, *, yes: bool, image: str, only_install: bool) -> None:
    """Make this machine ready for guests, and show a small suite running in them.

    It checks this machine, installs the system packages that are missing (it asks before), builds
    an image, and runs a small suite of real tests in guests. It can be repeated: what is there is
    left alone.
    """
    screen = Screen()
    definition = Catalogue().get(image)  # an unknown one is an error now, not later
    try:
        screen.say("Checking this machine", "bold")
        _prepare(screen, _check(screen), yes=yes)
        if only_install:
            return
        screen.say()
        build_one(definition)
        screen.say()
        screen.say("Running a small suite in guests; each test gets one of its own", "bold")
        _run_suite(screen, image)
    except Stop as reason:
        screen.say(str(reason), "bold red")
        ctx.exit(1)
    screen.say()
    screen.say(_NEXT.format(suite=_SUITE))


# -- the machine -----------------------------------------------------------------------------------


def _check(screen: Screen) -> list[Check]:
    """Look at the machine and say what is not as it should be."""
    with screen.waiting("looking"):
        found = list(examine(Settings(), screen))
    for check in found:
        # That no image is built is what we are here for.
        if check.status is not Status.OK and check.name != "images":
            show(screen, check)
    return found


def _prepare(screen: Screen, found: Sequence[Check], *, yes: bool) -> None:
    """Install what is missing, and look again.

    Raises:
        Stop: it was not installed, or something else is wrong with the machine.
    """
    wanted = tuple(dict.fromkeys(name for check in found for name in check.install))
    commands = [programs.as_root(argv) for check in found for argv in check.commands]
    if wanted or commands:
        _install(screen, wanted, commands, yes=yes)
        screen.say("Checking again", "bold")
        found = _check(screen)
    if checks.worst(found) is Status.FAILED:
        raise Stop("No guest can run on this machine as it is; the remedies are above.")
    screen.say("This machine can run guests.", "green")


def _install(
    screen: Screen, wanted: tuple[str, ...], commands: list[list[str]], *, yes: bool
) -> None:
    """Install packages and run commands, after asking.

    Raises:
        Stop: nobody could be asked, the answer was no, or it failed.
    """
    if wanted and programs.find("apt-get") is None:
        line = programs.install_line(wanted)
        raise Stop(f"Packages are installed with apt-get only; here it is up to you:\n  {line}")
    install = programs.apt_install(wanted)
    plan = [*([install] if wanted else []), *commands]
    screen.say("This is missing, and can be installed:")
    for argv in plan:
        screen.say(f"  {programs.shown(argv)}")
    if not yes:
        if not sys.stdin.isatty():
            raise Stop("There is nobody to ask: add --yes, or run that by hand.")
        if not click.confirm("Install it now?", default=False):
            raise Stop("Nothing was installed.")
    if os.geteuid() != 0 and programs.find("sudo") is None:
        raise Stop("That needs root, and there is no sudo: run it as root.")
    if wanted:
        _apt_install(screen, wanted)
    for argv in commands:
        _run(argv)


def _apt_install(screen: Screen, wanted: tuple[str, ...]) -> None:
    install = programs.apt_install(wanted)
    screen.say(f"Installing {', '.join(wanted)}")
    if programs.apt_knows(wanted) and foreground.run(install) == 0:
        return
    screen.say("Fetching the lists of packages")  # those here are older than what the mirror has
    _run(programs.as_root([*programs.APT_GET, "update"]))
    _run(install)


def _run(argv: list[str]) -> None:
    status = foreground.run(argv)
    if status != 0:
        raise Stop(f"{programs.shown(argv)} ended with status {status}")


# -- the suite -------------------------------------------------------------------------------------


def _run_suite(screen: Screen, image: str) -> None:
    """Run the tests where no configuration of anybody else is found.

    Raises:
        Stop: one of them failed.
    """
    began = monotonic()
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="vmsandbox-quickstart-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        suite = folder / "suite"
        shutil.copytree(_SUITE, suite, ignore=shutil.ignore_patterns("__pycache__"))
        environment = {**foreground.pytest_variables(), "PYTHONDONTWRITEBYTECODE": "1"}
        argv = [
            *(sys.executable, "-m", "pytest", "-p", foreground.PLUGIN, "-v", f"--vm={image}"),
            *("--durations=0", "--durations-min=1"),  # what it spends its time on
            *(f"--rootdir={suite}", "-c", str(suite / "pytest.ini")),
            *(f"--vm-artifacts={folder / 'artifacts'}", str(suite)),
        ]
        status = foreground.run(argv, cwd=suite, env=environment)
        screen.say()
        if status != 0:
            stack.pop_all()  # somebody may look at what is there
            raise Stop(f"The suite failed, status {status}; it and its artifacts are in {folder}")
    screen.say(
        f"Real machines were started, restarted, destroyed and filled up in "
        f"{monotonic() - began:.0f} s; nothing of them is left.",
        "bold green",
    )
