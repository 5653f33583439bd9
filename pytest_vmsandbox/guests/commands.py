"""Commands as users write them, and what came of them (pure)."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from pytest_vmsandbox.core.errors import CommandError, ConfigError
from pytest_vmsandbox.core.transport import Command, CommandResult
from pytest_vmsandbox.guests import script

Word = str | os.PathLike[str]  # or a path; in the guest a PurePosixPath, for instance
_NOT_FOUND = 127


def command(
    argv: Sequence[Word],
    *,
    cwd: Word | None = None,
    env: Mapping[str, Word] | None = None,
    user: str | None = None,
) -> Command:
    """What `Guest.run` is told, as values of the right types.

    Raises:
        TypeError: something is of another type.
        ValueError: `argv` is empty.
    """
    if isinstance(argv, str | bytes):
        raise TypeError("argv is a list of words; vm.shell() takes a script")
    words = tuple(script.word(word, "a word of argv") for word in argv)
    if not words:
        raise ValueError("argv is empty")
    if user is not None and not isinstance(user, str):
        raise TypeError(f"user is the name of one, a str, not {type(user).__name__}")
    return Command(
        argv=words,
        cwd=None if cwd is None else script.word(cwd, "cwd"),
        env={
            script.word(name, "the name of a variable"): script.word(value, f"env[{name!r}]")
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


def text_of(result: CommandResult[bytes]) -> CommandResult[str]:
    """The same with its streams as text; what cannot be decoded is replaced."""
    return CommandResult(
        argv=result.argv,
        returncode=result.returncode,
        stdout=result.stdout.decode(errors="replace"),
        stderr=result.stderr.decode(errors="replace"),
        duration=result.duration,
    )


def check(result: CommandResult[str] | CommandResult[bytes]) -> None:
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
