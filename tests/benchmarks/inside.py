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
import statistics
import tempfile
import time
from pathlib import Path

from pytest_vmsandbox.cli.figures.guests import Site
from pytest_vmsandbox.cli.figures.suites import inside_pairs, write_empty_tests
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.inside import tree as trees


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--image", default="debian-13")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        site = Site(image=args.image, settings=Settings(), hardware={}, folder=Path(name))
        pairs = inside_pairs(site, number=args.pairs, tests=args.tests)
        pushes = push_unchanged(site, args.tests)
    figures = {
        "schema": 1,
        "tests": args.tests,
        "pairs": args.pairs,
        "inside_ms": round(statistics.median(inside for inside, _ in pairs), 2),
        "plain_ms": round(statistics.median(plain for _, plain in pairs), 2),
        "in_guest_overhead_ms": round(
            statistics.median(inside - plain for inside, plain in pairs), 2
        ),
        "ratio": round(statistics.median(inside / plain for inside, plain in pairs), 3),
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


def push_unchanged(site: Site, tests: int) -> list[float]:
    """Seconds for each of some pushes of a tree that has not changed."""
    folder = site.folder / "unchanged"
    folder.mkdir()
    write_empty_tests(site, folder, tests)
    seconds = []
    with site.factory("armed") as factory, factory.boot(site.image) as guest:
        for number in range(6):
            began = time.perf_counter()
            pushed = trees.sync(guest.engine, trees.Tree.of(folder), "/opt/vmsandbox/src/again")
            if number:
                assert not pushed.files
                seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
