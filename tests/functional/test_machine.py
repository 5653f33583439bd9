"""Power, console, network and the machine itself."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from pytest_vmsandbox import BootError, ConfigError, GuestLost, LaunchError, MonitorError
from pytest_vmsandbox.machine import cmdline
from support.resident import wait_for

pytestmark = pytest.mark.vm("tiny")
HARDWARE = {"cpus": 2, "memory": "320MiB", "disks": ["16MiB", "32MiB"]}


def boots(vm) -> str:
    return vm.read_text("/proc/sys/kernel/random/boot_id")


@pytest.mark.parametrize("again", [1, 2])
def test_nobody_was_here_before(vm, again):
    """Neither of the two sees the other."""
    assert vm.run(["ls", "/root"]).stdout == ""
    vm.write_text("/root/mark", "here")


def has_its_hardware(vm):
    assert vm.run(["nproc"]).stdout == "2\n"
    total = int(vm.shell("grep MemTotal /proc/meminfo").stdout.split()[1]) * 1024
    assert 200 << 20 < total < 320 << 20
    sizes = vm.shell("cat /sys/block/vda/size /sys/block/vdb/size").stdout.split()
    assert [int(size) * 512 for size in sizes] == [16 << 20, 32 << 20]
    assert vm.spec.cpus == 2


@pytest.mark.vm(**HARDWARE)
@pytest.mark.origins("cloned")  # from the first cut on, it is a guest that was booted
def test_power(vm):
    has_its_hardware(vm)
    vm.shell("mkfs.ext4 -q /dev/vdb && mkdir /mnt/d && mount /dev/vdb /mnt/d")
    first = boots(vm)
    vm.shell("echo kept > /mnt/d/synced && sync && echo lost > /mnt/d/not-synced")
    vm.power_cut()
    with pytest.raises(GuestLost, match="switched off"):
        vm.run(["true"])
    vm.power_on()
    second = boots(vm)
    assert second != first
    vm.shell("mkdir /mnt/d && mount /dev/vdb /mnt/d")
    assert vm.read_text("/mnt/d/synced") == "kept\n"
    with pytest.raises(ConfigError, match="is already on"):
        vm.power_on()
    vm.shell("echo kept too > /mnt/d/orderly")
    vm.power_off()
    vm.power_on()
    vm.shell("mkdir /mnt/d && mount /dev/vdb /mnt/d")
    assert vm.read_text("/mnt/d/orderly") == "kept too\n"
    third = boots(vm)
    vm.reboot()
    assert len({first, second, third, boots(vm)}) == 4
    has_its_hardware(vm)


def console(vm, _):
    vm.shell("echo hello from the guest > /dev/console")
    assert vm.console.wait_for(r"^hello from (.*)$", timeout=30)[1] == "the guest"
    assert "hello from the guest" in vm.console.tail(3)
    with pytest.raises(TimeoutError, match="never"):
        vm.console.wait_for("never", timeout=0.2)


def screenshot_and_qmp(vm, folder):
    vm.screenshot(folder / "shot.png")
    assert (folder / "shot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert vm.qmp("query-status")["status"] == "running"
    with pytest.raises(MonitorError, match="nonsense") as caught:
        vm.qmp("nonsense")
    assert caught.value.error_class == "CommandNotFound"


def forward(vm, _):
    vm.popen(["sh", "-c", "while :; do echo hello | nc -l -p 8080; done"])
    vm.wait_until(["sh", "-c", "netstat -ltn | grep -q :8080"], timeout=60)
    address = vm.forward(8080)
    assert address[0] == "127.0.0.1"
    assert vm.forward(8080) == address
    with socket.create_connection(address, 30) as sock:
        assert sock.recv(100) == b"hello\n"


def ssh_command_gets_in(vm, _):
    done = subprocess.run(
        ["sh", "-c", f"{vm.ssh_command} uname"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert (done.stdout, done.stderr) == ("Linux\n", "")


def qemu_runs_as_nobody_in_particular(vm, _):
    pid = vm.engine.pid
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    uids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
    assert "0" not in uids
    assert "Seccomp:\t2" in status
    if os.geteuid() != 0:
        assert set(uids) == {str(os.geteuid())}


def text_about_a_panic_is_none(vm, _):
    vm.shell("echo 'Kernel panic - not syncing: not really' > /dev/console")
    assert vm.run(["true"]).returncode == 0


def qemu_killed(vm, _):
    os.kill(vm.engine.pid, signal.SIGKILL)
    with pytest.raises(GuestLost, match="QEMU ended with signal SIGKILL"):
        vm.run(["sleep", "100"])


IN_ONE_GUEST = [
    console,
    screenshot_and_qmp,
    forward,
    ssh_command_gets_in,
    qemu_runs_as_nobody_in_particular,
    text_about_a_panic_is_none,
    qemu_killed,  # which is the end of it
]


def test_one_guest(vm, tmp_path):
    """None of these needs a guest for itself."""
    for check in IN_ONE_GUEST:
        check(vm, tmp_path)


@pytest.mark.origins("cloned")
def test_forward_where_nobody_listens(vm, caplog):
    vm.forward(8081)
    assert "nothing listens on TCP port 8081" in caplog.text
    vm.run(["httpd", "-p", "127.0.0.1:8081"])
    with pytest.raises(ConnectionRefusedError, match=r"listens only on 127\.0\.0\.1"):
        vm.forward(8081, timeout=0)
    vm.popen(["sh", "-c", "sleep 0.5; echo hello | nc -l -p 8082"])
    with socket.create_connection(vm.forward(8082, timeout=60), 30) as sock:
        assert sock.recv(100) == b"hello\n"


@pytest.mark.parametrize("network", ["isolated", "networked", "nat"])
def test_isolation(vm_factory, network):
    """The same attempts, with a positive control: nat reaches the host by TCP and UDP, isolated does not."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        answering = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        if network == "networked":
            lan = stack.enter_context(vm_factory.network("lan", ipv4="10.0.0.0/23"))
            vm = stack.enter_context(vm_factory.boot("tiny", networks=[lan]))
            vm.run(["ip", "route", "add", "10.0.2.2", "dev", lan.interface(vm)])
        else:
            vm = stack.enter_context(vm_factory.boot("tiny", network=network))
        answering.bind(("127.0.0.1", 0))
        patience = 60 if network == "nat" else 5  # where nothing comes, that is waited out
        # 10.0.2.2 is the host's loopback, as QEMU's user network shows it to the guest.
        connect = vm.popen(["nc", "-w", f"{patience}", "10.0.2.2", str(server.getsockname()[1])])
        # busybox's nc knows no UDP; this asks again and again until something comes.
        port = answering.getsockname()[1]
        ask = f"timeout {patience} tftp -g -l - -r {network} 10.0.2.2 {port}"
        asking = vm.popen(["sh", "-c", ask])
        if network == "nat":
            server.settimeout(60)
            server.accept()[0].close()
            answering.settimeout(60)
            question, guest = answering.recvfrom(1000)
            answering.sendto(b"\0\3\0\1answer\n", guest)
            assert question.split(b"\0")[1] == b"\1nat"
            assert asking.stdout.read() == "answer\n"
            return
        assert asking.stdout.read() == ""
        connect.wait(60)
        server.setblocking(False)
        answering.setblocking(False)
        for receive in (server.accept, partial(answering.recvfrom, 1000)):
            with pytest.raises(BlockingIOError):
                receive()


