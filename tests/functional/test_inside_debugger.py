"""Debuggers in a real guest, at a real terminal: while the test fails, and later in the kept guest."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing

from support.at_terminal import Terminal

PDB = "(Pdb) "
SECONDS = 240  # for a template, on a busy machine
SUITE = """
import pytest

@pytest.mark.in_vm
@pytest.mark.vm("debian-13")
def test_fails():
    x = 41
    assert x == 42
"""
NODE = "test_it.py::test_fails"


def test_post_mortem_now_and_later(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    here = {"cwd": tmp_path, "env": dict(os.environ), "seconds": SECONDS}
    pytest_ = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    enter = [sys.executable, "-P", "-m", "pytest_vmsandbox", "enter", NODE, "--pdb"]
    with closing(Terminal([*pytest_, "--pdb", "--vm-keep=failed"], **here)) as terminal:
        terminal.dialogue(("entering PDB", ""), (PDB, "p x + 1"), ("\n42\n", ""), (PDB, "c"))
        status, seen = terminal.end()
    assert status == 1
    assert "vmsandbox enter" in seen
    try:
        with closing(Terminal(enter, **here)) as terminal:
            terminal.dialogue(
                ("assert 41 == 42", ""),
                (PDB, "p x + 2"),
                ("\n43\n", ""),
                (PDB, "!print('be' + 'gun'); import time; time.sleep(1000)"),
                ("begun", "\x03"),
                ("KeyboardInterrupt", ""),
                (PDB, "where"),
                ("test_fails()\n-> assert x == 42", ""),
                (PDB, "q"),
            )
            assert terminal.end()[0] == 0
    finally:
        subprocess.run(
            [sys.executable, "-P", "-m", "pytest_vmsandbox", "kept", "rm", NODE],
            cwd=tmp_path,
            check=True,
        )
