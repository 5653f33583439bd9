"""The helper that runs in guests, compiled for this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "images/helper/helper.c"
COMPILERS = ("cc", "gcc", "tcc")


def compiled(folder: Path) -> Path:
    """The program, in `folder`; where there is no compiler the test is skipped."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        pytest.skip(f"there is no C compiler here: none of {', '.join(COMPILERS)}")
    program = folder / "helper"
    subprocess.run([compiler, "-Wall", "-o", program, SOURCE], check=True)
    return program
