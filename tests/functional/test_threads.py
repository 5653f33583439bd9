"""All that a guest can do, asked for by two threads at a time while it rests."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from pytest_vmsandbox import BootError, ConfigError, Guest, GuestLost

FILE = "/root/file"
SECONDS = 600  # emulated, and with much to do


def snapshot(vm):
    with vm.snapshot():
        pass


def forked(vm):
    with vm.fork():
        pass


def popen(vm):
    with vm.popen(["cat"]) as process:
        process.stdin.write("x")
        process.stdin.close()
        assert process.stdout.read() == "x"
        assert process.wait(SECONDS) == 0


CALLS = {
    "alive": lambda vm, _: vm.alive,
    "origin": lambda vm, _: vm.origin,
    "spec": lambda vm, _: vm.spec,
    "faults": lambda vm, _: vm.faults.in_force,
    "run": lambda vm, _: vm.run(["true"]),
    "shell": lambda vm, _: vm.shell("true"),
    "popen": lambda vm, _: popen(vm),
    "wait_until": lambda vm, _: vm.wait_until(["true"], timeout=SECONDS),
    "write_text": lambda vm, _: vm.write_text(FILE, "x"),
    "read_text": lambda vm, _: vm.read_text(FILE),
    "pull": lambda vm, folder: vm.pull(FILE, folder / "file"),
    "push": lambda vm, folder: vm.push(folder / "file", FILE),
    "forward": lambda vm, _: vm.forward(22),
    "console": lambda vm, _: vm.console.text,
    "screenshot": lambda vm, folder: vm.screenshot(folder / f"{threading.get_ident()}.png"),
    "qmp": lambda vm, _: vm.qmp("query-status"),
    "ssh": lambda vm, _: vm.ssh,
    "ssh_command": lambda vm, _: vm.ssh_command,
    "ssh_config": lambda vm, folder: vm.ssh_config(folder / "ssh_config"),
    "attach_disk": lambda vm, _: vm.attach_disk(size="1MiB"),
    "detach": lambda vm, _: vm.detach(vm.attach_disk(size="1MiB")),
    "crash_points": lambda vm, _: recorded(vm),
    "snapshot": lambda vm, _: snapshot(vm),
    "fork": lambda vm, _: forked(vm),
    "networks": lambda vm, _: vm.networks,
    "reboot": lambda vm, _: vm.reboot(timeout=SECONDS),
    "power_off": lambda vm, _: vm.power_off(),
    "power_on": lambda vm, _: vm.power_on(),
    "power_cut": lambda vm, _: vm.power_cut(),
}
LOOKS = {"alive", "faults", "networks", "origin", "spec"}  # they do not let it go on
SWITCHES = {"power_off", "power_on", "power_cut"}  # the second one comes too late


def test_no_call_is_forgotten():
    assert CALLS.keys() == {name for name in dir(Guest) if not name.startswith("_")}


@pytest.mark.vm("tiny", memory="160MiB")
@pytest.mark.origins("cloned")
def test_two_at_a_time(vm_factory, tmp_path):
    with vm_factory.boot("tiny", memory="160MiB") as vm, ThreadPoolExecutor(2) as pool:
        for name, call in CALLS.items():
            if name != "power_on":
                rest(vm)
            together = threading.Barrier(2)
            calls = [pool.submit(begin, together, partial(call, vm, tmp_path)) for _ in range(2)]
            errors = [error for one in calls if (error := one.exception(SECONDS)) is not None]
            if name in SWITCHES:
                assert len(errors) < 2, name
                assert all(isinstance(it, BootError | ConfigError | GuestLost) for it in errors)
            else:
                assert errors == [], name
            assert vm.engine.is_on == (name not in {"power_off", "power_cut"})
            assert vm.engine.resting == (name in LOOKS)


def recorded(vm):
    disk = vm.attach_disk(size="1MiB")
    vm.crash_points(disk)
    vm.detach(disk)


def rest(vm):
    """Pause the guest, whatever holds it."""
    with vm.engine.use() as running:
        pass
    running.held = False
    vm.engine.rest()
    assert vm.engine.resting


def begin(together, call):
    together.wait(SECONDS)
    return call()
