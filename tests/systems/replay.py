"""Shows that a recorded failure repeats to the byte, with each QEMU that is named.

Run it by hand: ``python tests/systems/replay.py [--times N] [--qemu FILE…]``. Without ``--qemu``, it takes the
QEMU that this machine has. A test inside debian-13 prints all that differs between two runs, and fails: random
bytes, times, the hash order of strings, the winners of races between threads, and numbers of processes. It runs
plainly, then it is recorded, then it is repeated N times (default: 5). Each is a command of its own.

It prints a line of a table for each QEMU: how long the commands took, how large the log is, the digest of all
that the guest wrote, and how many replays wrote just that. It ends with 1 if one differs, or does not end.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.guests.replay.run import CONSOLE, LOG, REPORT
from pytest_vmsandbox.guests.replay.store import Recorded, RecordedStore

NODEID = "test_chance.py::test_chance"
KINDS = ("random", "now", "monotonic", "uuid", "hash", "races", "processes")
SUITE = """
import hashlib, os, random, subprocess, sys, threading, time, uuid

import pytest

pytestmark = [pytest.mark.in_vm, pytest.mark.vm("debian-13")]


def race():
    order, start = [], threading.Event()

    def run(number):
        start.wait()
        for _ in range(random.randrange(2000)):
            pass
        order.append(number)

    threads = [threading.Thread(target=run, args=[number]) for number in range(4)]
    for each in threads:
        each.start()
    start.set()
    for each in threads:
        each.join()
    return order


def output(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def test_chance():
    print("random", hashlib.sha256(os.urandom(1 << 16)).hexdigest(), random.random())
    print("now", time.time_ns())
    print("monotonic", time.monotonic_ns(), time.perf_counter_ns())
    print("uuid", uuid.uuid4(), open("/proc/sys/kernel/random/uuid").read().strip())
    print("hash", output(sys.executable, "-c", "print({*map(str, range(12))})"))
    print("races", [race() for _ in range(5)])
    print("processes", os.getpid(), output("sh", "-c", "echo $$"), output("sh", "-c", "echo $$"))
    assert 0
"""


def commands(qemu: str | None) -> dict[str, str]:
    """The environment of commands that use a QEMU."""
    env = {name: text for name, text in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return env if qemu is None else {**env, "VMSANDBOX_QEMU": qemu}


@contextmanager
def timed(times: dict[str, list[float]], what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    times.setdefault(what, []).append(time.monotonic() - began)


def ran(folder: Path, qemu: str | None, *words: str, status: int) -> str:
    """The output of a command that ends with a status."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", *words],
        env=commands(qemu), cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def printed(text: str) -> dict[str, str]:
    """What the test has printed, by its kinds."""
    pattern = rf"^({'|'.join(KINDS)}) (.+)$"
    return dict(re.findall(pattern, text, re.MULTILINE))


def digest(folder: Path) -> str:
    """Of all that a guest wrote."""
    return hashlib.sha256(
        b"".join((folder / it).read_bytes() for it in (REPORT, CONSOLE))
    ).hexdigest()


def recorded(folder: Path, qemu: str | None, times: dict[str, list[float]]) -> Recorded:
    """The recording of the failure. A second one must print other values, else nothing is shown."""
    suite = [f"{NODEID}", "-p", "no:cacheprovider", "--vm-accel=tcg"]
    ran(folder, qemu, "pytest", *suite, status=1)  # makes what later runs share
    with timed(times, "plain"):
        ran(folder, qemu, "pytest", *suite, status=1)
    first = printed(ran(folder, qemu, "pytest", *suite, "--vm-record", status=1))
    with timed(times, "record"):
        second = printed(ran(folder, qemu, "pytest", *suite, "--vm-record", status=1))
    assert {*first} == {*second} == {*KINDS}, f"the test printed {second}"
    differ = [kind for kind in KINDS if first[kind] != second[kind]]
    assert {"random", "now", "uuid", "hash"} <= {*differ}, f"only {differ} differ"
    print(f"  another recording of it differs in: {', '.join(differ)}", flush=True)
    store = RecordedStore(cache_dir())
    (found,) = store.find(NODEID, store.project(folder))
    return found


def shown(folder: Path, qemu: str | None, times: int) -> bool:
    """Show it with one QEMU: print its line of the table. Whether all replays wrote the same."""
    seconds: dict[str, list[float]] = {}
    (folder / "pytest.ini").write_text("[pytest]\nvm_requirements = pytest\n")
    (folder / "test_chance.py").write_text(SUITE)
    kept = recorded(folder, qemu, seconds)
    found = []
    for number in range(times):
        words = ["pytest_vmsandbox", "replay", NODEID, "--output", f"out-{number}"]
        try:
            with timed(seconds, "replay"):
                ran(folder, qemu, *words, status=0)
            found.append(digest(folder / f"out-{number}"))
        except RuntimeError as error:
            print(error, flush=True)
    equal = found.count(digest(kept.folder))
    columns = [
        str(kept.record["qemu"]),
        *(" ".join(f"{it:.1f}" for it in seconds[what]) for what in ("plain", "record", "replay")),
        f"{(kept.folder / LOG).stat().st_size >> 10:,} KiB",
        digest(kept.folder)[:16],
        f"{equal} of {times}",
    ]
    print(f"| {' | '.join(columns)} |", flush=True)
    return equal == times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument(
        "--qemu", action="append", metavar="FILE", help="may be given several times"
    )
    options = parser.parse_args()
    print("| QEMU | plain, s | recorded, s | replays, s | log | digest | the same |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    every = True
    for qemu in options.qemu or [None]:
        with tempfile.TemporaryDirectory() as name:
            every &= shown(Path(name).resolve(), qemu, options.times)
    return 0 if every else 1


if __name__ == "__main__":
    sys.exit(main())
