"""This process's side of the switch: networks, their ports, and what happens on the way.

The switch is one process for a run. It starts with the first network, and ends with the run at the latest. Its ports are
stream sockets, on which QEMU sends and takes frames (``-netdev stream``).
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from pytest_vmsandbox.core.errors import ConfigError, LaunchError
from pytest_vmsandbox.core.lasting import Lasting
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.process import Launcher, OwnedProcess
from pytest_vmsandbox.machine.switch.conditions import LEAST_RATE, MOST_SECONDS, Conditions

_CONTROL = 3  # its descriptor in the program
_ANSWER_SECONDS = 60.0
_MOST_OF_ANSWER = 1 << 17  # bytes


@dataclass(frozen=True, kw_only=True)
class PortStatistics:
    """What has gone through a port.

    Attributes:
        received: frames that came from its guest.
        received_bytes: their bytes.
        sent: frames that went to its guest.
        sent_bytes: their bytes.
        dropped: why frames were dropped → how many. For the port from which they came: ``lost`` and ``cut`` (by
            conditions), ``queue`` (more than a rate lets through), ``overflow`` (too much is on its way), ``short`` (no frame).
            For the port to which they should have gone: ``unread`` (its guest takes none).
    """

    received: int
    received_bytes: int
    sent: int
    sent_bytes: int
    dropped: Mapping[str, int]


class Switch:
    """The switch of a run. It runs as long as the context, and its process only if there was a network.

    Any thread may use it, its networks and their ports.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._lock = threading.RLock()
        self._stack = ExitStack()
        self._program: _Program | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def network(self, name: str, *, seed: int = 0) -> SwitchNetwork:
        """A new network without ports. Nothing goes from one network to another.

        Args:
            name: it is part of what chance comes from. Several networks can have the same one.
            seed: the same frames in the same order have the same fate if seed, name and places are the same.

        Raises:
            LaunchError: the switch cannot be started.
        """
        with self._lock:
            if self._program is None or self._program.is_gone:
                self._stack.close()
                self._program = self._stack.enter_context(_running(self._launcher))
            return SwitchNetwork(self._program, name, seed)


