"""What ``python3 quickstart.py --yes`` spends its time on, on a machine that has nothing yet.

    python tests/benchmarks/quickstart.py

Runs it in a copy of what is committed, with a home and caches of its own. What it says names its parts: told is
each line with the seconds until the next one, if those are half a second or more. Packages of the system that are
there already are not installed again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 0.5


def main() -> int:
    """Measure and print; the exit status is that of the quick start."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:
        status, parts = run(Path(folder))
    total = round(sum(seconds for _, seconds in parts), 1)
    shown = [(text, round(seconds, 1)) for text, seconds in parts if seconds >= LEAST_SECONDS]
    if args.json:
        print(json.dumps({"schema": 1, "status": status, "total_s": total, "parts": shown}))
    else:
        for text, seconds in [*shown, ("all together", total)]:
            print(f"{seconds:7.1f} s  {text}")
    return status


def run(folder: Path) -> tuple[int, list[tuple[str, float]]]:
    """The exit status, and what was said with the seconds until the next thing was said."""
    checkout = folder / "checkout"
    checkout.mkdir()
    tree = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=checkout, check=True, input=tree.stdout)
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "HOME": str(folder),
        "PIP_CACHE_DIR": str(folder / "pip"),
        "UV_CACHE_DIR": str(folder / "uv"),
        "VMSANDBOX_CACHE": str(folder / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    parts: list[tuple[str, float]] = []
    text, since = "starting", time.monotonic()
    with subprocess.Popen(
        [sys.executable, "quickstart.py", "--yes"],
        cwd=checkout,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            parts.append((text, time.monotonic() - since))
            text, since = line.strip(), time.monotonic()
    return process.returncode, [*parts, (text, time.monotonic() - since)]


if __name__ == "__main__":
    sys.exit(main())
