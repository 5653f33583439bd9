"""Ten tests of a Debian system, driven from outside: what must not happen on one's own machine.

Run them with ``pytest examples``. The first group shares one guest, since its tests get along with
each other; each test of the second group breaks something and has a guest of its own.
"""

from __future__ import annotations

import datetime as dt
import re
import socket

import pytest

from pytest_vmsandbox import CommandError, TransferError


@pytest.mark.vm("debian-13", isolation="module", disks=["256MiB"])
class TestTogether:
    """Tests that leave the guest usable for the next one."""

    def test_partition_a_blank_disk(self, vm):
        vm.run(["sfdisk", "--quiet", "/dev/vdb"], input="label: gpt\nsize=64MiB\nsize=+\n")
        vm.wait_until(["test", "-b", "/dev/vdb2"], timeout=60)
        vm.run(["mkfs.ext4", "-q", "-L", "data", "/dev/vdb1"], timeout=120)
        vm.shell("mkdir -p /mnt/data && mount LABEL=data /mnt/data")
        size = int(vm.run(["blockdev", "--getsize64", "/dev/vdb1"]).stdout)
        assert size == 64 << 20
        assert "/dev/vdb1 ext4" in vm.run(["findmnt", "-no", "SOURCE,FSTYPE", "/mnt/data"]).stdout
        vm.run(["umount", "/mnt/data"])

    def test_load_a_kernel_module(self, vm):
        assert "dummy" not in vm.run(["lsmod"]).stdout
        vm.run(["modprobe", "dummy", "numdummies=2"])
        assert "dummy1" in vm.run(["ip", "-brief", "link"]).stdout
        vm.run(["modprobe", "--remove", "dummy"])
        assert "dummy1" not in vm.run(["ip", "-brief", "link"]).stdout

    def test_network_between_two_namespaces(self, vm):
        vm.shell(
            """
            set -e
            ip netns add here
            ip link add outside type veth peer name inside netns here
            ip address add 192.168.77.1/24 dev outside && ip link set outside up
            ip -n here address add 192.168.77.2/24 dev inside && ip -n here link set inside up
            """
        )
        listen = "import socket; s = socket.create_server(('192.168.77.2', 99)); print('up', flush=True); s.accept()[0].send(b'hello')"
        with vm.popen(["ip", "netns", "exec", "here", "python3", "-c", listen]) as server:
            assert server.stdout.readline() == "up\n"
            ask = "import socket; print(socket.create_connection(('192.168.77.2', 99)).recv(9))"
            assert vm.run(["python3", "-c", ask]).stdout == "b'hello'\n"

    def test_a_user_cannot_read_what_is_root_s(self, vm):
        vm.run(["useradd", "--create-home", "alice"])
        assert vm.run(["id", "-un"], user="alice").stdout == "alice\n"
        with pytest.raises(CommandError, match="Permission denied"):
            vm.run(["cat", "/etc/shadow"], user="alice")

    def test_systemd_restarts_a_service_that_dies(self, vm):
        vm.write_text(
            "/etc/systemd/system/fragile.service",
            "[Service]\nExecStart=/usr/bin/sleep infinity\nRestart=always\nRestartSec=100ms\n",
        )
        vm.run(["systemctl", "start", "fragile"])
        first = vm.run(["systemctl", "show", "-P", "MainPID", "fragile"]).stdout.strip()
        vm.run(["kill", "-KILL", first])
        vm.wait_until(
            [
                "sh",
                "-c",
                f'p=$(systemctl show -P MainPID fragile); [ "$p" != {first} ] && [ "$p" != 0 ]',
            ],
            timeout=60,
        )
        assert vm.run(["systemctl", "show", "-P", "NRestarts", "fragile"]).stdout == "1\n"


@pytest.mark.vm("debian-13")
class TestApart:
    """Tests that break their guest."""

    @pytest.mark.vm(network="nat")
    def test_install_a_package_and_use_its_service(self, vm):
        vm.run(["apt-get", "update", "-q"], timeout=900)
        vm.run(
            ["apt-get", "install", "-qy", "--no-install-recommends", "redis-server"],
            env={"DEBIAN_FRONTEND": "noninteractive"},
            timeout=900,
        )
        vm.run(
            [
                "sed",
                "-i",
                "s/^bind .*/bind 0.0.0.0/; s/^protected-mode yes/protected-mode no/",
                "/etc/redis/redis.conf",
            ]
        )
        vm.run(["systemctl", "restart", "redis-server"])
        vm.wait_until(["systemctl", "is-active", "redis-server"], timeout=120)
        with socket.create_connection(vm.forward(6379), timeout=60) as sock:
            sock.sendall(b"SET greeting hello\r\nGET greeting\r\n")
            answer = b""
            while b"hello" not in answer:
                more = sock.recv(100)
                assert more, answer
                answer += more
        assert answer == b"+OK\r\n$5\r\nhello\r\n"

    def test_a_service_survives_a_power_cut(self, vm):
        vm.write_text(
            "/etc/systemd/system/counter.service",
            "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo run >> /var/lib/counter; sync'\n"
            "[Install]\nWantedBy=multi-user.target\n",
        )
        vm.run(["systemctl", "enable", "--now", "counter"])
        vm.run(["sync"])
        vm.power_cut()
        vm.power_on()
        vm.wait_until(["sh", "-c", "[ $(wc -l < /var/lib/counter) = 2 ]"], timeout=120)

    def test_a_full_disk_is_told(self, vm, tmp_path):
        free = int(vm.run(["stat", "-f", "-c", "%a", "/"]).stdout) * 4096
        vm.run(["fallocate", "-l", str(free - (2 << 20)), "/filler"])
        (tmp_path / "more").write_bytes(bytes(8 << 20))
        with pytest.raises(TransferError, match="No space left"):
            vm.push(tmp_path / "more", "/more")
        vm.run(["rm", "/filler"])
        vm.push(tmp_path / "more", "/more")

    def test_the_clock_of_next_century(self, vm):
        vm.run(["date", "--set", "2101-01-01 00:00:00"])
        assert re.match("2101-01-01", vm.run(["date", "+%F"]).stdout)
        assert dt.datetime.now(tz=dt.UTC).year < 2101
        vm.run(["touch", "/tmp/from-the-future"])
        assert vm.run(["stat", "-c", "%y", "/tmp/from-the-future"]).stdout.startswith("2101")

    def test_nothing_of_the_system_is_sacred(self, vm):
        vm.run(["rm", "-rf", "--no-preserve-root", "/usr/lib", "/etc"], check=False)
        with pytest.raises(CommandError, match="command not found"):
            vm.run(["true"])
