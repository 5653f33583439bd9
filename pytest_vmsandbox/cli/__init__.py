"""The command ``vmsandbox``. Subcommands are in modules here, imported when one is called."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

from pytest_vmsandbox.core.errors import INFRASTRUCTURE, ConfigError, LaunchError, VMSandboxError

FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 1, 2, 69, 130

_COMMANDS = {  # what they do
    "quickstart": "Make this machine ready, and show a small suite running in guests.",
    "doctor": "Say what works on this machine, and what does not.",
    "images": "List, build and remove images.",
    "run": "Run one command in a fresh guest.",
    "shell": "Open an interactive shell in a fresh guest.",
    "clean": "End and delete what is ours and ownerless.",
    "bench": "Measure on this machine what guests cost.",
}
_MODULES = {"run": "guests", "shell": "guests"}  # of those that are not called like theirs


class Application(click.Group):
    """The group of all commands: loads them when needed, and turns errors into exit statuses."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        if sys.platform == "win32" and cmd_name != "doctor":
            raise LaunchError("guests run on Linux and macOS, not on Windows")
        module = import_module(f"{__name__}.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write their names and what they do; no command has to be loaded for that."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            raise  # click ends quietly then
        except (VMSandboxError, BaseExceptionGroup, OSError) as error:
            leaves = _leaves(error)
            if not all(isinstance(leaf, VMSandboxError | OSError) for leaf in leaves):
                raise
            for leaf in leaves:
                for line in (f"vmsandbox: {leaf}", *getattr(leaf, "__notes__", ())):
                    click.echo(line, err=True)
            ctx.exit(max(map(exit_status, leaves)))


def exit_status(error: BaseException) -> int:
    """The exit status that an error stands for."""
    if isinstance(error, ConfigError):
        return USAGE
    return UNAVAILABLE if isinstance(error, (*INFRASTRUCTURE, OSError)) else FAILED


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


@click.group(
    cls=Application,
    name="vmsandbox",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 the thing asked for failed, 2 wrong usage, 69 the "
    "infrastructure failed. 'run' passes the guest's own status on.",
)
@click.version_option(package_name="pytest-vmsandbox", message="vmsandbox %(version)s")
def application() -> None:
    """Fresh virtual machines, for tests and by hand."""


def main() -> None:
    """The entry point ``vmsandbox``."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by whoever started us; the next file would get its number
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal lacks must not hide what is said.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    application(prog_name="vmsandbox")
