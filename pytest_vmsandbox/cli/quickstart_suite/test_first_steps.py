"""First steps: what a test can do with a machine of its own.

``vmsandbox quickstart`` runs a copy of this file. Each test asks for the fixture `vm`, and gets a guest
that no other test uses.
"""

# ruff: noqa: INP001  # no package: the file is copied before it runs

from __future__ import annotations

import platform
import socket
from pathlib import Path
from urllib.request import urlopen

import pytest

from pytest_vmsandbox import CommandError, Guest, VMSandboxError

SERVICE = """\
[Unit]
Description=Serves the files in /srv

[Service]
ExecStart=/usr/bin/python3 -m http.server 8000 --directory /srv

[Install]
WantedBy=multi-user.target
"""
MARK = "/var/lib/i-was-here"

# All guests here are clones of one template. So all of them have the small disk that one test needs.
pytestmark = pytest.mark.vm(disks=["64MiB"])


def test_it_is_another_machine(vm: Guest) -> None:
    """The guest has a kernel of its own, and cannot reach this machine."""
    boot_id = "/proc/sys/kernel/random/boot_id"
    assert vm.read_text(boot_id) != Path(boot_id).read_text(encoding="utf-8")
    assert vm.run(["hostname"]).stdout.strip() != socket.gethostname()
    assert vm.run(["uname", "-r"]).stdout.strip() != platform.release()
    # By default the network is isolated. With network="nat", the guest would reach this machine at
    # 10.0.2.2.
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = str(server.getsockname()[1])
        attempt = vm.run(["busybox", "nc", "-w", "5", "10.0.2.2", port], check=False)
        assert attempt.returncode == 1
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_service_survives_a_reboot(vm: Guest) -> None:
    """A test can install a service, restart the guest, and reach the service from this machine."""
    if vm.run(["test", "-d", "/run/systemd/system"], check=False).returncode != 0:
        pytest.skip("this image has no systemd")
    vm.write_text("/srv/index.html", "hello")
    vm.write_text("/etc/systemd/system/hello.service", SERVICE)
    vm.run(["systemctl", "enable", "hello.service"])
    vm.reboot()
    vm.wait_until(["busybox", "wget", "-qO-", "http://127.0.0.1:8000/"], timeout=120)
    host, port = vm.forward(8000)
    with urlopen(f"http://{host}:{port}/", timeout=60) as answer:
        assert answer.read() == b"hello"


def test_destroying_everything(vm: Guest) -> None:
    """Do not try this at home. Here the guest is thrown away after the test."""
    vm.run(["mkdir", "-p", "/var/lib"])
    vm.write_text(MARK, "before the end")
    vm.run(["rm", "-rf", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64"], check=False)
    with pytest.raises(VMSandboxError):
        vm.run(["ls", "/usr/bin"])  # there is no `ls` any more


def test_the_next_guest_is_whole_and_its_disk_full(vm: Guest) -> None:
    """The next guest is whole again, and a test can fill its disk."""
    assert vm.run(["test", "-e", MARK], check=False).returncode != 0
    disk = vm.shell("ls /dev/vd? | tail -n 1").stdout.strip()
    vm.shell(f"mkfs.ext4 -q {disk} && mkdir -p /mnt/small && mount {disk} /mnt/small")
    with pytest.raises(CommandError, match="No space left on device"):
        vm.shell("cat /dev/zero > /mnt/small/file")
    vm.run(["rm", "/mnt/small/file"])
    vm.write_text("/mnt/small/file", "there is room again")
