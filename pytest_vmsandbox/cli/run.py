"""``vmsandbox run``: one command in a fresh guest, as if it ran here."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import click

from pytest_vmsandbox.cli.guests import fresh_guest
from pytest_vmsandbox.cli.options import guest_options
from pytest_vmsandbox.cli.streams import attach
from pytest_vmsandbox.core.settings import Settings


def _read_copies(
    _: click.Context, __: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[Path, str], ...]:
    """Read ``SRC:DEST``: a path of this machine, which exists, and one of the guest."""
    copies = []
    for value in values:
        source, colon, dest = value.rpartition(":")
        if not (source and colon and dest):
            raise click.BadParameter(f"{value!r} is not of the form SRC:DEST")
        if not Path(source).exists():
            raise click.BadParameter(f"{source!r} does not exist on this machine")
        copies.append((Path(source), dest))
    return tuple(copies)


def _read_words(_: click.Context, __: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what SSH could not carry."""
    for word in words:
        if not word.isascii() and any("\udc80" <= letter <= "\udcff" for letter in word):
            raise click.BadParameter(f"{word!r} is not UTF-8")
    return words


class _Run(click.Command):
    """Tells where the command begins, if an option of it was taken for one of ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ours = list(args)  # it is used up
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if "--" in ours[:-1]:
                raise
            raise click.UsageError(
                f"{error.format_message()} Put -- before the command: {ctx.command_path} IMAGE -- "
                "COMMAND...",
                ctx,
            ) from error


@click.command(cls=_Run)
@click.argument("image")
@click.argument(
    "command",
    nargs=-1,
    required=True,
    type=click.UNPROCESSED,
    callback=_read_words,
    metavar="-- COMMAND...",
)
@guest_options
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=float("inf"),
    show_default="none",
    metavar="SECONDS",
    help="For the command, once the guest is up. It is killed then, and the status is 1.",
)
@click.option(
    "--push",
    multiple=True,
    callback=_read_copies,
    metavar="SRC:DEST",
    help="Copy a file or folder into the guest before; repeatable.",
)
@click.pass_context
def run(
    ctx: click.Context,
    /,
    *,
    image: str,
    command: tuple[str, ...],
    timeout: float,
    push: tuple[tuple[Path, str], ...],
    settings: Settings,
    hardware: Mapping[str, str],
) -> None:
    """Run one command in a fresh guest; no shell reads it.

    Its standard streams are those of this command (its input only where that is no terminal), and
    so is its exit status; 128 + N if signal N ended it. The guest is gone afterwards.

    \b
    vmsandbox run debian-13 -- uname -a
    tar c src | vmsandbox run debian-13 --memory 1GiB -- sh -c 'tar x && make -C src'
    """  # noqa: D301  # a mark for click
    with fresh_guest(image, settings, hardware) as guest:
        for source, dest in push:
            guest.push(source, dest)
        status = attach(guest, command, stdin=_input(), timeout=timeout)
    ctx.exit(status if status >= 0 else 128 - status)


def _input() -> int | None:
    """Our standard input, if there is one that is not a person."""
    return None if sys.stdin is None or sys.stdin.isatty() else sys.stdin.fileno()