def test_few_descriptors(tmp_path):
    """A soft limit is raised; a hard one is told, with what helps."""
    (tmp_path / "test_it.py").write_text("def test_it(vm): vm.run(['true'])\n")
    pytest_tiny = f"{sys.executable} -m pytest -p no:cacheprovider --vm=tiny"

    def run(limit):
        line = f"ulimit {limit} && exec {pytest_tiny}"
        argv = ["sh", "-c", line]
        return subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "1 passed" in run("-S -n 64").stdout
    refused = run("-n 64").stdout
    assert "files open and may open 64" in refused
    assert "1 error" in refused


def test_two_at_once(vm_factory):
    with vm_factory.boot("tiny") as a, vm_factory.boot("tiny", memory="160MiB") as b:
        assert boots(a) != boots(b)
        assert a.name != b.name
        a.write_text("/tmp/x", "a")
        assert b.run(["test", "-e", "/tmp/x"], check=False).returncode == 1


@pytest.mark.origins("cloned")  # the guest that panics has been booted
def test_power_off_and_panic_from_inside(vm):
    vm.popen(["poweroff"])
    with pytest.raises(GuestLost, match="switched off"):
        vm.run(["sleep", "100"])
    vm.power_on()
    assert vm.run(["true"]).returncode == 0
    with pytest.raises(GuestLost, match="kernel panic: sysrq triggered crash"):
        vm.shell("echo c > /proc/sysrq-trigger; sleep 100")
    assert not vm.alive


