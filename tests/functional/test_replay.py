"""A test inside that fails is recorded, and repeated to the byte."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

from support.environment import without_ours

SUITE = """
import os, random, subprocess, threading, time, uuid

import pytest

pytestmark = pytest.mark.in_vm


def test_passes(tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(1000))


def test_fails():
    order = []
    threads = [threading.Thread(target=order.append, args=[number]) for number in range(4)]
    for each in threads:
        each.start()
    subprocess.run(["sync"], check=True)
    print(uuid.uuid4(), time.time_ns(), order, {random.random()})
    assert not uuid.uuid4()


def test_restarts():
    subprocess.run(["reboot", "-f"])
    time.sleep(1000)


def test_kills_the_supervisor():
    os.kill(os.getppid(), 9)
    time.sleep(1000)
"""


def run(folder, *args):
    return subprocess.run(
        [sys.executable, "-P", "-m", *args],
        env=without_ours(), cwd=folder, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


class Debugger:
    """What gdb does: it sends commands to QEMU, and gets answers."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=300)
        self.received = b""

    def ask(self, command):
        self.socket.sendall(b"$%b#%02x" % (command, sum(command) % 256))
        while (found := re.search(rb"\$(.*?)#..", self.received)) is None:
            data = self.socket.recv(65536)
            assert data, "QEMU is gone"
            self.received += data
        self.received = self.received[found.end() :]
        self.socket.sendall(b"+")
        return found[1]

    def place(self):
        """The address of the next instruction."""
        return self.ask(b"g")[16 * 16 : 17 * 16]


def test_a_failure_repeats_to_the_byte(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nvm_requirements = pytest\n")
    done = run(tmp_path, "pytest", "-p", "no:cacheprovider", "--vm-record", "--vm-accel=tcg")
    assert "1 failed, 1 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    assert "is switched off (guest-reset)" in done.stdout
    assert "that runs the tests is gone" in done.stdout
    line = "vmsandbox replay 'test_suite.py::test_fails[debian-13]'"
    assert line in done.stdout
    assert "test_passes[debian-13]'" not in done.stdout
    (found,) = set(re.findall(r"assert not UUID\('[-0-9a-f]{36}'\)", done.stdout))

    node = "test_suite.py::test_fails"
    again = run(tmp_path, "pytest_vmsandbox", "replay", node, "--times=2", "--output=out")
    assert again.returncode == 0, again.stdout + again.stderr
    assert re.findall("replay ([12]) of 2: .*, the same as recorded", again.stdout) == ["1", "2"]
    assert found in again.stdout  # how it failed
    assert found.encode() in (tmp_path / "out" / "report").read_bytes()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-P", "-m", "pytest_vmsandbox", "replay", node, f"--gdb={port}"]
    with subprocess.Popen(argv, env=without_ours(), cwd=tmp_path, stdout=subprocess.PIPE) as waits:
        lines = iter(waits.stdout.readline, b"")
        assert any(b"the guest waits" in line for line in lines)
        debugger = Debugger(port)
        places = []
        for command in (b"s", b"s", b"s", b"s", b"bs", b"bs"):
            assert debugger.ask(command).startswith(b"T05")
            places.append(debugger.place())
        *_, second, third, fourth, back, further_back = places
        assert len({second, third, fourth}) == 3
        assert (back, further_back) == (third, second)
        assert debugger.ask(b"D") == b"OK"
        assert b"replay 1 of 1" in waits.stdout.read()
        debugger.socket.close()
    assert waits.returncode == 0

    none = run(tmp_path, "pytest_vmsandbox", "replay", "test_suite.py::test_passes")
    assert none.returncode == 2
    assert "no run of" in none.stderr
