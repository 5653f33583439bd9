"""Forks of a guest, and clones of a whole cluster, beside single clones in the same run.

    python tests/benchmarks/together.py --image tiny --memory 128MiB --times 7

The median of each, until all guests answer. The ratios are to single clones: on demand, and armed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import replace

from pytest_vmsandbox.core.settings import Clones, Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory

MACHINES = ("one", "two", "three")
ARM_SECONDS = 30


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--image", default="tiny")
    parser.add_argument("--memory", default="128MiB")
    parser.add_argument("--times", type=int, default=7)
    args = parser.parse_args()
    for clones in ("demand", "armed"):
        taken = measured(clones, args.image, args.memory, args.times)
        base = statistics.median(taken["clone"])
        for what, each in taken.items():
            ratio = f"{statistics.median(each) / base:5.2f} × a clone"
            print(f"{clones:7} {what:8} {statistics.median(each):7.3f} s  {ratio}  "
                  f"({min(each):.3f} to {max(each):.3f})", flush=True)  # fmt: skip
    return 0


def measured(clones: Clones, image: str, memory: str, times: int) -> dict[str, list[float]]:
    """The seconds of each, in turn, so that all meet the same load."""
    taken: defaultdict[str, list[float]] = defaultdict(list)

    def measure(what: str, made: AbstractContextManager[object]) -> None:
        if clones == "armed":
            factory.await_armed(ARM_SECONDS)
            time.sleep(ARM_SECONDS / 10)  # for the cluster
        started = time.perf_counter()
        with made:
            taken[what].append(time.perf_counter() - started)

    settings = replace(Settings(), clones=clones)
    with GuestFactory.open(settings, Announcer(print)) as factory:
        machine = {"image": image, "memory": memory}
        hardware = factory.hardware(image, {"memory": memory})
        with (
            factory.boot(image, memory=memory) as guest,
            factory.cluster(dict.fromkeys(MACHINES, machine)) as cluster,
        ):
            started = time.perf_counter()
            sealed = cluster.seal()
            print(f"{clones:7} sealing  {time.perf_counter() - started:7.3f} s", flush=True)
        for _ in range(times + 2):
            factory.expect(image, hardware, 1)
            measure("clone", factory.boot(image, memory=memory))
            measure("cluster", factory.cluster(sealed))
        if clones == "demand":
            with factory.boot(image, memory=memory) as guest:
                for _ in range(times + 2):
                    for count in (1, 3):
                        started = time.perf_counter()
                        with guest.fork(count):
                            taken[f"fork({count})"].append(time.perf_counter() - started)
    # The first ones are not armed, and translate code that others then find translated.
    return {what: each[2:] for what, each in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
