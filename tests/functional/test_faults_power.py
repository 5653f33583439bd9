"""Faults of the power and of the kernel, as the guest sees them, and that they are gone afterwards."""

from __future__ import annotations

import time

import pytest

from pytest_vmsandbox import CommandTimeout, ConfigError, GuestLost

pytestmark = [pytest.mark.vm("tiny"), pytest.mark.origins("cloned")]


def boots(vm) -> str:
    return vm.read_text("/proc/sys/kernel/random/boot_id")


def test_reset_and_the_plug(vm):
    first = boots(vm)
    assert "NMI received" not in vm.run(["dmesg"]).stdout
    assert not vm.faults.nmi().in_force
    assert "NMI received" in vm.run(["dmesg"]).stdout
    with vm.faults.reset() as fault:
        assert fault.in_force
    second = boots(vm)
    with vm.faults.power_cut() as fault:
        assert not vm.alive
        with pytest.raises(GuestLost, match="switched off"):
            vm.run(["true"])
        vm.power_on()
        assert not fault.in_force
        third = boots(vm)
    assert len({first, second, third}) == 3
    with vm.faults.power_button(timeout=60):
        assert not vm.alive
    assert boots(vm) != third
    log = (vm.engine.machines.logs / "faults.log").read_text()
    assert [line.split(maxsplit=2)[2] for line in log.splitlines()] == [
        "event NMI",
        "begin reset",
        "end   reset",
        "begin power cut",
        "end   power cut",
        "begin power button",
        "end   power button",
    ]


def test_panic(vm, monkeypatch):
    first = boots(vm)
    vm.shell("mount --bind /dev/null /proc/sysrq-trigger")
    with monkeypatch.context() as patch:
        patch.setattr(type(vm.engine), "command_seconds", 2.0)
        with pytest.raises(CommandTimeout, match="did not panic"):
            vm.faults.panic(reboots=1)
    assert vm.read_text("/proc/sys/kernel/panic") == "0\n"
    vm.shell("umount /proc/sysrq-trigger")
    with vm.faults.panic():
        assert not vm.alive
        with pytest.raises(GuestLost, match="kernel panic: sysrq triggered crash"):
            vm.run(["true"])
    second = boots(vm)
    with vm.snapshot():
        fault = vm.faults.panic()
    assert not fault.in_force
    assert boots(vm) == second
    with vm.faults.panic(reboots=1):
        assert vm.alive
    assert vm.alive
    assert len({first, second, boots(vm)}) == 3


def test_suspend(vm):
    """After each time, the guest can do all that it could before: SeaBIOS forgets registers."""
    first = boots(vm)
    for number in (1, 2):
        with vm.faults.suspend():
            assert vm.alive
            assert vm.qmp("query-status")["status"] == "suspended"
        assert vm.qmp("query-status")["status"] == "running"
        assert vm.shell("dmesg | grep -c 'PM: suspend exit'").stdout == f"{number}\n"
    with vm.faults.suspend(0.1) as fault:
        while fault.in_force:
            time.sleep(0.05)
        assert boots(vm) == first
    before = time.time()
    assert before - 2 < int(vm.run(["date", "+%s"]).stdout) < time.time() + 1
    vm.detach(vm.attach_disk(size="1MiB"))
    with vm.faults.suspend():
        vm.power_cut()
    vm.power_on()
    vm.run(["mount", "-t", "tmpfs", "none", "/sys/power"])
    with pytest.raises(ConfigError, match="cannot suspend"):
        vm.faults.suspend()
    assert vm.faults.in_force == ()


def test_watchdog(vm):
    first = boots(vm)
    with vm.faults.watchdog(seconds=2) as watchdog:
        with pytest.raises(CommandTimeout, match="was not fired"):
            watchdog.fired(0.5)
        with pytest.raises(ConfigError, match="watchdog is plugged in"), vm.snapshot():
            pass
        vm.write_text("/dev/watchdog", "feed me")
        watchdog.fired(60)
        second = boots(vm)
        assert second != first
        assert vm.engine.machines.free_port("a test") == "port1"
    assert vm.shell("cat /sys/bus/pci/devices/*/device").stdout.count("0x25ab") == 0
    assert vm.engine.machines.free_port("a test") == "port0"
    with vm.faults.watchdog("poweroff", seconds=2) as watchdog:
        vm.write_text("/dev/watchdog", "feed me")
        watchdog.fired(60)
    assert boots(vm) != second
    vm.shell("rm -r /lib/modules/*")
    with pytest.raises(ConfigError, match="has no driver"):
        vm.faults.watchdog()
