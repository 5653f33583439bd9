"""Networks between guests: names, addresses, bad links, and that nothing else is reached."""

from __future__ import annotations

import re
from contextlib import ExitStack

import pytest

from pytest_vmsandbox import ConfigError
from pytest_vmsandbox.guests.factory import GuestFactory

pytestmark = [pytest.mark.vm("tiny"), pytest.mark.origins("cloned")]


@pytest.fixture
def lan(vm_factory):
    with vm_factory.network("lan") as lan:
        yield lan


@pytest.fixture
def pair(vm_factory, lan):
    with ExitStack() as stack:
        yield [stack.enter_context(vm_factory.boot("tiny", networks=[lan])) for _ in range(2)]


def reaches(guest, name, *more):
    argv = ["ping", "-c1", "-W2", *more, name]
    return guest.run(argv, check=False).returncode == 0


def reaches_soon(guest, name):
    """A card sends nothing for up to a second after its cable is in again, although it has its carrier."""
    guest.shell(f"until ping -c1 -W2 {name} >/dev/null; do :; done", timeout=60)
    return True


def carrier(lan, guest):
    return guest.read_text(f"/sys/class/net/{lan.interface(guest)}/carrier").strip()


def test_guests_know_each_other(lan, pair):
    a, b = pair
    for name in (lan.name_of(b), f"{lan.name_of(b)}.lan", str(lan.address(b))):
        assert reaches(a, name)
    assert reaches(a, lan.name_of(b), "-6")
    assert reaches(b, str(lan.address(a, version=6)))
    assert [str(lan.address(guest)).rpartition(".")[2] for guest in pair] == ["1", "2"]
    with b.popen(["nc", "-l", "-p", "7"]) as server:
        a.shell(f"until echo hello | nc -w 5 {lan.name_of(b)} 7; do usleep 100000; done")
        assert server.stdout.read() == "hello\n"
    assert f"default via {lan.address(b)}" not in a.run(["ip", "route"]).stdout


def test_a_card_survives_what_a_guest_survives(lan, pair):
    a, b = pair
    name = lan.name_of(b)
    b.power_cut()
    assert not reaches(a, name)
    b.power_on()
    assert reaches(a, name)
    assert reaches(b, lan.name_of(a))
    unplugged = lan.unplug(b)
    with b.snapshot():
        assert carrier(lan, b) == "0"
        unplugged.end()
        assert carrier(lan, b) == "1"
        b.run(["ip", "addr", "flush", "dev", lan.interface(b)])
        assert not reaches(a, name)
    assert carrier(lan, b) == "1"  # the state had it out, but the fault is over
    assert reaches_soon(a, name)


def test_a_guest_that_restarts_by_itself_is_back_on_its_networks(lan, pair):
    a, b = pair
    name, monitor = lan.name_of(b), b.engine.running.machine.monitor

    def restart():
        since = len(monitor.events())
        b.run(["reboot"])
        assert monitor.wait_event("RESET", since=since, timeout=60)

    restart()
    assert reaches(b, lan.name_of(a))  # it has waited
    restart()
    a.wait_until(["ping", "-c1", "-W2", name], timeout=300)  # nobody has asked it


def test_a_cable_is_out_as_long_as_one_fault_says_so(lan, pair):
    a, b = pair
    first, second = lan.unplug(b), lan.unplug(b)
    first.end()
    assert carrier(lan, b) == "0"
    with b.snapshot():
        second.end()
        assert carrier(lan, b) == "1"
        third = lan.unplug(b)
    assert b.faults.in_force == (third,)
    assert carrier(lan, b) == "0"
    assert not reaches(a, lan.name_of(b))
    third.end()
    assert carrier(lan, b) == "1"
    assert reaches_soon(a, lan.name_of(b))


def test_links_are_as_bad_as_asked_for(lan, pair, tmp_path):
    a, b = pair
    name = lan.name_of(b)
    assert reaches(a, name)
    with lan.partition(a, b, one_way=True), lan.capture(tmp_path / "pcap"):
        assert not reaches(a, name)
    assert b"\x08\x00" in (tmp_path / "pcap").read_bytes()  # it was sent
    with lan.link(b, loss=1.0, direction="from"):
        assert not reaches(a, name)
    log = (b.engine.machines.logs / "links.log").read_text()
    assert re.fullmatch(
        rf"link to lan: loss 1 \(from it\)\n\d begins {name}>\* loss=1\n(\d {name}>\* \d+ lost\n)+\d ends\n",
        log,
    )
    with lan.unplug(b):
        assert carrier(lan, b) == "0"
        assert not reaches(a, name)
    with lan.link(b, latency=0.3):
        said = a.run(["ping", "-c1", "-W9", name]).stdout
        assert float(said.rpartition("= ")[2].partition("/")[0]) >= 600
    assert reaches(a, name)


