"""A command for a guest, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import AnyStr, Generic


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


@dataclass(frozen=True, kw_only=True)
class CommandResult(Generic[AnyStr]):
    """What a program in the guest did.

    Attributes:
        argv: the program and its arguments.
        returncode: its exit status; −N when signal N ended it, as in `subprocess`.
        stdout, stderr: what it wrote: `str`, or `bytes` with ``text=False``.
        duration: seconds from its start to its end, seen from here.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: AnyStr
    stderr: AnyStr
    duration: float
