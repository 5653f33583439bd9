"""Real guests: repetitions begin in the identical state, and noise lasts exactly as long as a test's function."""

from __future__ import annotations

import os
import subprocess
import sys

SUITE = """
import pytest

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.machine.host import is_stopped

def stops(vm, seconds):
    '''Whether QEMU is seen stopped within that time.'''
    pid, deadline = vm.engine.running.machine.process.pid, Deadline(seconds)
    while not (found := is_stopped(pid)) and not deadline.expired:
        deadline.pause(0.0005)
    return found


@pytest.fixture
def quiet(vm):
    assert not stops(vm, 0.2)
    yield vm
    deadline = Deadline(60)
    while stops(vm, 0.2):  # the launcher may be late to let it go on, but only once
        deadline.pause(0.1)
        assert not deadline.expired


@pytest.mark.vm("tiny")
def test_x(quiet, request):
    assert quiet.shell("ls /root/mark", check=False).returncode
    assert stops(quiet, 60)
    quiet.write_text("/root/mark", "")
    quiet.power_cut()
    quiet.power_on()
    assert stops(quiet, 60)
    assert "#1]" in request.node.nodeid, "as wanted"
"""


def test_repetitions_with_noise(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--vm=tiny"),
            *("--vm-repeat=3", "--vm-noise"),
        ],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        "test_it.py::test_x[tiny]: failed 2 of 3 (66.7 %, 95 % interval 9.4 to 99.2 %)"
        in done.stdout
    ), done.stdout
    assert "2 × AssertionError: as wanted" in done.stdout
    assert (
        "with noise: stopped at random, for 1 to 50 ms, half of the time"
        in done.stdout.splitlines()
    )
