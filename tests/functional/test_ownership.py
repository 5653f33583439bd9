"""Whatever ends pytest ends its guests. The long version: tests/torture/kill.py --kills 100."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORTURE = Path(__file__).resolve().parents[1] / "torture" / "kill.py"


def test_pytest_killed_at_random_moments():
    done = subprocess.run(
        [sys.executable, "-P", TORTURE, "--seed", "20261123", "--kills", "6", "--longest", "15"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("6 passed, 0 failed\n")
