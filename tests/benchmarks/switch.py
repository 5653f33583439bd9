"""What the switch costs: frames a second, its processor time for a frame, and its latency.

    python tests/benchmarks/switch.py [--guests IMAGE]

Two sockets stand for guests. Frames of several sizes go from one to the other, with and without conditions in force,
and one frame goes there and back. The same is measured without the switch, on a pair of sockets.

With ``--guests``, two guests of an image that has Python send a stream to each other, and ping: in turn through the switch, and on a
cable of QEMU's own, without it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.machine.host import processor_seconds
from pytest_vmsandbox.machine.process import Launcher
from pytest_vmsandbox.machine.switch.conditions import Conditions
from pytest_vmsandbox.machine.switch.switch import Switch, SwitchNetwork

A, B = b"\x02\0\0\0\0\x0a", b"\x02\0\0\0\0\x0b"
SIZES = (64, 1514)  # bytes of a frame
STREAM = 64 << 20  # bytes between guests
SINK = """
import socket
stream, _ = socket.create_server(("", 5001)).accept()
while stream.recv(1 << 20):
    pass
"""
SOURCE = """
import socket, sys
with socket.create_connection((sys.argv[1], 5001)) as stream:
    for _ in range(int(sys.argv[2]) >> 20):
        stream.sendall(bytes(1 << 20))
"""
AT_ONCE = 64  # frames in one call
BAD = Conditions(latency=0.001, loss=0.01)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--frames", type=int, default=100_000, help="for each figure")
    parser.add_argument("--pings", type=int, default=2_000)
    parser.add_argument("--guests", metavar="IMAGE")
    parser.add_argument("--rounds", type=int, default=3, help="with guests")
    args = parser.parse_args()
    figures: dict[str, Any] = {"schema": 1, "load": os.getloadavg()[0]}
    if args.guests:
        figures |= between_guests(args.guests, args.rounds)
    else:
        figures |= between_sockets(args.frames, args.pings)
    print(json.dumps(figures, indent=2))


def between_sockets(frames: int, pings: int) -> dict[str, Any]:
    """The figures of the switch alone."""
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Launcher(Path(folder)) as launcher,
        Switch(launcher) as switch,
    ):
        network = switch.network("benchmark")
        pid = network._program.process.pid
        with plugged(network) as (a, b):
            figures["ping_us"] = pinged(a, b, pings)
            for size in SIZES:
                figures[f"plain_{size}"] = flooded(a, b, size, frames, pid)
            # As QEMU does it, though it is quicker: the switch gets few frames at a time.
            figures["one_by_one_1514"] = flooded(a, b, SIZES[-1], frames, pid, at_once=1)
            with network.impose(BAD, source="a"):
                figures["bad_1514"] = flooded(a, b, SIZES[-1], frames, pid, ends=False)
        figures["unread"] = network.statistics()["b"].dropped.get("unread", 0)
    a, b = socket.socketpair()
    with a, b:
        figures["direct_ping_us"] = pinged(a, b, pings)
    return figures


@contextmanager
def plugged(network: SwitchNetwork) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets in a network that knows where they are."""
    with network.port("a").socket as a, network.port("b").socket as b:
        for one, other, source, dest in ((a, b, A, B), (b, a, B, A)):
            one.sendall(frame(dest, source, 60))
            other.recv(1 << 16)
        yield a, b


class Cable:
    """Stands in for a network of the switch that has two ports: its sockets are connected to each other."""

    def __init__(self) -> None:
        self._ends = list(socket.socketpair())

    def port(self, label: str, **_: object) -> Any:
        """The next end."""
        end = self._ends.pop()
        return SimpleNamespace(label=label, socket=end, close=end.close)

    def close(self) -> None:
        """Nothing is left to close: each end belongs to a guest."""