@pytest.mark.origins("cloned")
def test_full_disk_of_this_machine(vm_factory, monkeypatch):
    """The guest gets an error, and swallows it; nobody else may."""
    plain = cmdline.overlay

    def without_room(node, number, *more, **options):
        device = plain(node, number, *more, **options)
        if node == "disk0" and number:  # not where a template's key is computed
            full = {"event": "none", "iotype": "write", "errno": errno.ENOSPC}
            device["file"] = {"driver": "blkdebug", "inject-error": [full], "image": device["file"]}
        return device

    def swallow(lost):
        with vm_factory.boot("tiny", **HARDWARE) as vm:
            with suppress(GuestLost):  # its kernel writes at the end of dd, or later
                vm.run(["dd", "if=/dev/zero", "of=/dev/vda", "count=1"])
                wait_for(lambda: not vm.alive)
            lost.append(not vm.alive)

    monkeypatch.setattr(cmdline, "overlay", without_room)
    was_lost = []
    with pytest.raises(GuestLost, match="No space left.*: this machine's disk is full") as caught:
        swallow(was_lost)
    assert was_lost == [True]
    assert "make room" in caught.value.remedy


@pytest.mark.origins("booted")
def test_too_much_memory(vm_factory):
    with pytest.raises(LaunchError, match="does not fit"), vm_factory.boot("tiny", memory="4TiB"):
        pass


@pytest.mark.origins("booted")
def test_too_little_memory_for_the_image(vm_factory):
    with pytest.raises(ConfigError, match="too little"), vm_factory.boot("tiny", memory="16MiB"):
        pass


@pytest.mark.origins("booted")
def test_no_answer_names_the_stage(vm_factory, monkeypatch):
    """A kernel that finds nothing to start panics, and that is what is told."""
    monkeypatch.setattr(vm_factory.backend.callbacks, "qemu_args", _broken_init)
    with pytest.raises(BootError, match="panic") as caught, vm_factory.boot("tiny"):
        pass
    assert caught.value.stage == "kernel"
    assert caught.value.seconds > 0


def _broken_init(spec):
    return ["-append", f"{spec.append} rdinit=/bin/false"]


@pytest.mark.origins("booted")
def test_ssh_never_answers(vm_factory, monkeypatch, vm_artifacts):
    """The last stage that was reached is named, with the end of the console; its screen is kept."""
    import dataclasses

    # It tells all that it does, so that there is no doubt how far it got.
    monkeypatch.setattr(
        vm_factory.backend.callbacks,
        "qemu_args",
        lambda spec: ["-append", f"{spec.append} ignore_loglevel rdinit=/usr/bin/cat"],
    )
    monkeypatch.setattr(
        vm_factory.backend,
        "settings",
        dataclasses.replace(vm_factory.backend.settings, boot_timeout=2.5),
    )
    with pytest.raises(BootError, match="did not answer on SSH") as caught, vm_factory.boot("tiny"):
        pass
    assert caught.value.stage == "kernel"
    assert "--- last lines of the console\n[" in str(caught.value)
    (picture,) = vm_artifacts.glob("*/screenshot.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.origins("booted")
def test_qemu_that_refuses_its_command_line(vm_factory, monkeypatch):
    monkeypatch.setattr(vm_factory.backend.callbacks, "qemu_args", lambda _: ["-no-such-option"])
    with (
        pytest.raises(LaunchError, match="QEMU ended with exit status 1") as caught,
        vm_factory.boot("tiny"),
    ):
        pass
    assert "no-such-option" in str(caught.value)
