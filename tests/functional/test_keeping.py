"""Real guests of tests that fail are kept as they were then, whatever their teardown does to them."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from pytest_vmsandbox.guests.entering import entered
from pytest_vmsandbox.guests.kept import KeptStore

SUITE = """
    import pytest

    pytestmark = pytest.mark.vm("tiny", memory="160MiB")

    @pytest.fixture
    def app(vm, request):
        yield vm
        vm.write_text("/tmp/left", "torn down")
        assert "teardown" not in request.node.name

    def test_teardown(app):
        pass

    def test_call(app):
        app.write_text("/tmp/left", "as it was")
        assert app is None

    def test_snapshot(vm):
        with pytest.raises(AssertionError):
            with vm.snapshot():
                vm.write_text("/tmp/left", "in a snapshot")
                assert vm is None
        assert vm.run(["test", "-e", "/tmp/left"], check=False).returncode == 1
        with vm.snapshot():
            vm.write_text("/tmp/left", "in the last snapshot")
            assert vm is None

    def test_block(vm_factory):
        with vm_factory.boot("tiny", memory="160MiB") as a, vm_factory.boot("tiny", memory="160MiB") as b:
            a.write_text("/tmp/left", "in the block")
            b.power_cut()
            pytest.fail("as a timeout does")
"""


@pytest.mark.origins("cloned")
def test_a_guest_is_kept_as_it_was_when_its_test_failed(vm_factory, tmp_path):
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_it.py").write_text(textwrap.dedent(SUITE))
    command = [sys.executable, "-m", "pytest", "--vm-keep=failed", "--vm-artifacts=artifacts"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    store = KeptStore(vm_factory.backend.cache)
    try:
        found = {
            name: store.find(f"test_it.py::test_{name}", tmp_path)
            for name in ("teardown", "call", "snapshot", "block")
        }
        left = {}
        for name, guests in found.items():
            with entered(vm_factory, guests[0]) as vm:
                left[name] = vm.read_text("/tmp/left")
        assert left == {
            "teardown": "torn down",
            "call": "as it was",
            "snapshot": "in the last snapshot",
            "block": "in the block",
        }
        phases = [kept.moment.phase for guests in found.values() for kept in guests]
        assert phases == ["teardown", "call", "call", "call", "call"]
        assert [kept.has_memory for kept in found["block"]] == [True, False]
        for kept in found["block"]:
            assert f"vmsandbox enter test_it.py::test_block --guest {kept.guest}\n" in run.stdout
        assert "vmsandbox enter 'test_it.py::test_call[tiny]'\n" in run.stdout
    finally:
        mine = [kept.folder for kept in store.all() if kept.moment.rootdir == str(tmp_path)]
        store.discard(mine)
    assert len(mine) == 5, run.stdout
