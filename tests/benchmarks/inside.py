"""What running inside a guest costs, against plain pytest in the same kind of guest.

    python tests/benchmarks/inside.py --tests 500 --pairs 3

In pairs, one after the other: a suite of empty tests inside a guest by ``pytest --in-vm``, and the
same suite by plain pytest in such a guest. Told are the medians of the milliseconds for a test, from
the end of the first (which boots a guest) to the end of the last, and of their differences; and of the
seconds for a push of a tree that has not changed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.inside import tree as trees
from pytest_vmsandbox.inside.environment import Requirements
from pytest_vmsandbox.inside.install import Payload, install
from pytest_vmsandbox.inside.project import Project

CONFTEST = """
import os
import time

TIMES = []


def pytest_runtest_logfinish():
    TIMES.append(time.perf_counter())


def pytest_unconfigure(config):
    if "TOOK" in os.environ and TIMES:
        with open(os.environ["TOOK"], "w") as file:
            print(TIMES[-1] - TIMES[0], file=file)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--image", default="debian-13")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "suite")
        folder.mkdir()
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "conftest.py").write_text(CONFTEST)
        tests = (f"def test_{number}():\n    pass\n\n\n" for number in range(args.tests))
        (folder / "test_empty.py").write_text("".join(tests))
        inside, plain, pushes = [], [], []
        for _ in range(args.pairs):
            inside.append(run_inside(folder, args.image) / (args.tests - 1) * 1000)
            with GuestFactory.open(Settings()) as factory, factory.boot(args.image) as guest:
                plain.append(run_plain(folder, guest) / (args.tests - 1) * 1000)
                pushes += push_unchanged(folder, guest)
    figures = {
        "schema": 1,
        "tests": args.tests,
        "pairs": args.pairs,
        "inside_ms": round(statistics.median(inside), 2),
        "plain_ms": round(statistics.median(plain), 2),
        "in_guest_overhead_ms": round(
            statistics.median(a - b for a, b in zip(inside, plain, strict=True)), 2
        ),
        "ratio": round(statistics.median(a / b for a, b in zip(inside, plain, strict=True)), 3),
        "push_unchanged_s": round(statistics.median(pushes), 3),
    }
    if args.json:
        print(json.dumps(figures))
    else:
        print(
            f"{figures['inside_ms']} ms inside, {figures['plain_ms']} ms plain: "
            f"{figures['in_guest_overhead_ms']} ms a test, ratio {figures['ratio']}; "
            f"push of an unchanged tree: {figures['push_unchanged_s']} s "
            f"({args.pairs} pairs of {args.tests} tests, medians)"
        )


def run_inside(folder: Path, image: str) -> float:
    """Seconds that the tests take inside a guest, as the host sees them."""
    took = folder.parent / "took"
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--in-vm"]
    subprocess.run(
        [*argv, f"--vm={image}"],
        cwd=folder,
        env={**os.environ, "TOOK": str(took)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return float(took.read_text())


def run_plain(folder: Path, guest: Guest) -> float:
    """Seconds that plain pytest in a guest takes for the same tests."""
    installed = install(
        guest,
        Payload(
            tree=trees.Tree.of(folder),
            project=Project.of(folder),
            requirements=Requirements.of_host(folder, say=lambda _: None),
            cache=cache_dir(),
            offline=False,
            say=lambda _: None,
        ),
    )
    argv = [installed.place.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    guest.run(argv, cwd=installed.tree, env={"TOOK": "/tmp/took"}, timeout=600)
    return float(guest.read_text("/tmp/took"))


def push_unchanged(folder: Path, guest: Guest) -> list[float]:
    """Seconds for each of some pushes of a tree that has not changed."""
    seconds = []
    for number in range(6):
        began = time.perf_counter()
        pushed = trees.sync(guest, trees.Tree.of(folder), "/opt/vmsandbox/src/again")
        if number:
            assert not pushed.files
            seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
