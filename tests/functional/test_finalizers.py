"""What is dropped without having been closed raises nothing, however its guest has ended.

Python's development mode tells of errors in finalizers that older versions of it would hide.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

SUITE = """
    import gc, os, signal, threading
    import pytest
    from pytest_vmsandbox import VMSandboxError
    from pytest_vmsandbox.guests.running.machines import Running

    @pytest.fixture(params=["helper", "ssh"])
    def way(request, monkeypatch):
        if request.param == "ssh":
            monkeypatch.setattr(Running, "helper", None)

    @pytest.fixture
    def boot(vm_factory):
        return lambda: vm_factory.boot("tiny", memory="160MiB")

    def start(vm):
        text, data = vm.popen(["cat"]), vm.popen(["cat"], text=False)
        text.stdin.write("not sent")
        data.stdin.write(b"not sent")
        read = vm.popen(["echo", "x"])
        assert read.stdout.read(1) == "x"
        return [text, data, read, vm.popen(["yes"])]

    def cut(vm):
        vm.power_cut()
        vm.power_on()

    def restart(vm):
        vm.reboot()

    def lose(vm):
        killer = threading.Timer(0.5, os.kill, (vm.engine.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(VMSandboxError):
            vm.pull("/dev/zero", "zero")
        killer.join()

    def look(vm):
        vm.forward(22)
        assert vm.ssh_command

    @pytest.mark.parametrize("what", [cut, restart, lose, look])
    def test_a_guest_and_its_programs(boot, way, what, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with boot() as vm:
            held, console, forgotten = start(vm), vm.console, start(vm)
            del forgotten
            what(vm)
            gc.collect()
        del vm, held, console
        gc.collect()

    def test_a_snapshot_that_nobody_ends(boot):
        with boot() as vm:
            snapshot = vm.snapshot()
            snapshot.__enter__()
            vm.write_text("/root/file", "kept")
            del snapshot
            gc.collect()
            assert vm.read_text("/root/file") == "kept"
        del vm
        gc.collect()

    def test_a_guest_that_nobody_ends(boot):
        context = boot()
        held = start(context.__enter__())
        del context
        gc.collect()
        del held
        gc.collect()

    def test_a_monitor_after_the_end(boot):
        with boot() as vm:
            with vm.engine.use() as running:
                monitor = running.machine.monitor
        with pytest.raises(VMSandboxError):
            monitor.execute("query-status")
        del monitor
        gc.collect()
"""


def test_nothing_is_raised(tmp_path):
    (tmp_path / "test_it.py").write_text(textwrap.dedent(SUITE))
    argv = [sys.executable, "-X", "dev", "-W", "error"]
    argv += ["-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "11 passed" in done.stdout, done.stdout + done.stderr
