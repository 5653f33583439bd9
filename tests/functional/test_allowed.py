"""A guest whose network is a list reaches what is listed, and nothing else. Each way out is tried.

This runs in a network of its own, with another machine in it, which writes down what reaches it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HOSTS = """\
127.0.0.1 localhost
198.51.100.3 other.test unlisted.test
198.51.100.1 here.test
"""
# The other machine is a network name space; `hosts` are the names that this machine knows.
NETWORK = r"""
set -e
mount --bind hosts /etc/hosts
ip link set lo up
unshare --net sleep 600 & other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link add v0 type veth peer name v1 netns $other
ip addr add 198.51.100.1/24 dev v0
ip addr add 2001:db8::1/64 dev v0 nodad
ip link set v0 up
nsenter --net=/proc/$other/ns/net sh -ec '
    ip link set lo up
    ip addr add 198.51.100.2/24 dev v1
    ip addr add 198.51.100.3/24 dev v1
    ip addr add 2001:db8::2/64 dev v1 nodad
    ip link set v1 up
    exec "$0" server.py' "$PYTHON" & server=$!
until [ -e ready ]; do kill -0 $server; sleep 0.1; done
status=0
"$@" || status=$?
kill $other $server
exit $status
"""
SERVER = """
import selectors
import socket
from pathlib import Path

log = open("reached", "a", buffering=1)
ANSWER = b"HTTP/1.0 %s\\r\\nLocation: http://198.51.100.2:8001/\\r\\n\\r\\nthe other machine"
selector = selectors.DefaultSelector()
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    for port in (53, 8000, 8001):
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        selector.register(sock, selectors.EVENT_READ, (kind, port))
Path("ready").touch()
while True:
    for key, _ in selector.select():
        kind, port = key.data
        if kind == socket.SOCK_DGRAM:
            data, peer = key.fileobj.recvfrom(2000)
            print("udp", port, file=log)
            key.fileobj.sendto(data[:2] + b"\\x81\\x83" + data[4:], peer)  # there is no such name
            continue
        with key.fileobj.accept()[0] as peer:
            print("tcp", port, peer.getsockname()[0].removeprefix("::ffff:"), file=log)
            away = b"/away" in peer.recv(2000)
            peer.sendall(ANSWER % (b"302 Found" if away else b"200 OK"))
"""
SUITE = r"""
import http.server
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_vmsandbox.machine import starting

REACHED = Path("reached")
OUT = {  # ways out that are not listed, and what the other machine sees of them
    "wget -O- http://198.51.100.2:8001/": "tcp 8001 198.51.100.2",
    "wget -O- http://198.51.100.3:8000/": "tcp 8000 198.51.100.3",
    "nc 198.51.100.2 53 </dev/null": "tcp 53 198.51.100.2",
    "nslookup unlisted.test 198.51.100.2:8000": "udp 8000",
    "nslookup unlisted.test 198.51.100.2": "udp 53",
}


class Server(http.server.ThreadingHTTPServer):
    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"this machine")

        def log_message(self, *_): pass

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def ours():
    return [Server().server_port for _ in range(2)]


def reached():
    return REACHED.read_text().splitlines()


def fails(vm, command, says="Connection refused"):
    done = vm.shell(command, check=False, timeout=60)
    assert done.returncode != 0, command
    assert says in done.stderr, (command, done)


def try_ways_out(vm, seconds):
    for command in OUT:
        vm.shell(f"timeout {seconds} {command}", check=False, timeout=60)


def tries(vm, ours):
    listed, unlisted = ours
    before = reached()
    vm.wait_until(["sh", "-c", "ip -6 addr show dev eth0 | grep fec0 | grep -qv tentative"], timeout=60)
    for target in ("198.51.100.2:8000", "[2001:db8::2]:8000", "other.test:8001"):
        assert vm.shell(f"wget -qO- http://{target}/").stdout == "the other machine"
    assert vm.shell(f"wget -qO- http://10.0.2.2:{listed}/").stdout == "this machine"
    found = ["tcp 8000 198.51.100.2", "tcp 8000 2001:db8::2", "tcp 8001 198.51.100.3"]
    assert reached() == before + found
    fails(vm, f"wget -O- http://10.0.2.2:{unlisted}/")
    fails(vm, "wget -O- 'http://[2001:db8::2]:8001/'")
    fails(vm, "wget -O- http://198.51.100.1:8000/")  # this machine, by another address
    fails(vm, "wget -O- http://other.test:8000/")
    fails(vm, "wget -O- http://unlisted.test:8001/", "bad address")
    fails(vm, "wget -O- http://here.test:8001/", "bad address")  # a name of this machine
    try_ways_out(vm, seconds=1)
    assert "100% packet loss" in vm.shell("ping -c1 -W1 198.51.100.2", check=False).stdout
    assert reached() == before + found
    fails(vm, "wget -O- http://198.51.100.2:8000/away")  # to what is not listed
    assert reached() == [*before, *found, found[0]]


def test_a_list(vm_factory, ours, monkeypatch):
    ends = []
    gated = starting.gated

    @contextmanager
    def watched(*args):
        with gated(*args) as qemus:
            ends[:] = [end.dup() for end in qemus]
            yield qemus

    monkeypatch.setattr(starting, "gated", watched)
    network = ["198.51.100.2:8000", "[2001:db8::2]:8000", "other.test:8001", "here.test:8001",
               f"localhost:{ours[0]}"]
    with vm_factory.boot("tiny", network=network) as vm:
        tries(vm, ours)
        with socket.create_connection(vm.forward(22), 60) as here:
            assert here.recv(4) == b"SSH-"
        with vm.snapshot():
            pass
        assert vm.shell("wget -qO- http://198.51.100.2:8000/").stdout == "the other machine"
        vm.reboot()
        wait_for_ipv6(vm)
        tries(vm, ours)
        vm.power_cut()
        vm.power_on()
        wait_for_ipv6(vm)
        tries(vm, ours)
        before = reached()
        for end in ends:  # nobody looks at the frames any more
            end.shutdown(socket.SHUT_RDWR)
        fails(vm, "timeout 2 wget -O- http://198.51.100.2:8000/", "")
        try_ways_out(vm, seconds=1)
        assert reached() == before


def wait_for_ipv6(vm):
    vm.shell("for i in $(seq 100); do ip -6 route | grep -q ^default && exit; sleep 0.2; done; exit 1")


def test_the_control(vm_factory):
    with vm_factory.boot("tiny", network="nat") as vm:
        before = reached()
        try_ways_out(vm, seconds=30)
        assert {*reached()[len(before):]} == {*OUT.values()}


def test_a_preparation(vm_factory):
    def fetch(vm):
        vm.shell("wget -qO /fetched http://198.51.100.2:8000/")

    image = vm_factory.prepare("tiny", fetch, depends_on=[], network=["198.51.100.2:8000"])
    with vm_factory.boot(image) as vm:
        assert vm.read_text("/fetched") == "the other machine"
        before = reached()
        fails(vm, "wget -T 2 -O- http://198.51.100.2:8000/", "")
        assert reached() == before
"""


def test_a_list_in_a_network_with_another_machine(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can make a network name space that runs guests")
    for name, text in (
        ("hosts", HOSTS), ("server.py", SERVER), ("test_suite.py", SUITE), ("network.sh", NETWORK)
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--vm=tiny", "-x"]
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "network.sh", *pytest_],
        cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
