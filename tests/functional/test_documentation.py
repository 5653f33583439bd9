"""The examples in README.md and below docs/ run, on real guests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import documentation
from support.documentation import Commands, Example, Suite
from support.environment import WITHOUT_HYPOTHESIS, without_ours

EXAMPLES = [example for page in documentation.pages() for example in page.examples]
TESTS = [example for example in EXAMPLES if isinstance(example, Suite)]
COMMANDS = [example for example in EXAMPLES if isinstance(example, Commands)]
SECONDS = 1200


def identity(example: Example) -> str:
    """The page without its suffix, and what the example begins with."""
    first = example.name if isinstance(example, Suite) else ""
    if isinstance(example, Commands):
        first = " ".join(example.lines[0].split()[:3])
    page = example.page.removeprefix("docs/").removesuffix(".md")
    return f"{page}-{first}"


def write(files, folder):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def environment():
    """A user's, with the programs of this interpreter's environment first.

    Without what is ours as a run of pytest under coverage, which examples measure, too.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**without_ours(), "PATH": path}


@pytest.mark.parametrize("example", TESTS, ids=identity)
def test_tests(example, tmp_path):
    write(example.files, tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", *WITHOUT_HYPOTHESIS),
            *("-ra", "-p", "no:cacheprovider", *example.arguments),
        ],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    said = f"{example.place}\n{done.stdout}{done.stderr}"
    assert done.returncode == example.status, said
    if example.status == 0:
        summary = done.stdout.splitlines()[-1]
        passed = int((re.findall(r"(\d+) passed", summary) or [0])[0])
        assert passed >= example.count > 0, said
        assert not re.search(r"skipped|deselected|xfailed|xpassed", summary), said


@pytest.mark.parametrize("example", COMMANDS, ids=identity)
def test_commands(example, tmp_path):
    write(example.files, tmp_path)
    for number, line in enumerate(example.lines, 1):
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        expected = example.status if number == len(example.lines) else 0
        said = f"{example.place}\n$ {line}\n{done.stdout}{done.stderr}"
        assert done.returncode == expected, said


def test_there_are_some_of_each():
    assert TESTS
    assert COMMANDS
