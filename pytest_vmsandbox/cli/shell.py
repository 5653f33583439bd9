"""``vmsandbox shell``: a person in a fresh guest."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping

import click

from pytest_vmsandbox.cli import foreground
from pytest_vmsandbox.cli.options import guest_options
from pytest_vmsandbox.cli.run import fresh_guest
from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.core.settings import Settings


@click.command
@click.argument("image")
@guest_options
@click.pass_context
def shell(
    ctx: click.Context, /, *, image: str, settings: Settings, hardware: Mapping[str, str]
) -> None:
    """Open an interactive shell in a fresh guest.

    The guest is gone when you leave; so is all that you did in it. The exit status is that of the
    shell, or 255 when the connection broke.
    """
    if shutil.which("ssh") is None:
        raise LaunchError(
            "there is no SSH client on this machine",
            remedy="apt-get install openssh-client (Debian, Ubuntu); "
            f"without one: vmsandbox run {shlex.quote(image)} -- COMMAND",
        )
    with fresh_guest(image, settings, hardware) as guest:
        screen = Screen(stderr=True)
        if screen.lively:
            screen.say(f"{guest.name}: this guest is gone when you leave", "dim")
        status = foreground.run(shlex.split(guest.ssh_command))
    ctx.exit(status if status >= 0 else 128 - status)
