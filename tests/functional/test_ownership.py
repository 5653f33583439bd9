"""Whatever ends pytest ends its guests. What ends a build of images, or ends pytest while it keeps guests, leaves
nothing half-made.

The long versions: tests/torture/kill.py --kills 100, tests/torture/builds.py --kills 60 --guests,
tests/torture/keep.py --kills 100, tests/torture/faults.py --kills 100, and tests/torture/clusters.py --kills 200.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORTURE = Path(__file__).resolve().parents[1] / "torture"


def test_pytest_killed_at_random_moments():
    done = subprocess.run(
        [sys.executable, "-P", TORTURE / "kill.py", "--seed", "20261123", "--kills", "6", "--longest", "15"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("6 passed, 0 failed\n")


def test_builds_of_images_killed_at_random_moments():
    done = subprocess.run(
        [sys.executable, "-P", TORTURE / "builds.py", "--seed", "20261129", "--kills", "10"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("10 passed, 0 failed\n")


def test_pytest_killed_while_it_keeps_guests():
    done = subprocess.run(
        [sys.executable, "-P", TORTURE / "keep.py", "--seed", "20261129", "--kills", "10", "--jobs", "2",
         "--longest", "1.5"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("10 passed, 0 failed\n")


def test_pytest_killed_while_faults_are_in_force():
    done = subprocess.run(
        [sys.executable, "-P", TORTURE / "faults.py", "--seed", "20261129", "--kills", "11", "--jobs", "2",
         "--longest", "1.5"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("11 passed, 0 failed\n")


def test_pytest_killed_while_guests_talk():
    done = subprocess.run(
        [sys.executable, "-P", TORTURE / "clusters.py", "--seed", "20261129", "--kills", "10", "--jobs", "2",
         "--longest", "1.5"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("10 passed, 0 failed\n")
