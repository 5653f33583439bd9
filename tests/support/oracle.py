"""One run inside a guest, and plain pytest on the same files in that guest: what differs."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

from support import fidelity
from support.environment import without_ours
from support.fidelity import Line, Run, Said

# One test of the run inside is the oracle: plain pytest, in the same guest, on the same files.
ORACLE = """
import base64, json, os, subprocess, sys, zlib


def test_oracle(request):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--junitxml=/tmp/plain.xml", "-p", "no:cacheprovider",
         # Those that a session inside does not load; tracebacks show which hooks there are.
         *("-p", "no:timeout", "-p", "no:xdist", "-p", "no:xdist.looponfail", "-p", "no:pytest_cov"),
         *("-p", "no:pytest_forked", *json.loads(%r))],
        env={**env, "COLUMNS": "300"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with open("/tmp/plain.xml", "rb") as file:
        junit = file.read()
    for name, data in ("screen", done.stdout), ("junit", junit):
        text = base64.b64encode(zlib.compress(data)).decode()
        request.node.user_properties.append((name, text))
    request.node.user_properties.append(("status", done.returncode))
"""


def compare(image: str, folder: Path, *, seconds: float = 1500.0) -> tuple[Run, Run]:
    """Run a suite with every kind of outcome in one guest, twice: by us, and by plain pytest there.

    Args:
        image: of the guest.
        folder: gets the suite, and what the run writes.
        seconds: the longest that it may take.

    Returns:
        What the run inside has said, and what plain pytest has said; in any order.
    """
    suite = folder / "suite"
    shutil.copytree(fidelity.OUTCOMES, suite, ignore=shutil.ignore_patterns("__pycache__"))
    junit = folder / "inside.xml"
    line = Line.of(
        "--ignore=apart --ignore=oracle --doctest-modules --durations=3 --durations-min=100"
    )
    oracle = suite / "oracle"
    oracle.mkdir()
    (oracle / "test_oracle.py").write_text(ORACLE % json.dumps(line.arguments()))
    kept = {name: value for name, value in without_ours().items() if name != "CI"}

    # One run, and so one guest.
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", "--in-vm", f"--vm={image}"),
            *(f"--junitxml={junit}", "-p", "no:cacheprovider"),
            *(it for it in line.arguments(image) if it != "--ignore=oracle"),
        ],
        cwd=suite, env={**kept, "COLUMNS": "300"}, stdout=subprocess.PIPE, timeout=seconds,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    screen = done.stdout.decode(errors="backslashreplace")
    (folder / "inside.txt").write_text(screen, encoding="utf-8", errors="backslashreplace")
    inside, told = without_oracle(Said(done.returncode, screen, junit.read_bytes()))
    plain = Said(int(told["status"]), unpack(told["screen"]).decode(errors="backslashreplace"),
                 unpack(told["junit"]))  # fmt: skip
    reader = fidelity.Reader(
        image, {str(suite): "<suite>", "/opt/vmsandbox/src/suite": "<suite>", "/tmp/plain.xml": "…"}
    )
    return reader.read(inside, ordered=False), reader.read(plain, ordered=False)


def unpack(text):
    return zlib.decompress(base64.b64decode(text))


def without_oracle(said):
    """The run without that test, and what it has recorded."""
    root = ET.fromstring(said.junit)
    (suite,) = root.iter("testsuite")
    (case,) = (it for it in suite.iter("testcase") if it.get("name").startswith("test_oracle"))
    told = {it.get("name"): it.get("value") for it in case.iter("property")}
    suite.remove(case)
    count = int(suite.get("tests") or 0)
    suite.set("tests", str(count - 1))
    lines = [it for it in said.screen.splitlines() if "oracle" not in it]
    passed = [n for n, it in enumerate(lines) if it.startswith("=") and " passed" in it]
    words = lines[passed[-1]].split(" ")
    place = words.index("passed,") - 1
    words[place] = str(int(words[place]) - 1)
    lines[passed[-1]] = " ".join(words)
    return Said(said.status, "\n".join(lines), ET.tostring(root)), told
