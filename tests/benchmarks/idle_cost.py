"""What the installed plugin costs a suite that does not use it.

    python tests/benchmarks/idle_cost.py --runs 20

Runs pytest on an empty suite with the plugin and with ``-p no:vmsandbox``, one after the other in pairs,
and prints the medians of both and of the pairs' differences, in milliseconds.
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=20, help="pairs of runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_nothing.py").write_text("def test_nothing():\n    pass\n")
        run(folder)  # byte code is compiled, caches are warm
        run(folder, "-p", "no:vmsandbox")
        pairs = [(run(folder), run(folder, "-p", "no:vmsandbox")) for _ in range(args.runs)]
    figures = {
        "schema": 1,
        "runs": args.runs,
        "with_ms": round(statistics.median(a for a, _ in pairs), 1),
        "without_ms": round(statistics.median(b for _, b in pairs), 1),
        "idle_cost_ms": round(statistics.median(a - b for a, b in pairs), 1),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
    }
    if args.json:
        print(json.dumps(figures))
    else:
        print(
            f"{figures['with_ms']} ms with, {figures['without_ms']} ms without: "
            f"{figures['idle_cost_ms']} ms, ratio {figures['ratio']} ({args.runs} pairs, medians)"
        )


def run(folder: str, *more: str) -> float:
    """Milliseconds of one run of pytest."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more]
    started = time.perf_counter()
    subprocess.run(argv, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1000


if __name__ == "__main__":
    main()
