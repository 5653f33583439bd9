"""The shell lines that a command becomes on its way into a guest (pure; POSIX shell)."""

from __future__ import annotations

import os
import re
import shlex

from pytest_vmsandbox.core.transport import Command

STARTED = "vmsandbox-started"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check(command: Command) -> None:
    """Check that a command can be started at all.

    Raises:
        ValueError: a NUL in a word, or an impossible name of a variable.
    """
    words = (*command.argv, command.cwd or "", *command.env.values())
    if any("\0" in word for word in words):
        raise ValueError("a NUL character cannot be part of a command")
    for name in command.env:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of an environment variable")


def command_line(command: Command, token: str) -> str:
    """The line for the login shell that runs `command`.

    Just before the program takes over the shell's process, the shell writes
    ``vmsandbox-started TOKEN PID`` to standard output: what comes before is the login shell's
    noise, what comes after is the program's, and PID is the process group to end.

    Raises:
        ValueError: see `check`.
    """
    check(command)
    lines = []
    if command.cwd is not None:
        lines.append(f"cd {shlex.quote(command.cwd)} || exit 126")
    for name, value in command.env.items():
        lines.append(f"export {name}={shlex.quote(value)}")
    lines.append(f'echo "{STARTED} {token} $$"')
    lines.append(f"exec {shlex.join(command.argv)}")
    script = "\n".join(lines)
    if command.user is not None:
        script = _as_user(command.user, script)
    # A process group of its own: OpenSSH makes one, other servers do not.
    return (
        f"s={shlex.quote(script)}; "
        "read -r _ _ _ _ group _ </proc/$$/stat 2>/dev/null || group=$$; "
        '[ "$group" = $$ ] && exec /bin/sh -c "$s"; exec setsid /bin/sh -c "$s"'
    )


def shipped(line: str) -> tuple[str, bytes]:
    """A short line that reads `line` from standard input first, and what to send there.

    Some servers drop a connection on which a long command is asked for.
    """
    data = os.fsencode(line)
    return f's=$(dd bs=1 count={len(data)} 2>/dev/null); exec /bin/sh -c "$s"', data


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
