"""What the Debian images promise, on each of them."""

from __future__ import annotations

import socket

import pytest

from pytest_vmsandbox import GuestLost

pytestmark = pytest.mark.vm("debian-12", "debian-13")


@pytest.mark.vm(isolation="module")
def test_it_is_a_real_debian(vm):
    release = vm.read_text("/etc/os-release")
    assert f'VERSION_ID="{vm.image.removeprefix("debian-")}"' in release
    vm.run(["python3", "-c", "import ssl, sqlite3, ctypes, venv"])
    vm.wait_until(["sh", "-c", "systemctl is-system-running | grep -qE 'running|degraded'"],
                  timeout=300)  # fmt: skip
    assert vm.run(["systemctl", "--failed", "--no-legend"]).stdout == ""
    assert vm.run(["systemctl", "list-timers", "--no-legend"]).stdout == ""
    assert (
        "vmsandbox-marker"
        in vm.shell("logger vmsandbox-marker; journalctl --sync; journalctl -q -n 20").stdout
    )
    assert vm.run(["dpkg", "--audit"]).stdout == ""


@pytest.mark.vm(isolation="module")
def test_nothing_gets_out(vm):
    """Neither names nor addresses beyond the guest are reached, nor the host's own services."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # which a guest with `nat` reaches
        ours = "10.0.2.2", server.getsockname()[1]
        for address in (ours, ("1.1.1.1", 80), ("169.254.169.254", 80)):
            ask = f"import socket; socket.create_connection({address}, 5)"
            assert vm.run(["python3", "-c", ask], check=False, timeout=120).returncode == 1
    ask = "import socket; socket.getaddrinfo('example.org', 80)"
    assert vm.run(["python3", "-c", ask], check=False, timeout=300).returncode == 1


@pytest.mark.vm(isolation="module")
def test_users_come_in(vm):
    assert vm.run(["id", "-un"], user="tester").stdout == "tester\n"
    assert vm.run(["sh", "-c", "echo $HOME"], user="tester").stdout == "/home/tester\n"
    assert "Permission denied" in vm.run(["cat", "/etc/shadow"], user="tester", check=False).stderr


@pytest.mark.vm(isolation="module")
def test_sessions_start_on_demand(vm):
    """Neither logind nor D-Bus costs anything before it is asked for."""
    assert vm.run(["pgrep", "-l", "logind|dbus"], check=False).stdout == ""
    assert "tester" not in vm.run(["loginctl", "list-sessions"]).stdout
    vm.run(["shutdown", "+5"])
    assert "poweroff" in vm.read_text("/run/systemd/shutdown/scheduled")
    vm.run(["shutdown", "-c"])
    ask = "systemctl --user is-system-running --wait"
    assert vm.run(["su", "-", "tester", "-c", ask]).stdout == "running\n"


@pytest.mark.vm(user="tester", disk="9GiB")
@pytest.mark.origins(
    "cloned"
)  # of a guest that was booted; and from its first reboot on, it is one
def test_power_an_ordinary_user_and_a_larger_disk(vm):
    blocks, size = map(int, vm.run(["stat", "-f", "-c", "%b %S", "/"]).stdout.split())
    assert blocks * size > 8.5 * 2**30
    assert vm.run(["id", "-un"]).stdout == "tester\n"
    assert vm.run(["id", "-un"], user="root").stdout == "root\n"
    vm.write_text("/home/tester/kept", "yes")
    first = vm.read_text("/proc/sys/kernel/random/boot_id")
    vm.run(["sync"])
    vm.reboot()
    assert vm.read_text("/proc/sys/kernel/random/boot_id") != first
    vm.power_off()
    vm.power_on()
    assert vm.read_text("/home/tester/kept") == "yes"
    with pytest.raises(GuestLost, match="kernel panic: sysrq triggered crash"):
        vm.run(["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 100"], user="root")


ECHO = """
import socket
sock = socket.socket(type=socket.SOCK_DGRAM)
sock.bind(("0.0.0.0", 5353))
while True:
    sock.sendto(*sock.recvfrom(100))
"""


@pytest.mark.vm("debian-13", network="nat")
@pytest.mark.origins("cloned")
def test_udp_is_forwarded(vm):
    vm.popen(["python3", "-c", ECHO])
    address = vm.forward(5353, protocol="udp", timeout=60)
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.settimeout(60)
        sock.sendto(b"ping", address)
        assert sock.recvfrom(100) == (b"ping", address)