def between_guests(image: str, rounds: int) -> dict[str, Any]:
    """Mbit/s of a stream, and milliseconds of pings (least, median), for each way in turn; and what the switch used."""
    found: dict[str, list[Any]] = {"switch": [], "cable": []}
    with GuestFactory.open(Settings()) as factory:
        for number in range(rounds):
            for way in found if number % 2 else reversed(found):
                with ExitStack() as stack:
                    lan = stack.enter_context(factory.network("lan"))
                    if way == "cable":
                        lan.switch.close()
                        lan.switch = Cable()  # type: ignore[assignment]
                    a, b = (
                        stack.enter_context(factory.boot(image, networks=[lan])) for _ in range(2)
                    )
                    program = factory.backend.hypervisor.switch._program
                    assert program is not None
                    pid = program.process.pid
                    found[way].append(measured(a, b, str(lan.address(b)), pid))
                    if way == "switch":
                        counts = lan.switch.statistics().values()
                        frames = sum(it.received for it in counts)
                        found[way][-1]["frames"] = frames
                        found[way][-1]["dropped"] = sum(sum(it.dropped.values()) for it in counts)
    return {"image": image, **found}


def measured(a: Guest, b: Guest, address: str, pid: int) -> dict[str, Any]:
    """One round between two guests."""
    said = a.run(["ping", "-c", "21", "-i", "0.1", address]).stdout
    times = sorted(float(it.partition(" ")[0]) for it in said.split("time=")[1:])
    used = processor_seconds(pid)
    with b.popen(["python3", "-c", SINK]) as sink:
        time.sleep(1)
        began = time.perf_counter()
        a.run(["python3", "-c", SOURCE, address, str(STREAM)], timeout=300)
        sink.wait(timeout=60)
    took = time.perf_counter() - began
    return {
        "mbit_per_second": round(STREAM * 8 / took / 1e6, 1),
        "ping_ms": [times[0], statistics.median(times)],
        "switch_seconds": round(processor_seconds(pid) - used, 2),
        "seconds": round(took, 2),
    }


def frame(dest: bytes, source: bytes, size: int) -> bytes:
    """A frame, with its length before it."""
    return struct.pack(">I", size) + dest + source + bytes(size - 12)


def pinged(a: socket.socket, b: socket.socket, count: int) -> float:
    """Median microseconds of a way there and back."""

    def answer() -> None:
        for _ in range(count):
            b.recv(1 << 16)
            b.sendall(frame(A, B, 64))

    thread = threading.Thread(target=answer)
    thread.start()
    took = []
    for _ in range(count):
        began = time.perf_counter()
        a.sendall(frame(B, A, 64))
        a.recv(1 << 16)
        took.append(time.perf_counter() - began)
    thread.join()
    return round(statistics.median(took) * 1e6, 1)


def flooded(
    a: socket.socket,
    b: socket.socket,
    size: int,
    count: int,
    pid: int,
    *,
    ends: bool = True,
    at_once: int = AT_ONCE,
) -> dict[str, float]:
    """Frames a second, Mbit/s, and microseconds of the switch's processor time for a frame.

    Args:
        ends: whether all frames arrive. Otherwise the time is that until none comes any more.
        at_once: frames in one call.
    """
    total = count * (size + 4) if ends else 1 << 62
    arrived: list[tuple[float, int]] = []

    def take() -> None:
        got = 0
        b.settimeout(2)
        try:
            while got < total:
                got += len(b.recv(1 << 20))
                arrived[:] = [(time.perf_counter(), got)]
        except TimeoutError:
            pass
        b.settimeout(None)

    thread = threading.Thread(target=take)
    used, began = processor_seconds(pid), time.perf_counter()
    thread.start()
    bunch = frame(B, A, size) * at_once
    for _ in range(count // at_once):
        a.sendall(bunch)
    if rest := count % at_once:
        a.sendall(frame(B, A, size) * rest)
    thread.join()
    [(last, got)] = arrived
    frames = got / (size + 4)
    return {
        "frames_per_second": round(frames / (last - began)),
        "mbit_per_second": round(frames * size * 8 / (last - began) / 1e6),
        "processor_us_per_frame": round((processor_seconds(pid) - used) / count * 1e6, 2),
        "arrived": round(frames),
    }


if __name__ == "__main__":
    main()
