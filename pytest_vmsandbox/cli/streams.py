"""A program in a guest on the standard streams of this process: bytes, passed on as they come."""

from __future__ import annotations

import io
import os
import select
import signal
from collections.abc import Sequence
from functools import partial

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import CommandTimeout
from pytest_vmsandbox.guests.commands import Command
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.process import RemoteProcess

_STDOUT, _STDERR = 1, 2
_CHUNK = 1 << 16
_LOOK_MS = 50  # how often it is looked whether the program still runs
_LONGEST_SECONDS = 3600.0  # that poll waits at a time


def attach(guest: Guest, argv: Sequence[str], *, stdin: int | None, timeout: float) -> int:
    """Run a program in a guest on our standard streams, to its end.

    Args:
        stdin: the descriptor of its input; None for an empty one.
        timeout: seconds.

    Returns:
        Its exit status, −N if signal N ended it; −SIGPIPE if our own reader went away before.

    Raises:
        CommandTimeout: it did not end in time, and was killed; or nobody took its output in time.
        GuestLost: the guest is gone.
        OSError: one of our streams cannot be read or written.
    """
    deadline = Deadline(timeout)
    with guest.engine.explained():
        process = guest.engine.start(Command(argv=tuple(argv)))
        try:
            return process.communicate(
                None if stdin is None else _Input(stdin, process),
                partial(_write, _STDOUT, deadline),
                partial(_write, _STDERR, deadline),
                timeout,
            )
        except BrokenPipeError:
            return -signal.SIGPIPE
        finally:
            process.close()


class _Input(io.BufferedIOBase):
    """What there is in a descriptor, as long as a program runs."""

    def __init__(self, descriptor: int, process: RemoteProcess) -> None:
        self._descriptor = descriptor
        self._process = process

    def read(self, _: int | None = -1, /) -> bytes:
        """What has come, at least a byte; nothing at its end, or that of the program."""
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        while not poller.poll(_LOOK_MS):
            if self._process.poll() is not None:
                return b""
        return os.read(self._descriptor, _CHUNK)


def _write(target: int, deadline: Deadline, data: bytes) -> None:
    """Write all of `data`, in pieces that a pipe takes at once."""
    poller = select.poll()
    poller.register(target, select.POLLOUT)
    view = memoryview(data)
    while view:
        if poller.poll(deadline.remaining(_LONGEST_SECONDS) * 1000):
            view = view[os.write(target, view[: select.PIPE_BUF]) :]
        elif deadline.expired:
            raise CommandTimeout(
                f"nobody took the output within {deadline.seconds:g} s", seconds=deadline.seconds
            )
