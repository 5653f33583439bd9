"""Every example of README.md runs, on real guests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def first_test(text: str) -> str:
    return re.findall(r"^def (test_\w+)", text, re.MULTILINE)[0]


@pytest.mark.parametrize("text", blocks("python"), ids=first_test)
def test_tests(text, tmp_path):
    (tmp_path / "test_readme.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-ra", "-p", "no:cacheprovider", "test_readme.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(re.findall(r"^def test_", text, re.MULTILINE))
    passed = int((re.findall(r"(\d+) passed", done.stdout) or [0])[0])
    assert passed >= count > 0
    assert not re.search(r"skipped|deselected", done.stdout)


# The first two blocks install and run everything; tests/cleanroom does that.
LINES = [line for block in blocks("console")[2:] for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_lines(line, tmp_path):
    assert shutil.which("vmsandbox")
    done = subprocess.run(
        line.split(), cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "uname -s" in line:
        assert done.stdout == "Linux\n"
