"""Faults of real guests when a test fails: they are shown, and ended before anybody looks at the guest."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest

from pytest_vmsandbox.guests.entering import entered
from pytest_vmsandbox.guests.kept import KeptStore

SUITE = """
    import pytest

    pytestmark = pytest.mark.vm("tiny", memory="160MiB", isolation="module")

    def test_fails(vm):
        vm.write_text("/tmp/left", "when it failed")
        vm.faults.freeze(clock="runs")
        assert 0

    def test_leaves(vm):
        vm.faults.freeze(clock="runs")

    def test_next(vm):
        assert vm.read_text("/tmp/left") == "when it failed"
        assert vm.faults.in_force == ()

    def test_meets_a_snapshot(vm):
        with vm.snapshot():
            vm.faults.freeze()
            assert 0
"""


@pytest.mark.origins("cloned")
def test_a_frozen_guest_goes_on_when_its_test_has_failed(vm_factory, tmp_path):
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_it.py").write_text(textwrap.dedent(SUITE))
    command = [sys.executable, "-m", "pytest", "--vm-keep=failed", "--vm-artifacts=artifacts"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    store = KeptStore(vm_factory.backend.cache)
    kept = [
        one
        for name in ("test_fails", "test_meets_a_snapshot")
        for one in store.find(f"test_it.py::{name}", tmp_path)
    ]
    try:
        assert "2 failed, 2 passed" in run.stdout, run.stdout
        assert [one.answers for one in kept] == [True, True], run.stdout
        with entered(vm_factory, kept[0]) as guest:
            assert guest.read_text("/tmp/left") == "when it failed"
    finally:
        for one in kept:
            store.discard([one.folder])
    for clock in ("runs", "stops"):
        line = rf"fault in tiny-\d+: guest frozen, clock {clock} \(began .*, ended .*\)\n"
        assert re.search(line, run.stdout)
    assert re.search(
        r"test_leaves\[tiny\] left a fault in force in tiny-\d+, which was ended", run.stdout
    )
    (folder,) = (tmp_path / "artifacts").glob("*test_fails*/tiny-[0-9]*")
    assert "guest frozen, clock runs" in (folder / "faults.log").read_text()
    assert (folder / "processes.txt").read_text()
