"""Commands: as users write them, the shell lines they become, and what came of them (pure)."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pytest_vmsandbox.core.errors import CommandError, CommandResult, ConfigError

Sink = Callable[[bytes], object]  # takes a program's output as it comes
StrPath = str | os.PathLike[str]  # in the guest a PurePosixPath, for instance
STARTED = "vmsandbox-started"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NOT_FOUND = 127
_MAX_WORD = 131_072  # bytes with the NUL at its end; Linux takes no longer one
_MAX_WORDS = 65_535  # the helper's protocol counts no further
_MAX_BYTES = (2 << 20) - (1 << 16)  # Linux's usual limit, but for the guest's own environment
_POINTER = 8  # bytes that Linux counts for each word besides
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program to run in a guest.

    Attributes:
        argv: the program and its arguments; no shell reads them.
        cwd: the folder it starts in; None for the user's home.
        env: variables added to the user's environment.
        user: who runs it; None for the user of the connection.
    """

    argv: tuple[str, ...]
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None


# -- as users write them ----------------------------------------------------------------------------


def command(
    argv: Sequence[StrPath],
    *,
    cwd: StrPath | None = None,
    env: Mapping[str, StrPath] | None = None,
    user: str | None = None,
) -> Command:
    """What `Guest.run` is told, as values of the right types.

    Raises:
        TypeError: something is of another type.
        ValueError: `argv` is empty.
    """
    if isinstance(argv, str | bytes):
        raise TypeError("argv is a list of words; vm.shell() takes a script")
    words = tuple(word(part, "a word of argv") for part in argv)
    if not words:
        raise ValueError("argv is empty")
    if user is not None and not isinstance(user, str):
        raise TypeError(f"user is the name of one, a str, not {type(user).__name__}")
    return Command(
        argv=words,
        cwd=None if cwd is None else word(cwd, "cwd"),
        env={
            word(name, "the name of a variable"): word(value, f"env[{name!r}]")
            for name, value in (env or {}).items()
        },
        user=user,
    )


def seconds(timeout: float) -> float:
    """A time-out as a user writes it.

    Raises:
        ConfigError: it is no number of seconds.
    """
    if not is_number(timeout, int, float) or not timeout >= 0:
        raise ConfigError(f"timeout={timeout!r} is not a number of seconds")
    return float(timeout)


def is_number(value: object, *kinds: type) -> bool:
    """Whether a value is of one of `kinds`; True and False are no numbers here."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def word(value: object, what: str) -> str:
    """A word or a path as text.

    Raises:
        TypeError: it is neither; `what` begins the message.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(f"{what} is a str or a path, not {type(value).__name__}")
    return text


# -- the shell lines they become (POSIX shell) ------------------------------------------------------


def too_long(command: Command) -> OSError:
    """The error of `subprocess` for a command that is too long."""
    return OSError(errno.E2BIG, os.strerror(errno.E2BIG), command.argv[0])


def check_command(command: Command) -> None:
    """Check that a command can be started at all.

    Raises:
        ValueError: a NUL in a word, or an impossible name of a variable.
        OSError: it is longer than Linux, or a way into a guest, can take (E2BIG).
    """
    _check_length(command)
    words = (*command.argv, command.cwd or "", *command.env.values())
    if any("\0" in text for text in words):
        raise ValueError("a NUL character cannot be part of a command")
    for name in command.env:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of an environment variable")


def _check_length(command: Command) -> None:
    words = [*command.argv, *(f"{name}={value}" for name, value in command.env.items())]
    sizes = [len(os.fsencode(text)) + 1 for text in words]
    if (
        max(len(command.argv), len(command.env)) > _MAX_WORDS
        or max(sizes) > _MAX_WORD
        or sum(sizes) + len(sizes) * _POINTER > _MAX_BYTES
    ):
        raise too_long(command)


def command_line(command: Command, token: str) -> str:
    """The line for the login shell that runs `command`.

    Just before the program takes over the shell's process, the shell writes
    ``vmsandbox-started TOKEN PID`` to standard output: what comes before is the login shell's
    noise, what comes after is the program's, and PID is the process group to end.

    Raises:
        ValueError: see `check_command`.
        OSError: see `check_command`.
    """
    return _as_leader(command, _script(command, token))


