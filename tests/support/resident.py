"""The helper that runs in guests, made for this machine, and what its tests wait for."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue.helpers import COMPILERS, OPTIONS

SOURCE = Path(__file__).parents[2] / "images/helper/helper.c"
SECONDS = 20.0  # more than anything here takes
STRICT = ("-Wall", "-Wextra", "-Werror")


def compiled(folder: Path) -> Path:
    """The program, in `folder`; where there is no compiler the test is skipped."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        pytest.skip(f"there is no C compiler here: none of {', '.join(COMPILERS)}")
    program = folder / "helper"
    subprocess.run([compiler, *STRICT, *OPTIONS, "-o", program, SOURCE], check=True)
    return program


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; it has to within `SECONDS`."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process is there, and has not ended."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            != "Z"
        )
    except (FileNotFoundError, ProcessLookupError):
        return False
