"""Who listens in a guest: what the kernel of this machine tells, and what a hostile one could."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from pytest_vmsandbox.guests.running import forwarding

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
ADDRESSES = [
    (socket.AF_INET, "0.0.0.0", True),
    (socket.AF_INET, "127.0.0.1", False),
    (socket.AF_INET6, "::", True),
    (socket.AF_INET6, "::1", False),
    (socket.AF_INET6, "::ffff:127.0.0.1", False),
]


@pytest.mark.skipif(not Path("/proc/net/tcp6").exists(), reason="there is no IPv6 here")
@pytest.mark.parametrize("protocol", KINDS)
@pytest.mark.parametrize(("family", "address", "reached"), ADDRESSES)
def test_a_socket_of_this_machine(protocol, family, address, reached):
    with socket.socket(family, KINDS[protocol]) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((address, 0))
        port = sock.getsockname()[1]
        if protocol == "tcp":
            assert found(port, protocol) == []
            sock.listen()
        assert found(port, protocol) == [ipaddress.ip_address(address)]
        assert [forwarding.is_reached(it) for it in found(port, protocol)] == [reached]


def found(port, protocol):
    text = "".join(Path(file).read_text(encoding="utf-8") for file in forwarding.files(protocol))
    return forwarding.addresses(text, port, protocol)


@pytest.mark.parametrize(
    "words",
    ["0: xx:0050 0 0A", "0: 00:0050 0 0A", "0: 00000000:zz 0 0A", "0: 00000000 0 0A", "0: 1"],
)
def test_nonsense_is_skipped(words):
    assert forwarding.addresses(words, 80, "tcp") == []


@given(st.text())
def test_any_text(text):
    forwarding.addresses(text, 80, "tcp")
