"""Whatever ends pytest ends its guests. What ends a build of images, or ends pytest while it keeps guests, leaves
nothing half-made.

The long versions: tests/torture/kill.py --kills 100, tests/torture/builds.py --kills 60 --guests,
tests/torture/keep.py --kills 100, tests/torture/faults.py --kills 100, and tests/torture/clusters.py --kills 200.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).resolve().parents[1] / "torture"


@pytest.mark.parametrize(
    ("program", "kills", "options"),
    [
        ("kill.py", 6, "--seed 20261123 --longest 15"),
        ("builds.py", 10, "--seed 20261129"),
        ("keep.py", 10, "--seed 20261129 --jobs 2 --longest 1.5"),
        ("clusters.py", 10, "--seed 20261129 --jobs 2 --longest 1.5"),
        ("faults.py", 11, "--seed 20261129 --jobs 2 --longest 1.5"),
    ],
    ids=["tests", "builds of images", "keeping", "clusters", "faults"],
)
def test_killed_at_random_moments(program, kills, options):
    done = subprocess.run(
        [sys.executable, "-P", TORTURE / program, "--kills", str(kills), *options.split()],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{kills} passed, 0 failed\n")
