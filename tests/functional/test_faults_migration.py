"""A guest that moves to another QEMU process in the middle of a test."""

import dataclasses
import os
import re
import socket
import threading

import pytest

from pytest_vmsandbox import ConfigError, MonitorError
from pytest_vmsandbox.guests.networks.joining import joined
from pytest_vmsandbox.guests.running import moving as moving_guest
from pytest_vmsandbox.machine import moving
from pytest_vmsandbox.machine.qemu import find_qemu

pytestmark = [pytest.mark.vm("tiny", memory="160MiB"), pytest.mark.origins("cloned")]
DIRTY = "while :; do dd if=/dev/urandom of=/tmp/noise bs=1M count=16 2>/dev/null; done"
COUNT = "i=0; while [ $i -lt {} ]; do echo $i; i=$((i + 1)); done"
LINES, BYTES = 20_000, 4 << 20
needs_a_new_qemu = pytest.mark.skipif(
    find_qemu("x86_64").version < (10, 0),
    reason="QEMU before 10.0 cannot move emulated guests; tox -e second-qemu runs this",
)


def test_what_is_refused(vm, monkeypatch, tmp_path):
    machines, pid = vm.engine.machines, vm.engine.pid
    with pytest.raises(ConfigError, match="does not print the version"):
        vm.faults.migrate("/bin/true")
    with pytest.raises(ConfigError, match="is no program"):
        vm.faults.migrate(tmp_path / "none")
    qemu = machines.blueprint.qemu
    old = dataclasses.replace(qemu, version=min(qemu.version, (9, 2)))
    blueprint = dataclasses.replace(machines.blueprint, qemu=old)
    monkeypatch.setattr(machines, "blueprint", blueprint)
    with pytest.raises(ConfigError, match="breaks when it moves away") as refused:
        vm.faults.migrate()
    assert "QEMU 10.0 or newer on both sides" in refused.value.remedy
    other = dataclasses.replace(qemu, version=(10, 1, 0))
    newer = dataclasses.replace(qemu, version=(10, 0, 9))
    monkeypatch.setattr(machines, "blueprint", dataclasses.replace(blueprint, qemu=other))
    with pytest.raises(ConfigError, match="may not understand"):
        moving_guest.move(vm.engine, newer)
    monkeypatch.setattr(machines, "blueprint", dataclasses.replace(blueprint, qemu=newer))
    monkeypatch.setitem(machines.faults.recorded, "disk0", print)
    with pytest.raises(ConfigError, match="while a disk is recorded: disk0"):
        moving_guest.move(vm.engine, newer)
    monkeypatch.setitem(machines.plugged, "watchdog", "port3")
    with pytest.raises(ConfigError, match="watchdog is plugged in for a fault"):
        moving_guest.move(vm.engine, newer)
    assert vm.run(["echo", "goes on"]).stdout == "goes on\n"
    assert (vm.engine.pid, vm.faults.in_force) == (pid, ())


