"""The command ``vmsandbox``. Subcommands are in modules here, imported when one is called."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

from pytest_vmsandbox.core.errors import INFRASTRUCTURE, ConfigError, LaunchError, VMSandboxError
from pytest_vmsandbox.core.text import printable

FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 1, 2, 69, 130

_COMMANDS = {  # name → help
    "quickstart": "Prepare this machine, and run a small test suite in guests.",
    "doctor": "Check this machine, and print a remedy for each problem.",
    "images": "List, build, lock and remove images.",
    "run": "Run one command in a fresh guest.",
    "shell": "Open an interactive shell in a fresh guest.",
    "enter": "Enter the kept guest of a failed test.",
    "kept": "List, share and remove the kept guests of failed tests.",
    "replay": "Repeat a recorded run of a test (experimental).",
    "clean": "Remove processes and files that killed runs left behind.",
    "bench": "Measure on this machine what guests cost.",
}
_MODULES = {"run": "guests", "shell": "guests"}  # commands whose module has another name


class Application(click.Group):
    """The group of all commands. It loads them on demand, and turns errors into exit statuses."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        if sys.platform == "win32" and cmd_name != "doctor":
            raise LaunchError("guests do not run on Windows", remedy="run vmsandbox on Linux")
        module = import_module(f"{__name__}.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the names and help of the commands, without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            raise  # click handles it quietly
        except (VMSandboxError, BaseExceptionGroup, OSError) as error:
            leaves = _leaves(error)
            if not all(isinstance(leaf, VMSandboxError | OSError) for leaf in leaves):
                raise
            for leaf in leaves:
                for line in (f"vmsandbox: {leaf}", *getattr(leaf, "__notes__", ())):
                    click.echo(printable(line), err=True)
            ctx.exit(max(map(exit_status, leaves)))


def exit_status(error: BaseException) -> int:
    """The exit status for an error."""
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
    epilog="Exit status: 0 for success, 1 if the command failed, 2 for wrong usage, 69 if the "
    "infrastructure (QEMU, an image, a guest) failed. 'run', 'shell' and 'enter' return the status "
    "of the program in the guest.",
)
@click.version_option(package_name="pytest-vmsandbox", message="vmsandbox %(version)s")
def application() -> None:
    """Fresh virtual machines, for tests and by hand."""


def main() -> None:
    """The entry point ``vmsandbox``."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # it is closed, and the next file that we open would get its number
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal lacks must not be an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    application(prog_name="vmsandbox")
