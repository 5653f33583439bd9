"""The shell lines that a command becomes on its way into a guest (pure; POSIX shell)."""

from __future__ import annotations

import errno
import os
import re
import shlex

from pytest_vmsandbox.core.transport import Command

STARTED = "vmsandbox-started"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_WORD = 131_072  # bytes with the NUL at its end; Linux takes no longer one
_MAX_WORDS = 65_535  # the helper's protocol counts no further
_MAX_BYTES = (2 << 20) - (1 << 16)  # Linux's usual limit, but for the guest's own environment
_POINTER = 8  # bytes that Linux counts for each word besides
_BLOCK = 4096


def word(value: object, what: str) -> str:
    """A word or a path as text.

    Raises:
        TypeError: it is neither; `what` begins the message.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(f"{what} is a str or a path, not {type(value).__name__}")
    return text


def too_long(command: Command) -> OSError:
    """The error of `subprocess` for a command that is too long."""
    return OSError(errno.E2BIG, os.strerror(errno.E2BIG), command.argv[0])


def check(command: Command) -> None:
    """Check that a command can be started at all.

    Raises:
        ValueError: a NUL in a word, or an impossible name of a variable.
        OSError: it is longer than Linux, or a way into a guest, can take (E2BIG).
    """
    _check_length(command)
    words = (*command.argv, command.cwd or "", *command.env.values())
    if any("\0" in word for word in words):
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
        ValueError: see `check`.
        OSError: see `check`.
    """
    return _as_leader(command, _script(command, token))


def shipped(command: Command, token: str) -> tuple[str, bytes]:
    """A short line that reads the rest from standard input first, and what to send there.

    Some servers drop a connection on which a long command is asked for; and a shell takes no script
    of more than 128 KiB as an argument.

    Raises:
        ValueError: see `check`.
        OSError: see `check`.
    """
    script = os.fsencode(_script(command, token))
    blocks = -(-len(script) // _BLOCK)
    take = (
        f"dd bs={_BLOCK} count={blocks} iflag=fullblock 2>/dev/null || "
        f"dd bs=1 count={blocks * _BLOCK} 2>/dev/null"
    )
    return _as_leader(command, f's=$({take}); eval "$s"'), script.ljust(blocks * _BLOCK, b"\n")


def _script(command: Command, token: str) -> str:
    check(command)
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