@needs_a_new_qemu
def test_it_moves(vm, monkeypatch):
    disk = vm.attach_disk(size="16MiB")
    vm.shell(f"mkfs.ext4 -q {disk.device}; mount {disk.device} /mnt")
    writer = vm.popen(["sh", "-c", "i=0; while :; do echo $i; i=$((i + 1)); sync; done >/mnt/log"])
    noise, counter = vm.popen(["sh", "-c", DIRTY]), vm.popen(["sh", "-c", COUNT.format(LINES)])
    address, forks = vm.forward(22, timeout=20), of_a_fork(vm)
    data, back = os.urandom(BYTES), bytearray()
    with vm.popen(["cat"], text=False) as cat, socket.create_connection(address) as outside:
        assert outside.recv(4) == b"SSH-"
        feeding = threading.Thread(target=feed, args=(cat, data))
        reading = threading.Thread(target=lambda: back.extend(cat.stdout.read()))
        feeding.start()
        reading.start()

        # The other QEMU dies when the guest stands still: it goes on in its own.
        pid, settle = vm.engine.pid, moving._settle
        others, begin = [], moving._begin

        def note(machine, other):
            others.append(other)
            return begin(machine, other)

        monkeypatch.setattr(moving, "_begin", note)
        monkeypatch.setattr(moving, "_settle", lambda *_: others[0].kill())
        with pytest.raises(MonitorError, match="the migration failed"):
            vm.faults.migrate()
        assert vm.engine.pid == pid
        assert vm.run(["echo", "unharmed"]).stdout == "unharmed\n"

        monkeypatch.setattr(moving, "_settle", settle)
        moved = vm.faults.migrate()
        assert vm.engine.pid != pid
        assert (moved.in_force, 0 < moved.gap < moved.seconds) == (False, True)
        again = vm.faults.migrate()
        assert "live migration from QEMU" in again.text
        feeding.join()
        reading.join()
        outside.settimeout(5)
        while outside.recv(4096):  # it has ended
            pass
    assert back == data
    assert list(map(int, counter.stdout)) == list(range(LINES))
    least, most = vm.engine.running.helper.read_lead()
    assert most > -0.05
    assert least < 0.05
    assert of_a_fork(vm) == forks  # it does not take itself for a clone

    assert vm.forward(22) == address
    with socket.create_connection(address) as outside:
        assert outside.recv(4) == b"SSH-"
    noise.kill()
    writer.kill()
    writer.wait(20)
    log = vm.read_text("/mnt/log").split()
    assert log == list(map(str, range(len(log))))
    vm.shell(f"umount /mnt; e2fsck -fn {disk.device}")
    vm.detach(disk)
    with vm.snapshot():
        vm.write_text("/tmp/later", "x")
        vm.faults.migrate()
    assert vm.run(["test", "-e", "/tmp/later"], check=False).returncode == 1
    vm.power_cut()
    vm.power_on()


@needs_a_new_qemu
def test_the_fault_of_a_disk_moves_along(vm, monkeypatch):
    disk = vm.attach_disk(size="16MiB")

    def write():
        dd = f"dd if=/dev/zero of={disk.device} bs=4k count=1 oflag=direct conv=fsync"
        return vm.shell(dd, check=False).stderr.count("Input/output error")

    always = vm.faults.disk(disk, fail="read", sectors=[8])
    with (
        vm.faults.disk(disk, fail="write", once=True),
        vm.faults.disk(disk, fail="flush", once=True),
    ):
        assert write() == 1
        vm.faults.migrate()
        assert write() == 1  # the flush
        assert write() == 0
        vm.faults.migrate()
        assert write() == 0
    read = f"dd if={disk.device} of=/dev/null bs=4k skip=1 count=1 iflag=direct"
    assert vm.shell(read, check=False).returncode == 1

    def refuse(_):
        raise MonitorError("no fault can be put in")

    with monkeypatch.context() as patched:
        patched.setattr(always, "switched_on", refuse)
        with pytest.raises(MonitorError, match="no fault"):
            vm.faults.migrate()
    assert vm.run(["echo", "goes on"]).stdout == "goes on\n"
    always.end()
    vm.engine.check_disks()


def feed(program, data):
    program.stdin.write(data)
    program.stdin.close()


def of_a_fork(vm):
    """How often the kernel has learnt that it is a clone."""
    return len(re.findall("virtual machine fork", vm.run(["dmesg"]).stdout))


@needs_a_new_qemu
def test_its_networks_move_along(vm, vm_factory, monkeypatch):
    with (
        vm_factory.network("lan") as lan,
        joined(vm, [lan]),
        vm_factory.boot("tiny", networks=[lan], memory="160MiB") as other,
    ):
        here, there = COUNT.format(100), f"nc -w 20 {lan.name_of(vm)} 7"
        server = vm.popen(["nc", "-l", "-p", "7"])
        vm.wait_until(["sh", "-c", "netstat -ltn | grep -q :7"], timeout=20)
        sender = other.popen(["sh", "-c", f"({here}; read x; {here}) | {there}"])
        with monkeypatch.context() as patch:  # it goes on in its old QEMU, with its old cable
            patch.setattr(moving, "_settle", lambda machine, _: machine.execute("no-such-command"))
            with pytest.raises(MonitorError):
                vm.faults.migrate()
        assert other.run(["ping", "-c1", lan.name_of(vm)]).returncode == 0
        with lan.unplug(vm):
            vm.faults.migrate()
            assert vm.read_text(f"/sys/class/net/{lan.interface(vm)}/carrier").strip() == "0"
        sender.stdin.write("go on\n")
        sender.stdin.close()
        assert sender.wait(60) == 0
        assert list(map(int, server.stdout)) == 2 * list(range(100))