def shipped(command: Command, token: str) -> tuple[str, bytes]:
    """A short line that reads the rest from standard input first, and what to send there.

    Some servers drop a connection on which a long command is asked for; and a shell takes no script
    of more than 128 KiB as an argument.

    Raises:
        ValueError: see `check_command`.
        OSError: see `check_command`.
    """
    script = os.fsencode(_script(command, token))
    blocks = -(-len(script) // _BLOCK)
    take = (
        f"dd bs={_BLOCK} count={blocks} iflag=fullblock 2>/dev/null || "
        f"dd bs=1 count={blocks * _BLOCK} 2>/dev/null"
    )
    return _as_leader(command, f's=$({take}); eval "$s"'), script.ljust(blocks * _BLOCK, b"\n")


def _script(command: Command, token: str) -> str:
    check_command(command)
    lines = []
    if command.cwd is not None:
        folder = command.cwd if command.cwd.startswith("/") else f"./{command.cwd}"
        lines.append(f"cd {shlex.quote(folder)} || exit 126")
    for name, value in command.env.items():
        lines.append(f"export {name}={shlex.quote(value)}")
    lines.append(f'echo "{STARTED} {token} $$"')
    lines.append(f"exec {shlex.join(command.argv)}")
    return "\n".join(lines)


def _as_leader(command: Command, script: str) -> str:
    """The line that runs a script as the user of a command, in a process group of its own."""
    if command.user is not None:
        script = _as_user(command.user, script)
    # OpenSSH makes a process group, other servers do not.
    return (
        f"s={shlex.quote(script)}; "
        "read -r _ _ _ _ group _ </proc/$$/stat 2>/dev/null || group=$$; "
        '[ "$group" = $$ ] && exec /bin/sh -c "$s"; exec setsid /bin/sh -c "$s"'
    )


def kill_line(group: int, name: str) -> str:
    """The line that sends a signal to a process group."""
    return f"kill -{name} -{group}"


def _as_user(user: str, script: str) -> str:
    who, what = shlex.quote(user), shlex.quote(script)
    return (
        "if setpriv --version >/dev/null 2>&1; then\n"
        f'exec setpriv --reuid {who} --regid "$(id -g {who})" --init-groups --inh-caps=-all '
        f"--reset-env /bin/sh -c {shlex.quote('cd 2>/dev/null; ' + script)}\n"
        "fi\n"
        f"exec su -s /bin/sh {who} -c {what}"
    )


# -- what came of them ------------------------------------------------------------------------------


def text_of(result: CommandResult[bytes]) -> CommandResult[str]:
    """The same with its streams as text; what cannot be decoded is replaced."""
    return CommandResult(
        argv=result.argv,
        returncode=result.returncode,
        stdout=result.stdout.decode(errors="replace"),
        stderr=result.stderr.decode(errors="replace"),
        duration=result.duration,
    )


def check_status(result: CommandResult[str] | CommandResult[bytes]) -> None:
    """Check that a program returned 0.

    Raises:
        CommandError: it returned something else.
    """
    if result.returncode == 0:
        return
    program, remedy = result.argv[0], ""
    brief = f"{shlex.join(result.argv)} returned {result.returncode}"
    if len(brief) > 500:  # a script; its first line is enough
        brief = f"{brief[:500]}… returned {result.returncode}"
    said = result.stderr
    text = said if isinstance(said, str) else said.decode(errors="replace")
    if result.returncode == _NOT_FOUND and program in text:
        brief = f"command not found in the guest: {program}"
        remedy = "install it in the guest, or push it there; vm.shell() runs shell scripts"
    raise CommandError(brief, result=result, remedy=remedy)


def cannot_log_in(user: str) -> ConfigError:
    """A user of guests who does not exist in one."""
    return ConfigError(
        f"{user} cannot log in to the guest", remedy="name a user that exists in the guest"
    )


def could_not_start(command: Command, status: int, stderr: str, stdout: str = "") -> CommandError:
    """A command whose folder or user does not exist."""
    what = f"{command.argv[0]} could not be started"
    if command.user is not None:
        what += f" as {command.user}"
    if command.cwd is not None:
        what += f" in {command.cwd}"
    result = CommandResult(
        argv=command.argv, returncode=status, stdout=stdout, stderr=stderr, duration=0.0
    )
    remedy = "check that the folder and the user exist in the guest"
    return CommandError(what, result=result, remedy=remedy)
