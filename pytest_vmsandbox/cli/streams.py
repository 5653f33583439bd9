"""A program in a guest on the standard streams of this process: bytes, passed on as they come."""

from __future__ import annotations

import io
import os
import select
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from pytest_vmsandbox.core.deadline import Deadline, monotonic
from pytest_vmsandbox.core.errors import CommandTimeout, VMSandboxError
from pytest_vmsandbox.guests.process import Process

_STDOUT, _STDERR = 1, 2
_CHUNK = 1 << 16
_LOOK_SECONDS = 0.25  # how often it is looked whether our reader is still there
_TICK_SECONDS = 0.05
_QUIET_SECONDS = 0.5  # a stream that something else holds open is done when it was quiet so long
_DRAIN_SECONDS = 5.0  # and at the latest after so long, in which our reader could take more


def attach(process: Process, *, stdin: int | None, timeout: float) -> int:
    """Pass our standard streams on to a program in a guest until it ends.

    Args:
        process: made by `Guest.popen` with ``text=False``. It is over at the end.
        stdin: the descriptor of its input; None for an empty one.
        timeout: seconds.

    Returns:
        Its exit status, −N if signal N ended it; −SIGPIPE if our own reader went away before.

    Raises:
        CommandTimeout: it did not end in time, and was killed.
        GuestLost: the guest is gone.
        OSError: one of our streams cannot be read or written.
    """
    deadline = Deadline(timeout)
    pumps = [_Pump(process.stdout, _STDOUT), _Pump(process.stderr, _STDERR)]
    with _feeding(process, stdin) as errors, process:
        for pump in pumps:
            pump.start()
        while (status := _wait(process, deadline.remaining(_LOOK_SECONDS))) is None:
            for error in (*errors, *(pump.error for pump in pumps)):
                if isinstance(error, BrokenPipeError):
                    return -signal.SIGPIPE
                if error is not None:
                    raise error
            if deadline.expired:
                raise CommandTimeout(
                    f"{shlex.join(process.argv)} did not end in {timeout:g} s and was killed",
                    seconds=timeout,
                )
        _drain(pumps)
    return status


def _wait(process: Process, seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except CommandTimeout:
        return None


class _Pump(threading.Thread):
    """Copies what a program writes to a descriptor of ours, until it ends or cannot be written.

    Attributes:
        error: why it stopped, if not at the end of the stream.
    """

    def __init__(self, source: IO[Any], target: int) -> None:
        super().__init__(name=f"vmsandbox-output-{target}", daemon=True)
        self.error: OSError | None = None
        self._source = cast("io.BufferedReader", source)
        self._target = target
        self._writing = False
        self._last = monotonic()

    def run(self) -> None:
        try:
            while data := self._source.read1(_CHUNK):
                self._writing = True
                view = memoryview(data)
                while view:
                    view = view[os.write(self._target, view) :]
                self._last = monotonic()
                self._writing = False
        except OSError as error:
            self.error = error
        except VMSandboxError:
            pass  # the guest is gone: whoever waits for the program is told

    def stalled(self) -> bool:
        """Whether there is something that our reader does not take."""
        return self._writing and self.is_alive()

    def silent_since(self, moment: float, seconds: float) -> bool:
        """Whether nothing came in the last `seconds`, counted from `moment` at the earliest."""
        return not self.stalled() and monotonic() - max(moment, self._last) > seconds


def _drain(pumps: list[_Pump]) -> None:
    """Let `pumps` write what is left of a program that has ended."""
    ended, idle = monotonic(), 0.0
    while running := [pump for pump in pumps if pump.is_alive()]:
        if idle > _DRAIN_SECONDS or all(
            pump.silent_since(ended, _QUIET_SECONDS) for pump in running
        ):
            return
        running[0].join(_TICK_SECONDS)
        if not any(pump.stalled() for pump in running):
            idle += _TICK_SECONDS
    for pump in pumps:
        if pump.error is not None and not isinstance(pump.error, BrokenPipeError):
            raise pump.error


@contextmanager
def _feeding(process: Process, source: int | None) -> Iterator[list[OSError]]:
    """Copy `source` to the program's input, from a thread that is gone at the end.

    The program must be over by then. What goes wrong with `source` is added to what is yielded.
    """
    errors: list[OSError] = []
    if source is None:
        process.stdin.close()
        yield errors
        return

    over, end = os.pipe()

    def feed() -> None:
        try:
            while data := _read(source, over):
                _send(process, data)
        except OSError as error:
            errors.append(error)
        _send(process, None)

    thread = threading.Thread(target=feed, name="vmsandbox-input", daemon=True)
    thread.start()
    try:
        yield errors
    finally:
        os.close(end)
        thread.join()
        os.close(over)


def _read(source: int, over: int) -> bytes:
    """What there is in `source`; nothing at its end, or when `over` is closed on the far side."""
    poller = select.poll()
    poller.register(source, select.POLLIN)
    poller.register(over, select.POLLIN)
    ready = [descriptor for descriptor, _ in poller.poll()]
    return b"" if over in ready else os.read(source, _CHUNK)


def _send(process: Process, data: bytes | None) -> None:
    """Write to a program, or close its input. It need not read all of it, nor live so long."""
    try:
        if data is None:
            process.stdin.close()
        else:
            process.stdin.write(data)
            process.stdin.flush()
    except (OSError, EOFError, ValueError, VMSandboxError):
        pass  # whoever waits for the program is told
