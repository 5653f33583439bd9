"""What the switch costs: frames a second, its processor time for a frame, and its latency.

    python tests/benchmarks/switch.py

Two sockets stand for guests. Frames of several sizes go from one to the other, with and without conditions in force,
and one frame goes to and fro. The same is measured without the switch, on a pair of sockets.
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytest_vmsandbox.machine.host import processor_seconds
from pytest_vmsandbox.machine.process import Launcher
from pytest_vmsandbox.machine.switch.conditions import Conditions
from pytest_vmsandbox.machine.switch.switch import Switch, SwitchNetwork

A, B = b"\x02\0\0\0\0\x0a", b"\x02\0\0\0\0\x0b"
SIZES = (64, 1514)  # bytes of a frame
AT_ONCE = 64  # frames in one call, as QEMU sends them one by one, but quicker than Python can
BAD = Conditions(latency=0.001, loss=0.01)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--frames", type=int, default=100_000, help="for each figure")
    parser.add_argument("--pings", type=int, default=2_000)
    args = parser.parse_args()
    figures: dict[str, Any] = {"schema": 1, "load": os.getloadavg()[0]}
    with (
        tempfile.TemporaryDirectory() as folder,
        Launcher(Path(folder)) as launcher,
        Switch(launcher) as switch,
    ):
        network = switch.network("benchmark")
        pid = network._program.process.pid
        with plugged(network) as (a, b):
            figures["ping_us"] = pinged(a, b, args.pings)
            for size in SIZES:
                figures[f"plain_{size}"] = flooded(a, b, size, args.frames, pid)
            with network.impose(BAD, source="a"):
                figures["bad_1514"] = flooded(a, b, SIZES[-1], args.frames, pid, ends=False)
        figures["unread"] = network.statistics()["b"].dropped.get("unread", 0)
    a, b = socket.socketpair()
    with a, b:
        figures["direct_ping_us"] = pinged(a, b, args.pings)
    print(json.dumps(figures, indent=2))


@contextmanager
def plugged(network: SwitchNetwork) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets in a network that knows where they are."""
    with network.port("a").socket as a, network.port("b").socket as b:
        for one, other, source, dest in ((a, b, A, B), (b, a, B, A)):
            one.sendall(frame(dest, source, 60))
            other.recv(1 << 16)
        yield a, b


def frame(dest: bytes, source: bytes, size: int) -> bytes:
    """A frame, with its length before it."""
    return struct.pack(">I", size) + dest + source + bytes(size - 12)


def pinged(a: socket.socket, b: socket.socket, count: int) -> float:
    """Median microseconds of a way to and fro."""

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
    a: socket.socket, b: socket.socket, size: int, count: int, pid: int, *, ends: bool = True
) -> dict[str, float]:
    """Frames a second, Mbit/s, and microseconds of the switch's processor time for a frame.

    Args:
        ends: whether all frames arrive. Otherwise the time is that until none comes any more.
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
    bunch = frame(B, A, size) * AT_ONCE
    for _ in range(count // AT_ONCE):
        a.sendall(bunch)
    if rest := count % AT_ONCE:
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
