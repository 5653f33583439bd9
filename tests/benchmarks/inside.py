"""What running inside a guest costs, against plain pytest in the same kind of guest.

    python tests/benchmarks/inside.py --tests 500 --pairs 3

In pairs, one after the other: a suite of empty tests inside a guest by ``pytest --in-vm``, and the
same suite by plain pytest in such a guest. Told are the medians of the milliseconds for a test, from
the end of the first (which boots a guest) to the end of the last, and of their differences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from pytest_vmsandbox.cli.benchmark.guests import Setup
from pytest_vmsandbox.cli.benchmark.suites import inside_pairs
from pytest_vmsandbox.core.settings import Settings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--image", default="debian-13")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        setup = Setup(image=args.image, settings=Settings(), hardware={}, folder=Path(name))
        pairs = inside_pairs(setup, number=args.pairs, tests=args.tests)
    figures = {
        "schema": 1,
        "tests": args.tests,
        "pairs": args.pairs,
        "inside_ms": round(pairs.first, 2),
        "plain_ms": round(pairs.second, 2),
        "in_guest_overhead_ms": round(statistics.median(pairs.differences), 2),
        "ratio": round(pairs.ratio, 3),
    }
    if args.json:
        print(json.dumps(figures))
    else:
        print(
            f"{figures['inside_ms']} ms inside, {figures['plain_ms']} ms plain: "
            f"{figures['in_guest_overhead_ms']} ms a test, ratio {figures['ratio']} "
            f"({args.pairs} pairs of {args.tests} tests, medians)"
        )


if __name__ == "__main__":
    main()
