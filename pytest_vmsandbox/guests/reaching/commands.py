"""Commands: what users write, the shell lines for it, and the results (pure)."""

from __future__ import annotations

import errno
import os
import re
import shlex
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pytest_vmsandbox.core.errors import CommandError, CommandResult, ConfigError

Sink = Callable[[bytes], object]  # gets a program's output as it comes
StrPath = str | os.PathLike[str]  # for a path in the guest, for instance a PurePosixPath
STARTED = "vmsandbox-started"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # of an environment variable
_PLAIN = frozenset(string.ascii_letters + string.digits + " _-./:=,+")
_NOT_FOUND = 127
_MAX_WORD = 131_072  # bytes, with the NUL at its end; the limit of Linux
_MAX_WORDS = 65_535  # the limit of the helper's protocol
_MAX_BYTES = (2 << 20) - (1 << 16)  # the usual limit of Linux, minus the guest's own environment
_POINTER = 8  # bytes that Linux adds for each word
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program to run in a guest.

    Attributes:
        argv: the program and its arguments. No shell reads them.
        cwd: the folder that it starts in; None for the user's home.
        env: variables to add to the user's environment.
        user: runs the command; None for the user of the connection.
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
    """Check the arguments of `Guest.run`, and make a `Command` from them.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `argv` is empty.
    """
    if isinstance(argv, str | bytes):
        raise TypeError(
            f"argv must be a list of words, not {type(argv).__name__}; for a script, use vm.shell()"
        )
    words = tuple(word(part, "a word of argv") for part in argv)
    if not words:
        raise ValueError("argv is empty: it must begin with a program")
    if user is not None and not isinstance(user, str):
        raise TypeError(f"user must be a str, not {type(user).__name__}")
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
    """A timeout as users write it.

    Raises:
        ConfigError: it is not a number of seconds.
    """
    if not is_number(timeout, int, float) or not timeout >= 0:
        raise ConfigError(
            f"timeout={timeout!r} is not a number of seconds", remedy="use a number of at least 0"
        )
    return float(timeout)


def is_number(value: object, *kinds: type) -> bool:
    """Whether a value has one of the types `kinds`. True and False are no numbers here."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def word(value: object, what: str) -> str:
    """A word or a path as text.

    Raises:
        TypeError: it is neither. `what` begins the message.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str or a path, not {type(value).__name__}")
    return text


# -- the shell lines they become (POSIX shell) ------------------------------------------------------


def too_long(command: Command) -> OSError:
    """The error for a command that is too long, like that of `subprocess`."""
    return OSError(errno.E2BIG, os.strerror(errno.E2BIG), command.argv[0])


def check_command(command: Command) -> None:
    """Check that a command can be started.

    Raises:
        ValueError: a word has a NUL, or the name of a variable is invalid.
        OSError: the command is too long for Linux or for the helper's protocol (E2BIG).
    """
    _check_length(command)
    words = (*command.argv, command.cwd or "", *command.env.values())
    if any("\0" in text for text in words):
        raise ValueError("a command cannot contain a NUL character")
    for name in command.env:
        if not NAME.fullmatch(name):
            raise ValueError(f"env: {name!r} is not a name for an environment variable")


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

    Just before the program replaces the shell, the shell writes ``vmsandbox-started TOKEN PID`` to
    standard output. Text before that line comes from the login shell, text after it from the program.
    PID is the process group to kill.

    Raises:
        ValueError: see `check_command`.
        OSError: see `check_command`.
    """
    return _as_leader(command, _script(command, token))


def shipped(command: Command, token: str) -> tuple[str, bytes]:
    """A short line that first reads the rest of the command from standard input, and that rest.

    Some servers drop a connection that requests a long command. And a shell accepts no script of more
    than 128 KiB as an argument.

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
    """The line that runs a script as the command's user, in a process group of its own."""
    if command.user is not None:
        script = _as_user(command.user, script)
    # OpenSSH makes a process group. Other servers do not.
    return (
        f"s={shlex.quote(script)}; "
        "read -r _ _ _ _ group _ </proc/$$/stat 2>/dev/null || group=$$; "
        '[ "$group" = $$ ] && exec /bin/sh -c "$s"; exec setsid /bin/sh -c "$s"'
    )


def for_any_shell(line: str) -> str:
    """A line for a login shell that is not like POSIX's, such as fish or tcsh: they agree on little.

    Only letters, digits and a few signs are there as they are, so no shell finds anything to expand.
    """
    encoded = "".join(
        char if char in _PLAIN else "".join(f"\\0{byte:03o}" for byte in os.fsencode(char))
        for char in line
    )
    return f'exec /bin/sh -c \'eval "$(printf %b "{encoded}")"\''


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


# -- results ----------------------------------------------------------------------------------------


def text_of(result: CommandResult[bytes]) -> CommandResult[str]:
    """The same result with its streams as text. Undecodable bytes are replaced."""
    return CommandResult(
        argv=result.argv,
        returncode=result.returncode,
        stdout=result.stdout.decode(errors="replace"),
        stderr=result.stderr.decode(errors="replace"),
        duration=result.duration,
    )


def ignore(_: bytes) -> None:
    """A `Sink` for output that nobody wants."""


def check_status(result: CommandResult[str] | CommandResult[bytes]) -> None:
    """Check that a program returned 0.

    Raises:
        CommandError: it returned something else.
    """
    if result.returncode == 0:
        return
    program, remedy = result.argv[0], ""
    brief = f"{shlex.join(result.argv)} returned {result.returncode}"
    if len(brief) > 500:  # a script
        brief = f"{brief[:500]}… returned {result.returncode}"
    said = result.stderr
    text = said if isinstance(said, str) else said.decode(errors="replace")
    if result.returncode == _NOT_FOUND and program in text:
        brief = f"command not found in the guest: {program}"
        remedy = (
            "install it in the guest, or copy it there with vm.push(). To run a script, use vm.shell(). "
            "Programs for root may not be in another user's PATH: pass user='root'"
        )
    raise CommandError(brief, result=result, remedy=remedy)


def cannot_log_in(user: str) -> ConfigError:
    """The error for a user who does not exist in the guest."""
    return ConfigError(
        f"user {user!r} cannot log in to the guest",
        remedy="use a user that exists in the guest: user= (marker vm, boot), vm_user (ini file), --user "
        "(vmsandbox)",
    )


def could_not_start(command: Command, status: int, stderr: str, stdout: str = "") -> CommandError:
    """The error for a command whose folder or user does not exist."""
    what = f"{command.argv[0]} could not be started"
    if command.user is not None:
        what += f" as {command.user}"
    if command.cwd is not None:
        what += f" in {command.cwd}"
    result = CommandResult(
        argv=command.argv, returncode=status, stdout=stdout, stderr=stderr, duration=0.0
    )
    remedy = "check that the folder (cwd=) and the user (user=) exist in the guest"
    return CommandError(what, result=result, remedy=remedy)
