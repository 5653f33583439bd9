"""``vmsandbox run`` and ``vmsandbox shell``: a fresh guest for one command, or for a person."""

from __future__ import annotations

import io
import os
import select
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import click

from pytest_vmsandbox.cli.options import guest_options
from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core import foreground
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import CommandTimeout
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.reaching.access import require_client
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.reaching.process import RemoteProcess

_STDOUT, _STDERR = 1, 2
_CHUNK = 1 << 16
_LOOK_MS = 50  # how often we check whether the program still runs
_LONGEST_SECONDS = 3600.0  # for one call of poll


def _read_copies(
    _: click.Context, __: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[Path, str], ...]:
    """Read ``SRC:DEST``: an existing path of this machine, and a path in the guest."""
    copies = []
    for value in values:
        source, colon, dest = value.rpartition(":")
        if not (source and colon and dest):
            raise click.BadParameter(
                f"{value!r} is not of the form SRC:DEST, such as dist/app:/usr/local/bin/app"
            )
        if not Path(source).exists():
            raise click.BadParameter(f"{source!r} does not exist on this machine")
        copies.append((Path(source), dest))
    return tuple(copies)


def read_words(_: click.Context, __: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse words that SSH cannot carry."""
    for word in words:
        if not word.isascii() and any("\udc80" <= letter <= "\udcff" for letter in word):
            raise click.BadParameter(f"{word!r} is not UTF-8. Commands must be UTF-8")
    return words


class Passing(click.Command):
    """A command that runs another one. It explains ``--`` if an option of the guest's command is mistaken for one of ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ours = list(args)  # click empties `args`
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if "--" in ours[:-1]:
                raise
            raise click.UsageError(
                f"{error.format_message()} If it belongs to the command for the guest, put -- before that "
                f"command: {ctx.command_path} {str(self.params[0].name).upper()} -- COMMAND...",
                ctx,
            ) from error


@click.command(cls=Passing)
@click.argument("image")
@click.argument(
    "command",
    nargs=-1,
    required=True,
    type=click.UNPROCESSED,
    callback=read_words,
    metavar="-- COMMAND...",
)
@guest_options
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=float("inf"),
    show_default="none",
    metavar="SECONDS",
    help="Timeout of the command, after the guest is up. Then it is killed, and the exit status is 1.",
)
@click.option(
    "--push",
    multiple=True,
    callback=_read_copies,
    metavar="SRC:DEST",
    help="Copy a file or folder into the guest before the command runs. Repeatable.",
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
    """Run one command in a fresh guest. No shell reads it.

    The command gets the standard streams of vmsandbox, but standard input only if that is no terminal.
    Its exit status is passed through: 128 + N if signal N ended it. The guest is removed afterwards.

    \b
    vmsandbox run debian-13 -- uname -a
    tar c src | vmsandbox run debian-13 --memory 1GiB -- sh -c 'tar x && make -C src'
    """  # noqa: D301  # a mark for click
    with fresh_guest(image, settings, hardware) as guest:
        for source, dest in push:
            guest.push(source, dest)
        status = attach(guest, command, timeout)
    ctx.exit(passed_on(status))


@click.command
@click.argument("image")
@guest_options
@click.pass_context
def shell(
    ctx: click.Context, /, *, image: str, settings: Settings, hardware: Mapping[str, str]
) -> None:
    """Open an interactive shell in a fresh guest.

    When you leave the shell, the guest and everything in it is removed. The exit status is that of the
    shell, or 255 if the connection breaks.
    """
    require_client(instead=f"vmsandbox run {shlex.quote(image)} -- COMMAND")
    with fresh_guest(image, settings, hardware) as guest:
        screen = Screen(stderr=True)
        if screen.lively:
            screen.say(f"{guest.name}: this guest is removed when you leave the shell", "dim")
        status = foreground.run(shlex.split(guest.ssh_command))
    ctx.exit(passed_on(status))


def passed_on(status: int) -> int:
    """The exit status for that of a program, which is −N if signal N ended it."""
    return status if status >= 0 else 128 - status


@contextmanager
def fresh_guest(image: str, settings: Settings, hardware: Mapping[str, object]) -> Iterator[Guest]:
    """A guest that answers. It is removed at the end. Our own lines go to standard error.

    Raises:
        VMSandboxError: see `GuestFactory.boot`.
    """
    screen = Screen(stderr=True)
    with GuestFactory.open(settings, Announcer(screen.say)) as factory, ExitStack() as stack:
        with screen.waiting(f"starting {image}"):
            guest = stack.enter_context(factory.boot(image, **hardware))
        yield guest


def attach(guest: Guest, argv: Sequence[str], timeout: float, cwd: str | None = None) -> int:
    """Run a program in a guest on our standard streams, until it ends.

    Its input is empty if ours is a terminal.

    Args:
        timeout: seconds.
        cwd: the folder that it starts in; None for the user's home.

    Returns:
        Its exit status, −N if signal N ended it; −SIGPIPE if the reader of our output went away.

    Raises:
        CommandTimeout: it did not end in time and was killed, or nobody read its output in time.
        GuestLost: the guest is gone.
        OSError: one of our streams cannot be read or written.
    """
    deadline = Deadline(timeout)
    has_input = sys.stdin is not None and not sys.stdin.isatty()
    with guest.engine.explained():
        process = guest.engine.start(Command(argv=tuple(argv), cwd=cwd))
        try:
            return process.communicate(
                _Input(sys.stdin.fileno(), process) if has_input else None,
                partial(_write, _STDOUT, deadline),
                partial(_write, _STDERR, deadline),
                timeout,
            )
        except BrokenPipeError:
            return -signal.SIGPIPE
        finally:
            process.close()


class _Input(io.BufferedIOBase):
    """Reads a descriptor as long as a program in the guest runs."""

    def __init__(self, descriptor: int, process: RemoteProcess) -> None:
        self._descriptor = descriptor
        self._process = process

    def read(self, _: int | None = -1, /) -> bytes:
        """At least one byte; nothing at the end of the input or of the program."""
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        while not poller.poll(_LOOK_MS):
            if self._process.poll() is not None:
                return b""
        return os.read(self._descriptor, _CHUNK)


def _write(target: int, deadline: Deadline, data: bytes) -> None:
    """Write all of `data`, in pieces small enough for a pipe."""
    poller = select.poll()
    poller.register(target, select.POLLOUT)
    view = memoryview(data)
    while view:
        if poller.poll(deadline.remaining(_LONGEST_SECONDS) * 1000):
            view = view[os.write(target, view[: select.PIPE_BUF]) :]
        elif deadline.expired:
            raise CommandTimeout(
                f"nobody read the command's output within {deadline.seconds:g} s",
                seconds=deadline.seconds,
                remedy="read the output of vmsandbox run, or give it more time: --timeout",
            )
