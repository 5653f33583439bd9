"""Clocks that are wrong, and CPUs that stand still or are slow, as the guest sees them."""

import time
from datetime import timedelta

import pytest

from pytest_vmsandbox import CommandTimeout, ConfigError

pytestmark = [pytest.mark.origins("cloned"), pytest.mark.vm("tiny", memory="160MiB")]

RIGHT = 0.1  # seconds: a guest is right within 0.05, and reading its clock has an error, too


def lead(vm):
    """How far the guest's clock is ahead: at least, and at most."""
    with vm.engine.use() as running:
        return running.helper.read_lead()


def is_ahead(vm, seconds):
    least, most = lead(vm)
    return least - RIGHT <= seconds <= most + RIGHT


def uptime(vm):
    return float(vm.read_text("/proc/uptime").split()[0])


def tick(vm):
    lines = vm.run(["adjtimex"]).stdout.splitlines()
    return next(int(line.split()[2]) for line in lines if line.startswith("-t"))


def test_clock(vm):
    with vm.faults.clock(timedelta(hours=1)):
        assert is_ahead(vm, 3600)
        with vm.faults.clock(-0.5):  # a small one is kept, too
            with vm.snapshot():
                vm.run(["date", "-s", "2031-01-01 00:00:00"])
            assert is_ahead(vm, 3599.5)
            vm.engine.rest()
            assert vm.engine.resting
            assert is_ahead(vm, 3599.5)
        assert is_ahead(vm, 3600)
        vm.run(["date", "-s", "2031-01-01 00:00:00"])  # as NTP in the guest may do
        vm.engine.rest()
    assert is_ahead(vm, 0)
    ended = vm.faults.clock(7200)
    with vm.snapshot():
        ended.end()
        vm.faults.clock(-7200)
        assert is_ahead(vm, -7200)
    assert is_ahead(vm, 0)  # neither of them
    assert not vm.faults.in_force
    fault = vm.faults.clock(-86400)
    vm.power_cut()
    vm.power_on()
    fault.end()
    least, most = lead(vm)
    assert least <= 2  # what a boot leaves
    assert most >= -2

    for wrong in ({"offset": "1"}, {"rate": 1.2}, {"rate": 0.5}, {"leap": "both"}):
        with pytest.raises(ConfigError):
            vm.faults.clock(**wrong)
    with pytest.raises(ConfigError, match="needs Python 3"):
        vm.faults.clock(leap="insert")
    assert not vm.faults.in_force


def test_rate(vm):
    before = uptime(vm), time.monotonic()
    with vm.faults.clock(rate=0.9) as fault:
        began = time.monotonic()
        assert tick(vm) == 9000
        time.sleep(3)
        vm.engine.rest()
        time.sleep(2)
        least, most = lead(vm)
        passed = time.monotonic() - began
        assert least - RIGHT <= -0.1 * passed <= most + RIGHT
        with vm.faults.clock(rate=1.1):
            assert tick(vm) == 10_000
        with pytest.raises(ConfigError, match="rates add up"):
            vm.faults.clock(rate=0.95)
    assert tick(vm) == 10_000
    assert is_ahead(vm, 0)
    assert (
        uptime(vm) - before[0] < time.monotonic() - before[1]
    )  # the monotonic clock was slow, too
    assert not fault.in_force


def test_frozen_and_paused(vm):
    vm.run(["true"])
    with vm.faults.freeze():
        assert vm.qmp("query-status")["status"] == "paused"
        with pytest.raises(CommandTimeout):
            vm.run(["true"], timeout=0.1)
        process = vm.popen(["echo", "later"])
        with (
            pytest.raises(ConfigError, match="keeps from answering cannot be saved"),
            vm.snapshot(),
        ):
            pass
        with pytest.raises(ConfigError, match="frozen already"):
            vm.faults.freeze()
    assert process.stdout.read() == "later\n"  # it has thawed
    began, up = time.monotonic(), uptime(vm)
    with vm.faults.freeze(2.5):
        vm.run(["true"])  # it has thawed by itself
        assert time.monotonic() - began >= 2.5
        assert uptime(vm) - up <= time.monotonic() - began - 2.4
        behind = -sum(lead(vm)) / 2
        assert behind >= 2.4
        with vm.snapshot():
            pass
        assert is_ahead(vm, -behind)
    assert is_ahead(vm, 0)
    with vm.snapshot():
        forgotten = vm.faults.freeze()
    vm.run(["true"])  # what is restored is not frozen
    assert not forgotten.in_force
    with vm.faults.freeze():
        vm.power_cut()
    vm.power_on()
    vm.run(["true"])


def test_frozen_without_knowing(vm):
    vm.run(["true"])
    before = uptime(vm)
    began = time.monotonic()
    with vm.faults.freeze(2.5, clock="runs"):
        vm.run(["true"])
        passed = time.monotonic() - began
        assert passed >= 2.5
        assert uptime(vm) - before >= passed - 0.5  # it has jumped ahead
        assert is_ahead(vm, 0)
    with vm.faults.stall(0.5), vm.faults.freeze(clock="runs"):
        vm.power_cut()  # a stopped QEMU is killed as well


def test_stalled(vm):
    """Whatever else this host does, the guest has not more than its part."""
    busy = vm.popen(["sh", "-c", "while :; do :; done"])
    with vm.faults.stall(0.8):
        began, used, up = time.monotonic(), vm.engine.processor_seconds, uptime(vm)
        time.sleep(4)
        assert vm.engine.processor_seconds - used <= 0.4 * (time.monotonic() - began)
        assert uptime(vm) - up >= 4 - 0.5  # its clock does not stop
        assert is_ahead(vm, 0)
        with vm.snapshot():
            pass
        began, used = time.monotonic(), vm.engine.processor_seconds  # of another QEMU
        time.sleep(4)
        assert vm.engine.processor_seconds - used <= 0.4 * (time.monotonic() - began)
    busy.kill()
    for wrong in ({"share": 0}, {"share": 1}, {"share": 0.5, "period": 0}):
        with pytest.raises(ConfigError):
            vm.faults.stall(**wrong)


@pytest.mark.vm("debian-13", memory="512MiB")
def test_leap_second(vm):
    watch = (
        "import time\nlast = 0\nprint('ready', flush=True)\nwhile True:\n    now = time.time()\n"
        "    if now < last and now % 86400 > 86398:\n        print('again', flush=True)\n    last = now\n"
    )
    watching = vm.popen(["python3", "-c", watch])  # before, as it may take long to start
    assert watching.stdout.readline() == "ready\n"
    with vm.faults.clock(leap="insert"):
        assert watching.stdout.readline() == "again\n"
        watching.kill()
        assert "inserting leap second 23:59:60 UTC" in vm.run(["dmesg"], user="root").stdout
    assert is_ahead(vm, 0)
    flags = vm.shell("busybox adjtimex | grep status", user="root").stdout
    assert "INS" not in flags
