"""How commands reach a guest: the protocol that `Guest` needs, and the values that cross it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import AnyStr, Generic, Protocol


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


class RemoteProcess(Protocol):
    """A started program. Whoever starts one closes it."""

    def communicate(
        self,
        stdin: io.BufferedIOBase | None,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        timeout: float,
        idle: float = math.inf,
    ) -> int:
        """Feed `stdin`, hand on what is written, and return the exit status (−N: signal N).

        Raises:
            CommandTimeout: it did not end in `timeout` seconds, or not a byte went either way for
                `idle` seconds; its process group was killed.
            GuestLost: the guest or the connection to it is gone.
        """

    def send(self, data: bytes, timeout: float = math.inf) -> None:
        """Write all of `data` to its standard input.

        Raises:
            TimeoutError: it did not take all of it within `timeout` seconds.
            OSError: it ended, or the connection is gone.
            GuestLost: the guest is gone.
        """

    def receive(self, timeout: float) -> bytes:
        """What of its standard output has come, at least a byte; nothing at its end.

        Raises:
            TimeoutError: nothing came within `timeout` seconds.
            GuestLost: the guest is gone.
        """

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""

    def wait(self, timeout: float) -> int:
        """Wait for its end and return the exit status.

        Raises:
            CommandTimeout: it still runs after `timeout` seconds. It is left running.
        """

    def signal(self, name: str) -> None:
        """Send a signal, such as ``"TERM"``, to its process group."""

    @property
    def stdin(self) -> io.BufferedIOBase:
        """Its standard input, to write to and close."""

    @property
    def stdout(self) -> io.BufferedIOBase:
        """Its standard output, to read."""

    @property
    def stderr(self) -> io.BufferedIOBase:
        """Its standard error, to read."""

    def close(self) -> None:
        """Let go of it. A program that still runs is left running."""


class Transport(Protocol):
    """A way to run programs in one guest."""

    def start(self, command: Command) -> RemoteProcess:
        """Start a program.

        Raises:
            CommandError: the folder or the user of the command does not exist.
            OSError: the command is longer than a guest can take (E2BIG, as of `subprocess`).
            GuestLost: the guest is gone.
        """

    def close(self) -> None:
        """Close the connection. The next `start` makes a new one."""
