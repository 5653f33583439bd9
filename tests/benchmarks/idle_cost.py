"""What the installed plugin costs a suite that does not use it.

    python tests/benchmarks/idle_cost.py --runs 20

Runs pytest on an empty suite with the plugin and with ``-p no:vmsandbox``, one after the other in pairs,
and prints the medians of both and of the pairs' differences, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from pytest_vmsandbox.cli.benchmark.suites import idle_pairs


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=20, help="pairs of runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs = idle_pairs(Path(folder), args.runs)
    figures = {
        "schema": 1,
        "runs": args.runs,
        "with_ms": round(pairs.first, 1),
        "without_ms": round(pairs.second, 1),
        "idle_cost_ms": round(statistics.median(pairs.differences), 1),
        "ratio": round(pairs.ratio, 3),
    }
    if args.json:
        print(json.dumps(figures))
    else:
        print(
            f"{figures['with_ms']} ms with, {figures['without_ms']} ms without: "
            f"{figures['idle_cost_ms']} ms, ratio {figures['ratio']} ({args.runs} pairs, medians)"
        )


if __name__ == "__main__":
    main()