def test_the_share_of_frames_that_are_lost(lan, pair):
    """Counted by both guests, on 5,000 frames: each datagram is sent as five fragments."""
    a, b = pair

    def count(guest, way):
        return int(
            guest.read_text(f"/sys/class/net/{lan.interface(guest)}/statistics/{way}_packets")
        )

    assert reaches(a, lan.name_of(b))
    sent, received = count(a, "tx"), count(b, "rx")
    with lan.link(a, loss=0.3, direction="from"):
        argv = ["ping", "-q", "-c2000", "-i0.002", "-s7000", "-W1", str(lan.address(b))]
        a.run(argv, check=False)
    sent, received = count(a, "tx") - sent, count(b, "rx") - received
    assert sent >= 5000
    assert 0.27 <= 1 - received / sent <= 0.33


@pytest.mark.vm(networks=["lan", "wan"])
def test_the_marker_names_networks(vm, vm_factory):
    assert [*vm.networks] == ["lan", "wan"]
    lan, wan = vm.networks.values()
    with vm_factory.boot("tiny", networks=[wan]) as other:
        assert other.networks == {"wan": wan}
        assert reaches(vm, wan.name_of(other))
        assert reaches(other, str(wan.address(vm)))
        assert not reaches(other, str(lan.address(vm)))


def test_ten_guests(vm_factory, lan):
    with ExitStack() as stack:
        guests = [
            stack.enter_context(vm_factory.boot("tiny", memory="160MiB", networks=[lan]))
            for _ in range(10)
        ]
        names = [lan.name_of(guest) for guest in guests]
        for guest in guests:
            guest.shell(f"for name in {' '.join(names)}; do ping -c1 -W20 $name || exit; done")


def test_networks_are_apart(vm_factory, lan):
    with (
        vm_factory.network("lan", ipv4=str(lan.ipv4), ipv6=str(lan.ipv6)) as other,
        vm_factory.boot("tiny", networks=[lan]) as a,
        vm_factory.boot("tiny", networks={other: str(lan.ipv4[2])}) as b,
    ):
        assert not reaches(a, str(other.address(b)))
        with pytest.raises(ConfigError, match="not on the network 'lan'"):
            lan.address(b)
        with pytest.raises(ConfigError, match="two networks called 'lan'"):
            vm_factory.boot("tiny", networks=[lan, other]).__enter__()


def test_runs_are_apart(vm_factory, lan, pair, tmp_path):
    """Another run has a network with the same name and addresses, and guests with the same MAC addresses."""
    captures = [tmp_path / "ours", tmp_path / "theirs"]
    with ExitStack() as stack:
        other_run = stack.enter_context(GuestFactory.open(vm_factory.backend.settings))
        other = stack.enter_context(
            other_run.network("lan", ipv4=str(lan.ipv4), ipv6=str(lan.ipv6))
        )
        others = [stack.enter_context(other_run.boot("tiny", networks=[other])) for _ in range(2)]
        for network, path in zip((lan, other), captures, strict=True):
            stack.enter_context(network.capture(path))
        for network, (a, b), pattern in ((lan, pair, "a1"), (other, others, "b2")):
            assert reaches(a, str(network.address(b)), "-p", pattern)
        assert [str(lan.address(guest)) for guest in pair] == [
            str(other.address(guest)) for guest in others
        ]
        with lan.link(pair[0], loss=1.0):
            assert reaches(others[0], str(other.address(others[1])))
    for path, theirs in zip(captures, (b"\xb2" * 8, b"\xa1" * 8), strict=True):
        assert theirs not in path.read_bytes()
    for path, own in zip(captures, (b"\xa1" * 8, b"\xb2" * 8), strict=True):
        assert own in path.read_bytes()


UDHCPC = """#!/bin/sh
case $1 in
bound | renew) ip addr replace "$ip/$mask" dev "$interface"; echo "$ip ${router:-none} $lease" >/tmp/lease ;;
esac
"""


def test_a_guest_asks_for_its_address(vm_factory):
    with (
        vm_factory.network("lan", addresses="dhcp") as lan,
        vm_factory.boot("tiny", networks=[lan]) as a,
        vm_factory.boot("tiny", networks={lan: str(lan.ipv4[9])}) as b,
    ):
        for guest in (a, b):
            assert str(lan.address(guest)) not in guest.run(["ip", "addr"]).stdout
            guest.write_text("/tmp/script", UDHCPC)
            guest.shell(f"chmod +x /tmp/script; ip link set {lan.interface(guest)} up")
            guest.run(["udhcpc", "-i", lan.interface(guest), "-n", "-q", "-s", "/tmp/script"])
            assert guest.read_text("/tmp/lease") == f"{lan.address(guest)} none 3600\n"
        assert reaches(a, lan.name_of(b))
        with pytest.raises(ConfigError, match="no IPv6 addresses"):
            lan.address(a, version=6)