class SwitchNetwork:
    """One network. `Switch.network` makes it.

    Conditions that are in force at the same time act one after the other, like cables in a row: first those on frames
    from a port, then those between two ports, then those on frames to a port; among these in the order of their begin.
    So latencies add up, a frame arrives if none of them loses it, and the lowest rate limits.

    Attributes:
        name: as it was given.
    """

    def __init__(self, program: _Program, name: str, seed: int) -> None:
        self.name = name
        self._program = program
        self._is_closed = False
        self._number = program.ask("network", name=name, seed=seed)["network"]

    def port(self, label: str, *, place: str = "") -> Port:
        """A new port, for one network card.

        Args:
            label: its name. If several ports have the same one (a guest moves to another QEMU, or the former QEMU is not quite
                gone), conditions and statistics are for all of them, and they hear nothing from each other.
            place: what stands for the port in what chance comes from; the label if empty. It should be the same in each run.

        Raises:
            LaunchError: the switch is gone.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                told = self._ask("port", theirs.fileno(), label=label, place=place or label)
            except BaseException:
                ours.close()
                raise
        return Port(label, ours, self, told["port"])

    def impose(
        self, conditions: Conditions, *, source: str | None = None, dest: str | None = None
    ) -> Imposed:
        """Have conditions act on frames from now on. Frames that are on their way are not concerned.

        Args:
            source: the label of the port from which the frames come; None for every port.
            dest: the label of the port to which they go; None for every port. Labels need no port yet. With `source` alone,
                a frame to all is lost for all or for none.

        Raises:
            ConfigError: a value is impossible.
            LaunchError: the switch is gone.
        """
        _check(conditions)
        told = self._ask("impose", source=source, dest=dest, conditions=asdict(conditions))
        return Imposed(told["rule"], self)

    @contextmanager
    def capture(self, file: IO[bytes]) -> Iterator[None]:
        """Write each frame that comes from a port into a file, as pcap, while this lasts.

        Frames are written as guests have sent them, before anything happens to them. The file is full at 256 MiB.

        Raises:
            LaunchError: the switch is gone.
        """
        number = self._ask("capture", file.fileno())["capture"]
        try:
            yield
        finally:
            self.end(capture=number)

    def statistics(self) -> dict[str, PortStatistics]:
        """The label of each port → what has gone through it, and through former ports of that label.

        Raises:
            LaunchError: the switch is gone.
        """
        return {label: PortStatistics(**it) for label, it in self._tell("statistics").items()}

    def decisions(self, *rules: Imposed) -> list[str]:
        """What happened by conditions, one line for each begin, end, and frame that did not simply pass.

        A line is the number of the rule, the flow, the number of the frame in the flow, and its fate, such as
        ``2 db1>db2 17 lost``. After 1 MiB, the last line says that more is left out.

        Args:
            rules: whose lines to return; without any, all lines.

        Raises:
            LaunchError: the switch is gone.
        """
        lines: list[str] = self._tell("decisions")
        numbers = {f"{rule.number}" for rule in rules}
        return [line for line in lines if not rules or line.partition(" ")[0] in numbers]

    def check(self) -> None:
        """Check that frames can pass. A network that is closed needs no switch.

        Raises:
            LaunchError: the switch is gone, so nothing passes, whatever is imposed.
        """
        if not self._is_closed:
            self._program.ask("check")

    def end(self, **what: int) -> None:
        """End a rule, a port or a capture, by its number. If it is gone, nothing happens.

        Raises:
            LaunchError: the switch is gone.
        """
        if not self._is_closed:
            self._ask("end", None, **what)

    def close(self) -> None:
        """End the network and close its ports. Closing it twice does nothing.

        Raises:
            LaunchError: the switch was gone before.
        """
        if not self._is_closed:
            self._is_closed = True
            self._ask("close")

    def _ask(self, what: str, fd: int | None = None, **more: Any) -> Any:
        return self._program.ask(what, fd, network=self._number, **more)

    def _tell(self, what: str) -> Any:
        """An answer that can be long, so it comes as a file."""
        with tempfile.TemporaryFile() as file:
            self._ask(what, file.fileno())
            file.seek(0)
            return json.load(file)


@dataclass(frozen=True, eq=False)
class Port:
    """A port of a network, for one network card.

    Attributes:
        label: its name.
        socket: QEMU's end, for ``-netdev stream,addr.type=fd``. It can be closed here when QEMU has it. When nobody has
            it any more, the port is gone.
    """

    label: str
    socket: socket.socket
    _network: SwitchNetwork
    _number: int

    def close(self) -> None:
        """Close the port, also if QEMU still has its end."""
        self.socket.close()
        with suppress(LaunchError):
            self._network.end(port=self._number)


@dataclass(frozen=True, eq=False)
class Imposed(Lasting):
    """Conditions that are in force. They end with `end`, or with the context.

    Attributes:
        number: of the rule, in lines about decisions.
    """

    number: int
    _network: SwitchNetwork

    def end(self) -> None:
        """End them. Frames that are on their way still arrive late. Ending them twice does nothing.

        Raises:
            LaunchError: the switch is gone.
        """
        self._network.end(rule=self.number)


def _check(conditions: Conditions) -> None:
    for name in ("loss", "duplicate", "reorder"):
        if not 0 <= getattr(conditions, name) <= 1:
            raise ConfigError(
                f"{name}={getattr(conditions, name)!r} is not a share of frames",
                remedy="use a number from 0 to 1, such as 0.1 for every tenth frame",
            )
    for name in ("latency", "jitter"):
        if not 0 <= getattr(conditions, name) <= MOST_SECONDS:
            raise ConfigError(
                f"{name}={getattr(conditions, name)!r} is not a possible time",
                remedy=f"use seconds, from 0 to {MOST_SECONDS:g}, such as 0.05",
            )
    if conditions.rate is not None and not LEAST_RATE <= conditions.rate < math.inf:
        raise ConfigError(
            f"rate={conditions.rate!r} is not a possible number of bits per second",
            remedy=f"use a number from {LEAST_RATE:g} on, such as 10e6; to let nothing pass, use partition or unplug",
        )


@dataclass(eq=False)
class _Program:
    """The running program."""

    process: OwnedProcess
    control: socket.socket
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_gone(self) -> bool:
        return self.process.wait(0) is not None

    def ask(self, what: str, fd: int | None = None, **more: Any) -> Any:
        """Send a request, perhaps with a descriptor, and return the answer."""
        with self._lock:
            fds = [] if fd is None else [fd]
            try:
                socket.send_fds(self.control, [json.dumps({"do": what, **more}).encode()], fds)
                answer = self.control.recv(_MOST_OF_ANSWER)
            except OSError as error:
                self.control.close()  # a late answer is not one to the next request; and the program ends
                raise self._gone(str(error)) from error
        if not answer:
            raise self._gone("it has closed its control socket")
        told = json.loads(answer)
        if "error" in told:
            raise ConfigError(told["error"])
        return told

    def _gone(self, details: str) -> LaunchError:
        return LaunchError(
            "the switch of this run is gone, and with it all networks of guests",
            details=self.process.stderr_tail or details,
            remedy="something killed its process: look for an out-of-memory kill",
            transient=True,
        )


@contextmanager
def _running(launcher: Launcher) -> Iterator[_Program]:
    """The program, until the end of the context."""
    identity = host.guest_identity("tcg")
    # The program changes the user itself, because that user may not be able to read our files.
    user = [] if identity is None else [str(identity.uid), str(identity.gid)]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(_ANSWER_SECONDS)
    folder = os.fspath(Path(__file__).parent)
    with ours, ExitStack() as stack:
        with theirs:
            process = stack.enter_context(
                launcher.spawn(
                    [sys.executable, "-I", "-S", folder, str(_CONTROL), *user],
                    fds={_CONTROL: theirs.fileno()},
                    env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
                )
            )
        yield _Program(process, ours)
