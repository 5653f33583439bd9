"""``vmsandbox enter``: the kept guests of a failed test go on from the moment of the failure."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import inf
from typing import NoReturn

import click

from pytest_vmsandbox.cli import terminal, woken
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
from pytest_vmsandbox.guests.entering import all_entered
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.kept import Group, KeptGuest, KeptStore
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
@click.option(
    "--alone", is_flag=True, help="Wake only this guest, without the others of its networks."
)
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
    alone: bool,
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

    Guests of the test that were on common networks, such as the machines of a cluster, wake at the same
    moment, and reach each other as before. A second command, in another terminal, enters another one of
    them. They end when the last command has left. With --alone, only this guest wakes.

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
    wish = _Wish(command, _output_aside() if ssh else None, console=console, pdb=pdb)
    group = [kept] if alone else store.together(kept)
    if not alone and kept.group is not None:
        _tell_missing(kept.group, group)
    shared = None if alone or kept.group is None or len(kept.group.guests) == 1 else kept.group
    with in_use(store, kept), woken.entrance(store.root, shared) as entrance:
        if isinstance(entrance, woken.Visit):
            status = _visited(entrance, kept, wish)
        else:
            status = _woken(entrance, kept, group, wish)
    ctx.exit(passed_on(status))


@dataclass(frozen=True)
class _Wish:
    """How somebody wants to enter a guest: by a shell, if it is in no other way.

    Attributes:
        command: that runs instead.
        output: a descriptor for the SSH command line; None if it is not wanted.
        console: whether by its serial console.
        pdb: whether to debug its test.
    """

    command: tuple[str, ...]
    output: int | None
    console: bool
    pdb: bool

    def by_ssh(self, way: woken.Way) -> int:
        """Enter a guest by SSH. Returns the exit status."""
        return _shell(way, self.command) if self.output is None else _offer(way, self.output)


def _woken(door: woken.Door, kept: KeptGuest, group: Sequence[KeptGuest], wish: _Wish) -> int:
    """Wake guests, and enter one of them. Returns the exit status when all commands have left them."""
    group = [kept, *(it for it in group if it.key != kept.key)]
    with _running(group, console=wish.console) as guests, door.opened(guests, group):
        guest = guests[0]
        if wish.console:
            with guest.engine.use(hold=True) as its:
                terminal.converse(guest.console, lambda: its.machine.ended() is not None)
            status = 0
        elif wish.pdb:
            from pytest_vmsandbox.inside.debugging import debug

            status = debug(guest, kept.moment, patience=guest.engine.stretch(1.0))
        elif wish.command and not _is_at_terminal():
            status = attach(guest, wish.command, inf, woken.folder_in(guest, kept) or None)
        else:
            status = wish.by_ssh(woken.Way.into(guest, kept))
        _leave_to_others(door, guests[1:])
    return status


def _visited(visit: woken.Visit, kept: KeptGuest, wish: _Wish) -> int:
    """Enter a guest that another command has woken. Returns the exit status.

    Raises:
        ConfigError: only the other command can enter it in this way.
        GuestLost: the guest is gone, or the other command has ended.
    """
    again = f"{line(kept, several=True)} --alone"
    if wish.console or wish.pdb:
        raise ConfigError(
            f"{kept.guest} was woken by another command, so only that one has its console and its debugger",
            remedy=f"leave that command first, or wake another copy of the guest: {again}",
        )
    if wish.output is None:
        require_client(instead=f"{again} -- COMMAND")
    with Screen(stderr=True).waiting(f"entering {kept.guest}"):
        way = visit.way(kept)
    return wish.by_ssh(way)


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


def _tell_missing(group: Group, there: Sequence[KeptGuest]) -> None:
    """Say which guests of a group cannot wake any more."""
    names = {it.guest for it in there}
    if gone := [name for name in group.guests if name not in names]:
        Screen(stderr=True).say(
            f"not kept any more, so it does not wake: {', '.join(gone)}", "yellow"
        )


@contextmanager
def _running(group: Sequence[KeptGuest], *, console: bool) -> Iterator[list[Guest]]:
    """The guests, going on. The first one is entered. Our own lines go to standard error."""
    screen, kept = Screen(stderr=True), group[0]
    for it in group:
        if not it.has_memory:
            screen.say(f"{it.guest} was off when it was kept, so it boots from its disks", "dim")
    names = ", ".join(it.guest for it in group)
    with GuestFactory.open(Settings(), Announcer(screen.say)) as factory, ExitStack() as stack:
        try:
            with screen.waiting(f"entering {names}"):
                guests = stack.enter_context(all_entered(factory, group, wait=not console))
        except (BootError, GuestLost) as error:
            error.add_note(f"Look at its serial console: {line(kept, several=True)} --console")
            raise
        for guest in guests:
            for text in guest.engine.machines.faults.unrestored:
                screen.say(f"{guest.name}: {text}", "yellow")
        if screen.lively:
            screen.say(_introduced(kept, console=console, others=group[1:]), "dim")
        yield guests


def _leave_to_others(door: woken.Door, others: Sequence[Guest]) -> None:
    """Say which of the others were lost meanwhile, and wait for those who are in them."""
    screen = Screen(stderr=True)
    for guest in others:
        if (loss := guest.engine.loss) is not None:
            screen.say(f"lost meanwhile: {loss.brief}", "yellow")

    def tell(count: int) -> None:
        who = "another command is" if count == 1 else f"{count} other commands are"
        screen.say(f"{who} in these guests, which run until it has left. Ctrl-C ends them", "dim")

    with suppress(KeyboardInterrupt):
        door.await_others(tell)


def _introduced(kept: KeptGuest, *, console: bool, others: Sequence[KeptGuest] = ()) -> str:
    ago = _ago(wall() - kept.saved_at)
    text = f"{kept.moment.nodeid}, {why(kept)}, {ago}. Your changes are gone when you leave"
    if others:
        text += f"\nIn another terminal: {line(others[0], several=True)}"
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


def _shell(way: woken.Way, command: Sequence[str]) -> int:
    """A shell in the guest, or a command with our streams. Returns its exit status.

    Raises:
        GuestLost: the guest is gone.
    """
    words = shlex.split(way.ssh)
    if way.folder or command:
        # sshd starts it by the user's login shell, whatever that is.
        inside = f"cd {shlex.quote(way.folder)}; " if way.folder else ""
        inside += f"exec {shlex.join(command)}" if command else 'exec "${SHELL:-/bin/sh}" -l'
        more = []
        if _is_at_terminal() if command else sys.stdin.isatty():
            more = ["-t"]
        elif command and sys.stdin.isatty():  # then it has no input
            more = ["-n"]
        words = [words[0], *more, *words[1:], for_any_shell(inside)]
    status = foreground.run(words)
    if status == _SSH_FAILED:  # a guest that powers off closes its connections first
        deadline = Deadline(_END_SECONDS)
        while (loss := way.loss()) is None and not deadline.expired:
            deadline.pause(_LOOK_MS / 10_000)
        if loss is not None:
            raise loss
    return status


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


def _offer(way: woken.Way, output: int) -> int:
    """Write the command line that logs in, and wait until somebody wants us to end.

    Args:
        output: a descriptor for that line, which is closed then. So a shell that reads it goes on.

    Raises:
        GuestLost: the guest is gone.
    """
    before = {number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with os.fdopen(output, "w") as out:
            out.write(f"{way.ssh}\n")
        screen = Screen(stderr=True)
        if screen.lively:
            screen.say("the guest runs until you press Ctrl-C", "dim")
        _wait(way)
    except _Left:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _wait(way: woken.Way) -> None:
    """Wait for the end of standard input, if somebody can end it."""
    poller = select.poll()
    if _can_end(0):
        poller.register(0, select.POLLIN)
    while True:
        if poller.poll(_LOOK_MS) and not os.read(0, _CHUNK):
            return
        if (loss := way.loss()) is not None:
            raise loss


def _can_end(descriptor: int) -> bool:
    """Whether it is a terminal, a pipe or a socket. A file has ended, and a shell gives /dev/null."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)
