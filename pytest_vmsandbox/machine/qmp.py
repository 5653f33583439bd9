"""The QEMU machine protocol. Only this module uses `qemu.qmp`."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import IO, Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate

from pytest_vmsandbox.core.deadline import Deadline, monotonic, wall
from pytest_vmsandbox.core.errors import MonitorError
from pytest_vmsandbox.machine.host import USUAL_GREETING, Pace
from pytest_vmsandbox.machine.loop import LoopThread

Event = Mapping[str, Any]
_ANSWER_SECONDS = 30.0
_AGAIN_SECONDS = 1.0  # the same, while QEMU owes an answer: it was stopped, perhaps
_CLOSE_SECONDS = 5.0


class Monitor:
    """A connection to QEMU's monitor, used from any thread.

    Args:
        log: a file for the protocol's log, or None.
        pace: what we know about this host's speed.
        former: the events of the QEMU that the guest moves away from. Their numbers stay valid.

    Attributes:
        is_stopped: whether a fault has stopped QEMU, so no answer comes.
    """

    def __init__(
        self, loop: LoopThread, log: IO[str] | None, pace: Pace, former: Sequence[Event] = ()
    ) -> None:
        self._loop = loop
        self._log = log
        self._pace = pace
        self.is_stopped = False
        self._client = QMPClient("vmsandbox")
        self._client.logger.disabled = True  # it raises what it logs
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        self._events: list[Event] = list(former)
        self._former = len(former)
        self._arrived = threading.Condition()
        self._owes = False  # whether the last answer has not come in time
        self._passing = threading.Lock()  # QEMU keeps one descriptor until a command takes it

    @contextmanager
    def connected(self, sock: socket.socket, *, timeout: float) -> Iterator[None]:
        """Talk to a QEMU that was just started, on our end of a socket pair. It takes over the socket.

        Args:
            timeout: seconds for QEMU to greet us, on a usual machine.

        Raises:
            MonitorError: QEMU did not greet us in time.
        """
        started = monotonic()
        try:
            self._await(self._client.connect(sock), timeout, "greeting")
            self._pace.took(monotonic() - started, usual=USUAL_GREETING)
            pump = self._loop.submit(self._pump())
            try:
                yield
            finally:
                pump.cancel()
        finally:
            # If QEMU ended first, disconnect() raises what ended the connection.
            with suppress(MonitorError):
                self._await(self._client.disconnect(), _CLOSE_SECONDS, "disconnect")

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        fd: int | None = None,
        timeout: float = _ANSWER_SECONDS,
    ) -> Any:
        """Execute a command, with a descriptor passed along, and return its answer.

        Args:
            timeout: seconds for the answer, on a usual machine.

        Raises:
            MonitorError: QEMU refused it, did not answer in time, or is gone.
        """
        self._record("->", {"execute": command, "arguments": dict(arguments or {})})
        if self._owes:
            timeout = min(timeout, _AGAIN_SECONDS)
        try:
            with nullcontext() if fd is None else self._passing:
                answer = self._await(self._execute(command, arguments, fd), timeout, command)
        except MonitorError as error:
            self._owes = error.transient
            self._record("<-", {"error": error.brief})
            raise
        self._owes = False
        self._record("<-", {"return": answer})
        return answer

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self._client.runstate is not Runstate.RUNNING

    def events(self) -> list[Event]:
        """All events so far."""
        with self._arrived:
            return list(self._events)

    def follow(self, former: Monitor) -> None:
        """Note what QEMU has told to a former monitor since this one was made. The guest moves now."""
        late = former.events()[self._former :]
        with self._arrived:
            self._events += late
            self._arrived.notify_all()

    def wait_event(
        self,
        name: str,
        *,
        since: int,
        timeout: float,
        among: Callable[[Event], bool] = lambda _: True,
    ) -> Event | None:
        """The first event called `name` from number `since` on; None after `timeout` seconds.

        Args:
            among: selects the events that count.
        """
        deadline = Deadline(timeout)
        with self._arrived:
            while True:
                for event in self._events[since:]:
                    if event["event"] == name and among(event):
                        return event
                if not self._arrived.wait(deadline.remaining()) and deadline.expired:
                    return None

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, fd: int | None
    ) -> object:
        if fd is not None:
            self._client.send_fd_scm(fd)
        return await self._client.execute(command, dict(arguments) if arguments else None)

    async def _pump(self) -> None:
        async for event in self._listener:
            self._record("<-", event)
            with self._arrived:
                self._events.append(event)
                self._arrived.notify_all()

    def _record(self, direction: str, message: object) -> None:
        if self._log is not None and not self._log.closed:
            self._log.write(f"{wall():.3f} {direction} {json.dumps(message, default=_plain)}\n")

    def _await(self, work: Any, timeout: float, what: str) -> Any:
        timeout = self._pace.stretch(timeout)
        future = self._loop.submit(work)
        try:
            return future.result(timeout)
        except TimeoutError as error:
            future.cancel()
            if not self.is_stopped:
                self._pace.was_late()
            raise MonitorError(
                f"QEMU's monitor did not answer to {what!r} within {timeout:g} s",
                remedy="the guest is frozen by a fault: end the fault first"
                if self.is_stopped
                else "this machine may be overloaded: run fewer guests or workers at a time",
                transient=True,
            ) from error
        except ExecuteError as error:
            raise MonitorError(
                f"QEMU refused {what!r}: {error}", error_class=error.error_class
            ) from error
        # AssertionError: the library asserts that QEMU still runs after its greeting, but it may not.
        except (QMPError, EOFError, OSError, AssertionError) as error:
            raise MonitorError(f"QEMU's monitor is gone ({what!r}): {error}") from error


def _plain(value: object) -> object:
    """What JSON has no form for, such as the library's messages."""
    return dict(value) if isinstance(value, Mapping) else str(value)
