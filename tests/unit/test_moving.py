"""What is asked of QEMU for a guest that moves, and what its console and port do meanwhile."""

import socket
import threading
from pathlib import Path

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.machine import cmdline, forwards
from pytest_vmsandbox.machine.port import Port
from pytest_vmsandbox.machine.qemu import qemu_at

LISTED = """\
Hub -1 (n0):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[ESTABLISHED]   31       10.0.2.15 40000        10.0.2.2  8080     0     0
  TCP[HOST_FORWARD]  12       127.0.0.1 40123       10.0.2.15    22     0     0
  UDP[HOST_FORWARD]  13       127.0.0.1 40124       10.0.2.15    53     0     0
"""


def test_which_ports_are_forwarded():
    tcp, udp = forwards.listed(LISTED)
    assert tcp == ("tcp", "127.0.0.1", 40123, 22)
    assert udp == ("udp", "127.0.0.1", 40124, 53)
    line = forwards.add_line(tcp.protocol, tcp.port, tcp.here)
    assert line == f"hostfwd_add {cmdline.NETDEV} tcp:127.0.0.1:40123-:22"


def test_nothing_is_sent_while_the_gate_is_closed():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        port = Port(ours)
        data = bytes(range(256)) * 8192  # more than the kernel keeps
        sending = threading.Thread(target=port.send, args=(data, 60))
        sending.start()
        got = bytearray()
        while len(got) < 1000:
            got += theirs.recv(1000)
        with port.gate:
            theirs.setblocking(False)
            while port.unread:  # no byte comes after those that were sent before
                got += theirs.recv(1 << 20)
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
            assert len(got) < len(data)
        theirs.setblocking(True)
        while len(got) < len(data):
            got += theirs.recv(1 << 20)
        sending.join()
        assert got == data


def test_no_program(tmp_path):
    with pytest.raises(ConfigError, match="is no program"):
        qemu_at(tmp_path / "qemu", "x86_64")
    with pytest.raises(ConfigError, match="does not print the version"):
        qemu_at(Path("/bin/true"), "x86_64")
