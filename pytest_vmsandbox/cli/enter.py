"""``vmsandbox enter``: the kept guest of a failed test goes on from the moment of the failure."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import inf
from typing import NoReturn

import click

from pytest_vmsandbox.cli import terminal
from pytest_vmsandbox.cli.guests import Passing, attach, passed_on, read_words
from pytest_vmsandbox.cli.kept import choose, guest_option, in_use, line, why
from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core import foreground
from pytest_vmsandbox.core.deadline import Deadline, wall
from pytest_vmsandbox.core.errors import BootError, ConfigError, GuestLost
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.text import one_line
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.entering import entered
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.kept import KeptGuest, KeptStore
from pytest_vmsandbox.guests.reaching.access import require_client
from pytest_vmsandbox.guests.reaching.commands import for_any_shell

_LOOK_MS = 1000  # how often we check that the guest is still there
_CHUNK = 4096
_END_SECONDS = 3.0  # between the end of a connection and that of its guest
_SSH_FAILED = 255  # its status if the connection broke, for instance
_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"))  # seconds of each


@click.command(cls=Passing)
@click.argument("nodeid")
@click.argument(
    "command", nargs=-1, type=click.UNPROCESSED, callback=read_words, metavar="[-- COMMAND...]"
)
@guest_option
@click.option("--ssh", is_flag=True, help="Print the SSH command line, and wait.")
@click.option("--console", is_flag=True, help="Use its serial console. Ctrl-] leaves.")
@click.option("--pdb", is_flag=True, help="Debug the test that failed inside the guest.")
@click.pass_context
def enter(
    ctx: click.Context,
    /,
    *,
    nodeid: str,
    command: tuple[str, ...],
    guest: str | None,
    ssh: bool,
    console: bool,
    pdb: bool,
) -> None:
    """Enter the kept guest of a failed test. It goes on from the moment of the failure.

    'pytest --vm-keep=failed' keeps guests, and prints this command for each. NODEID is the id of the
    test. You may leave out the image, and the folders at its beginning.

    A shell opens, for a test inside the guest in the project's folder there. With a COMMAND, that runs
    instead, as in 'vmsandbox run', and at a terminal it has one, too. The exit status is that of the
    shell or the COMMAND. What you change is gone afterwards: the kept guest stays as it was, and several
    people can enter it at once.

    --ssh prints a command line for other tools. The guest runs until Ctrl-C, a SIGTERM, or the end of
    standard input if that is a terminal or a pipe.

    --console is for a guest that panicked, hangs or has no network. It shows what was written to the
    serial console, then passes on what both sides write.

    --pdb is for a test inside the guest. It connects the terminal to pytest's debugger, in the
    interpreter that stands where the test failed.

    \b
    vmsandbox enter 'tests/test_app.py::test_start[debian-13]'
    vmsandbox enter test_app.py::test_start -- journalctl -b
    """  # noqa: D301  # a mark for click
    if sum(map(bool, (command, ssh, console, pdb))) > 1:
        raise ConfigError(
            "a COMMAND, --ssh, --console and --pdb exclude each other", remedy="use one of them"
        )
    store = KeptStore(cache_dir())
    kept = choose(store, nodeid, guest)
    _check(kept, console=console, pdb=pdb, shell=not (command or ssh or console or pdb))
    output = _output_aside() if ssh else -1
    with in_use(store, kept), _running(kept, console=console) as running:
        if console:
            with running.engine.use(hold=True) as its:
                terminal.converse(running.console, lambda: its.machine.ended() is not None)
            status = 0
        elif ssh:
            status = _offer(running, output)
        elif pdb:
            from pytest_vmsandbox.inside.debugging import debug

            status = debug(running, kept.moment, patience=running.engine.stretch(1.0))
        elif command and not _is_at_terminal():
            status = attach(running, command, inf, _folder(running, kept))
        else:
            status = _shell(running, kept, command)
    ctx.exit(passed_on(status))


def _check(kept: KeptGuest, *, console: bool, pdb: bool, shell: bool) -> None:
    """Check that this way in leads anywhere, before the guest goes on.

    Raises:
        ConfigError: --pdb has no terminal, or there is no interpreter to debug.
        GuestLost: the guest did not answer when it was kept.
        LaunchError: there is no SSH client for a shell.
    """
    moment = kept.moment
    mine = line(kept, several=True)
    if pdb:
        _check_debugger(kept)
    if not (console or kept.answers) and kept.has_memory:
        raise GuestLost(
            f"{kept.guest} did not answer when it was kept, so neither a shell nor a program gets there",
            details=f"{moment.nodeid}: {why(kept)}",
            remedy=f"use its serial console: {mine} --console",
        )
    if shell:
        require_client(instead=f"{mine} -- COMMAND, or {mine} --console")


def _check_debugger(kept: KeptGuest) -> None:
    moment = kept.moment
    if not moment.folder:
        raise ConfigError(
            f"{moment.nodeid} ran on the host, so no interpreter stands in its guest",
            remedy="debug it with 'pytest --pdb'. --pdb of this command is for tests inside the guest",
        )
    if not (moment.stands and kept.has_memory):
        raise ConfigError(
            f"no interpreter stands at an exception in {kept.guest}",
            details=f"{moment.nodeid}: {why(kept)}\n"
            "either the test ended without an exception (it passed, though an xfail may be strict), "
            "or its interpreter had ended or did not answer",
            remedy=f"look around in a shell: {line(kept, several=True)}",
        )
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "--pdb needs a terminal",
            remedy="run it in one, without redirecting its input or output",
        )


@contextmanager
def _running(kept: KeptGuest, *, console: bool) -> Iterator[Guest]:
    """The guest, going on. Our own lines go to standard error."""
    screen = Screen(stderr=True)
    if not kept.has_memory:
        screen.say(f"{kept.guest} was off when it was kept, so it boots from its disks", "dim")
    with GuestFactory.open(Settings(), Announcer(screen.say)) as factory, ExitStack() as stack:
        try:
            with screen.waiting(f"entering {kept.guest}"):
                guest = stack.enter_context(entered(factory.backend, kept, wait=not console))
        except (BootError, GuestLost) as error:
            error.add_note(f"Look at its serial console: {line(kept, several=True)} --console")
            raise
        if screen.lively:
            screen.say(_introduced(kept, console=console), "dim")
        yield guest


def _introduced(kept: KeptGuest, *, console: bool) -> str:
    ago = _ago(wall() - kept.saved_at)
    text = f"{kept.moment.nodeid}, {why(kept)}, {ago}. Your changes are gone when you leave"
    if not console:
        python = one_line(kept.moment.python)
        return f"{text}\nThe test's Python is {python}" if python else text
    return (
        f"{text}\nCtrl-] leaves. What you type has an effect only if a program in the guest reads its console, "
        "such as a login prompt"
    )


def _ago(seconds: float) -> str:
    """How long ago something was.

    Example:
        >>> _ago(7300)
        '2 hours ago'
    """
    for unit, name in _UNITS:
        if (count := int(seconds // unit)) > 0:
            return f"{count} {name}{'' if count == 1 else 's'} ago"
    return "just now"


def _is_at_terminal() -> bool:
    """Whether a COMMAND can have a terminal, as `top` or an editor needs it."""
    return sys.stdin.isatty() and sys.stdout.isatty() and shutil.which("ssh") is not None


def _shell(guest: Guest, kept: KeptGuest, command: Sequence[str]) -> int:
    """A shell in the guest, or a command with a terminal. Returns its exit status.

    Raises:
        GuestLost: the guest is gone.
    """
    words = shlex.split(guest.ssh_command)
    folder = _folder(guest, kept)
    if folder or command:
        # sshd starts it by the user's login shell, whatever that is.
        inside = f"cd {shlex.quote(folder)}; " if folder else ""
        inside += f"exec {shlex.join(command)}" if command else 'exec "${SHELL:-/bin/sh}" -l'
        terminal_too = ["-t"] if command or sys.stdin.isatty() else []
        words = [words[0], *terminal_too, *words[1:], for_any_shell(inside)]
    status = foreground.run(words)
    if status == _SSH_FAILED:  # a guest that powers off closes its connections first
        deadline = Deadline(_END_SECONDS)
        while (loss := guest.engine.loss) is None and not deadline.expired:
            deadline.pause(_LOOK_MS / 10_000)
        if loss is not None:
            raise loss
    return status


def _folder(guest: Guest, kept: KeptGuest) -> str | None:
    """Where a test inside has run, if it is still there."""
    folder = kept.moment.folder
    if not folder or guest.run(["test", "-d", folder], check=False).returncode:
        return None
    return folder


class _Left(Exception):
    """Somebody wants to end this command."""


def _leave(*_: object) -> NoReturn:
    raise _Left


def _output_aside() -> int:
    """Replace standard output by nothing, and return a descriptor of what it was.

    Programs that we start inherit standard output. A shell that reads ours would wait for these.
    """
    aside = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return aside


def _offer(guest: Guest, output: int) -> int:
    """Write the command line that logs in, and wait until somebody wants us to end.

    Args:
        output: a descriptor for that line, which is closed then. So a shell that reads it goes on.

    Raises:
        GuestLost: the guest is gone.
    """
    text = guest.ssh_command
    before = {number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with os.fdopen(output, "w") as out:
            out.write(f"{text}\n")
        screen = Screen(stderr=True)
        if screen.lively:
            screen.say(f"{guest.name} runs until you press Ctrl-C", "dim")
        _wait(guest)
    except _Left:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _wait(guest: Guest) -> None:
    """Wait for the end of standard input, if somebody can end it."""
    poller = select.poll()
    if _can_end(0):
        poller.register(0, select.POLLIN)
    while True:
        if poller.poll(_LOOK_MS) and not os.read(0, _CHUNK):
            return
        if (loss := guest.engine.loss) is not None:
            raise loss


def _can_end(descriptor: int) -> bool:
    """Whether it is a terminal, a pipe or a socket. A file has ended, and a shell gives /dev/null."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)
