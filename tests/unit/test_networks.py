from __future__ import annotations

import socket
import struct
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pytest_vmsandbox.core.errors import ConfigError, GuestLost, LaunchError
from pytest_vmsandbox.guests import leasing
from pytest_vmsandbox.guests.networks import joining
from pytest_vmsandbox.guests.networks.links import (
    LinkFault,
    Rule,
    Unplugged,
    conditions_of,
    cuts,
    rules_of,
    text_of,
)
from pytest_vmsandbox.guests.networks.making import Networks
from pytest_vmsandbox.guests.networks.network import Network
from pytest_vmsandbox.guests.networks.setup import hosts_text
from pytest_vmsandbox.guests.networks.subnets import Subnets, checked_name, mac_of, subnets_of
from pytest_vmsandbox.guests.running.ledger import Ledger
from pytest_vmsandbox.machine.cards import Card
from pytest_vmsandbox.machine.process import Launcher
from pytest_vmsandbox.machine.switch.conditions import Conditions
from pytest_vmsandbox.machine.switch.switch import Switch

RECORD = {
    "network": "lan", "port": "port1", "mac": "52:56:00:00:00:01", "ipv4": "10.1.0.1/24",
    "ipv6": "fd00:1::1/64", "interface": "eth1",
}  # fmt: skip


class FakeSwitch:
    gone = False

    def check(self):
        if self.gone:
            raise LaunchError("the switch is gone")

    def close(self):
        self.check()

    def impose(self, conditions, *, source, dest):
        self.check()
        return SimpleNamespace(end=self.check)


class FakeEngine:
    """A guest whose card has a cable."""

    name = "a"
    loss = running = None
    explained = staticmethod(nullcontext)

    def __init__(self):
        self.machines = SimpleNamespace(faults=Ledger(None), logs=None)
        self.is_up = True

    @contextmanager
    def use(self):
        yield SimpleNamespace(machine=self)

    def execute(self, command, arguments):
        assert (command, arguments["name"]) == ("set_link", "card-port0")
        self.is_up = arguments["up"]


def network(ipv4="10.1.0.0/24", addresses="fixed", switch=None):
    subnets = Subnets(ipv4=IPv4Network(ipv4), ipv6=IPv6Network("fd00:1::/64"))
    return Network("lan", subnets, addresses, cast("Any", switch or FakeSwitch()))


def send(end, text):
    """Send a frame to all."""
    frame = b"\xff" * 6 + b"\x02" * 6 + b"\x88\xb5" + text
    end.sendall(struct.pack(">I", len(frame)) + frame)


def took(end):
    """What is in the next frame."""
    (size,) = struct.unpack(">I", end.recv(4, socket.MSG_WAITALL))
    return end.recv(size, socket.MSG_WAITALL)[14:]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    with Launcher(tmp_path_factory.mktemp("run")) as launcher, Switch(launcher) as switch:
        yield switch


class TestSubnets:
    def test_those_that_nobody_asks_for_differ(self):
        first = subnets_of(None, None, [])
        second = subnets_of(None, None, [first])
        assert (str(first.ipv4), str(first.ipv6)) == ("10.1.0.0/24", "fd00:1::/64")
        assert (str(second.ipv4), str(second.ipv6)) == ("10.2.0.0/24", "fd00:2::/64")
        assert subnets_of(None, None, [second]) == first

    def test_one_that_is_asked_for_may_be_that_of_another_network(self):
        first = subnets_of(None, None, [])
        assert subnets_of("10.1.0.0/24", "fd00:1::/64", [first]) == first

    @pytest.mark.parametrize(
        ("ipv4", "ipv6", "text"),
        [
            ("10.1.0.1/24", None, "ipv4='10.1.0.1/24' is not a subnet"),
            ("fd00::/64", None, "is not a subnet"),
            (None, "10.1.0.0/24", "is not a subnet"),
            (7, None, "ipv4=7 is not a subnet"),
            ("10.1.0.0/30", None, "10.1.0.0/30 is too small"),
            (None, "fd00::/127", "fd00::/127 is too small"),
            ("224.0.0.0/24", None, "cannot be the subnet"),
            ("127.0.0.0/24", None, "cannot be the subnet"),
            ("126.0.0.0/7", None, "cannot be the subnet"),
            ("0.0.0.0/8", None, "cannot be the subnet"),
            ("0.0.0.0/0", None, "cannot be the subnet"),
            ("169.254.0.0/24", None, "cannot be the subnet"),
            ("240.0.0.0/24", None, "cannot be the subnet"),
            (None, "::/64", "cannot be the subnet"),
            (None, "::/120", "cannot be the subnet"),
            (None, "fe80::/64", "cannot be the subnet"),
            (None, "ff02::/64", "cannot be the subnet"),
            ("10.0.0.0/8", None, "overlaps 10.0.2.0/24"),
        ],
    )
    def test_what_cannot_be_one(self, ipv4, ipv6, text):
        with pytest.raises(ConfigError, match=text) as refused:
            subnets_of(ipv4, ipv6, [])
        assert refused.value.remedy

    @pytest.mark.parametrize("name", ["", "LAN", "a.b", "-a", "a" * 32, 7, "a b", None])
    def test_what_cannot_be_a_name(self, name):
        with pytest.raises(ConfigError, match="cannot be the name of a network"):
            checked_name(name)


class TestSeats:
    def test_the_lowest_free_number_is_given(self):
        lan = network()
        first, second, third = (lan.seat(name, port="port0") for name in "abc")
        assert [seat.card.ipv4 for seat in (first, second, third)] == [
            "10.1.0.1/24", "10.1.0.2/24", "10.1.0.3/24",
        ]  # fmt: skip
        assert third.card.ipv6 == "fd00:1::3/64"
        lan.leave(second)
        lan.leave(second)  # nothing
        again = lan.seat("d", port="port1")
        assert again.card.ipv4 == second.card.ipv4
        assert again.card.mac == second.card.mac == mac_of("lan", 2)
        assert lan.lines()[0] == "10.1.0.1 a a.lan"

    @pytest.mark.parametrize("address", ["10.1.0.9", "fd00:1::9"])
    def test_an_address_is_chosen(self, address):
        card = network().seat("a", port="port0", address=address).card
        assert (card.ipv4, card.ipv6) == ("10.1.0.9/24", "fd00:1::9/64")

    def test_the_card_of_a_saved_guest_keeps_all(self):
        card = network().seat("a", port="port2", address="10.1.0.9").card
        assert network().seat("a", card=card).card == card

    @pytest.mark.parametrize(
        ("address", "text"),
        [
            ("10.1.0.1", "10.1.0.1 is the address of a on the network 'lan'"),
            ("fd00:1::1", "is the address of a"),
            ("10.2.0.1", "10.2.0.1 cannot be the address of a guest in 10.1.0.0/24"),
            ("10.1.0.0", "cannot be"),
            ("10.1.0.254", "cannot be"),
            ("10.1.0.255", "cannot be"),
            ("fd00:1::", "cannot be"),
            ("here", "address='here' is not an IP address"),
        ],
    )
    def test_an_address_that_cannot_be_given(self, address, text):
        lan = network()
        lan.seat("a", port="port0")
        with pytest.raises(ConfigError, match=text) as refused:
            lan.seat("b", port="port0", address=address)
        assert refused.value.remedy

    def test_a_name_is_there_once(self):
        lan = network()
        lan.seat("a", port="port0")
        with pytest.raises(ConfigError, match="already a guest a on the network 'lan'"):
            lan.seat("a", port="port0")

    def test_a_full_network(self):
        lan = network("10.1.0.0/29")
        for number in range(lan.subnets.size):
            lan.seat(f"a{number}", port="port0")
        with pytest.raises(ConfigError, match="has 5 guests, and no address for one more"):
            lan.seat("b", port="port0")

    def test_a_network_that_is_over(self, tmp_path):
        with network() as lan:
            pass
        for use in (lambda: lan.seat("a", port="port0"), lambda: lan.capture(tmp_path / "pcap")):
            with pytest.raises(ConfigError, match="the network 'lan' is over"):
                use()
        assert list(tmp_path.iterdir()) == []

    def test_a_guest_finds_its_cards_in_the_order_of_its_networks(self, monkeypatch):
        """Otherwise chance decides which one is ``eth1``."""
        done, front, back = [], network(), network("10.2.0.0/24")
        monkeypatch.setattr(joining, "_free_port", lambda _: "port0")
        monkeypatch.setattr(joining, "_plug", lambda _, seat: done.append(seat.network))
        monkeypatch.setattr(
            joining, "set_up", lambda _, cards, *__, **___: done.append(cards[0].ipv4)
        )
        machines = SimpleNamespace(hostname="a")
        engine = SimpleNamespace(has_helper=True, machines=machines, explained=nullcontext)
        guest = cast("Any", SimpleNamespace(engine=engine))
        with ExitStack() as stack:
            joining._seated(guest, {front: None, back: None}, stack)
        assert done == [front, "10.1.0.1/24", back]

    def test_a_guest_that_joins_while_another_is_set_up(self, monkeypatch):
        """The other one may have heard of it before, and an older text would win."""
        lan, told = network(), []
        seat = lan.seat("a", port="port0")
        engine = cast("Any", SimpleNamespace(has_helper=True, machines=SimpleNamespace()))
        engine.machines.cards = [seat]

        def set_up(engine, cards, hosts, *, dhcp):
            if not told:
                lan.seat("b", port="port0")
            told.append((len(cards), "10.1.0.2 b b.lan" in hosts))
            return {seat.card.mac: "eth1"} if cards else {}

        monkeypatch.setattr(joining, "set_up", set_up)
        joining._set_up(engine)
        assert told == [(1, False), (0, True)]
        assert seat.card.interface == "eth1"
        assert "b.lan" in seat.knows

    def test_who_asks_for_addresses_gets_only_ipv4(self):
        lan = network(addresses="dhcp")
        card = lan.seat("a", port="port0").card
        assert card.ipv6 == ""
        assert lan.lines() == ["10.1.0.1 a a.lan"]
        assert str(lan.address_of(card.mac)) == "10.1.0.1"
        assert lan.address_of(mac_of("lan", 2)) is None


class TestLinks:
    def test_conditions(self):
        found = conditions_of(latency=0.05, jitter=None, loss=0.1, rate="10Mbit")
        assert found == Conditions(latency=0.05, loss=0.1, rate=10e6)
        assert text_of(found, "to") == "latency 0.05 s, loss 0.1, rate 1e+07 bit/s (to it)"
        assert conditions_of(rate=5000).rate == 5000.0

    @pytest.mark.parametrize(
        ("given", "text"),
        [
            ({"latency": None}, "needs to know what is wrong"),
            ({"latency": 0, "loss": 0.0}, "latency=0, loss=0.0 is a link as usual"),
            ({"latency": "1s"}, "latency='1s' is not a number"),
            ({"loss": True}, "loss=True is not a number"),
            ({"rate": "10MiB"}, "is not a number of bits per second"),
            ({"rate": True}, "is not a number of bits per second"),
            *(
                ({name: value}, f"{name} is not a finite number")
                for name in ("latency", "jitter", "loss", "duplicate", "reorder", "rate")
                for value in (float("nan"), float("inf"), -float("inf"), 10**400)
            ),
        ],
    )
    def test_what_cannot_be_a_condition(self, given, text):
        with pytest.raises(ConfigError, match=text) as refused:
            conditions_of(**given)
        assert refused.value.remedy

    def test_directions(self):
        bad = Conditions(loss=0.5)
        there, back = Rule(bad, None, "b"), Rule(bad, "b", None)
        assert rules_of("b", bad, "both") == ("both", [back, there])
        assert rules_of("b", bad, "to") == ("to", [there])
        assert rules_of("b", bad, "from") == ("from", [back])
        with pytest.raises(ConfigError, match="direction='up' is unknown"):
            rules_of("b", bad, "up")

    def test_a_partition(self):
        ways = [(rule.source, rule.dest) for rule in cuts(["a"], ["b", "c"], one_way=False)]
        assert ways == [("a", "b"), ("a", "c"), ("b", "a"), ("c", "a")]
        assert len(cuts(["a"], ["b", "c"], one_way=True)) == 2


def _pull(engine, seat, switch):
    return Unplugged(engine, "cable", switch, seat.card, seat.cable).begin()


class TestCable:
    @pytest.fixture
    def engine(self):
        return FakeEngine()

    @pytest.fixture
    def pull(self, engine):
        seat = network().seat("a", port="port0")
        return lambda: _pull(engine, seat, FakeSwitch())

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_is_out_until_the_last_fault_ends(self, engine, pull, order):
        faults = [pull(), pull()]
        faults[order[0]].end()
        assert not engine.is_up
        faults[order[1]].end()
        assert engine.is_up

    def test_is_out_after_a_rollback_if_a_later_fault_is_in_force(self, engine, pull):
        first, ledger = pull(), engine.machines.faults
        then = ledger.in_force
        first.end()
        second = pull()
        ledger.rolled_back(then)
        assert not engine.is_up
        second.end()
        assert engine.is_up

    def test_is_in_after_a_rollback_if_no_fault_is_in_force(self, engine, pull):
        fault, ledger = pull(), engine.machines.faults
        then = ledger.in_force
        fault.end()
        engine.is_up = False  # as it was saved
        ledger.rolled_back(then)
        assert engine.is_up

    def test_one_of_another_card_counts_nothing(self, engine, pull):
        other = Unplugged(
            cast("Any", engine), "other", cast("Any", FakeSwitch()),
            Card(**{**RECORD, "port": "port1"}), threading.Lock(),
        )  # fmt: skip
        engine.machines.faults.begun(other, "other")
        pull().end()
        assert engine.is_up


class TestLeaving:
    @pytest.fixture
    def lan(self):
        return network()

    @pytest.fixture
    def seats(self, lan):
        seats = [lan.seat(name, port="port0") for name in "abc"]
        for seat in seats:
            seat.engine = cast("Any", FakeEngine())
        return seats

    def cut(self, lan, seats, side, other):
        rules = cuts(side, other, one_way=False)
        return LinkFault(seats[0].engine, "partition", lan.switch, rules).begin()

    def test_a_partition_goes_on_between_the_others(self, lan, seats):
        fault = self.cut(lan, seats, ["a", "c"], ["b"])
        ledgers = [seat.engine.machines.faults for seat in seats]
        lan.leave(seats[0])
        ledgers[0].is_closed = True
        assert fault.in_force
        assert [len(ledger.in_force) for ledger in ledgers] == [0, 0, 1]
        lan.leave(seats[2])
        assert not fault.in_force
        assert ledgers[2].in_force == []

    def test_one_that_has_lost_a_whole_side_is_over(self, lan, seats):
        fault = self.cut(lan, seats, ["a"], ["b", "c"])
        lan.leave(seats[0])
        assert not fault.in_force

    @pytest.mark.parametrize("first", ["a", "b"])
    def test_a_later_guest_of_that_name_is_not_cut_off(self, launched, first):
        """On a real switch: what is cut between others stays so, whoever's fault it is."""
        lan = network(switch=launched.network("lan"))

        def come(name):
            seat = lan.seat(name, port="port0")
            seat.engine = cast("Any", FakeEngine())
            end = seat.connect()
            end.settimeout(20)
            return seat, end

        seats, ends = zip(*map(come, "abc"), strict=True)
        rest = [name for name in "abc" if name != first]
        engine = seats["abc".index(first)].engine
        rules = cuts([first], rest, one_way=False) + cuts(["c"], ["b"], one_way=False)
        fault = LinkFault(engine, "partition", lan.switch, rules).begin()
        lan.leave(seats[0])
        assert fault.in_force
        _, again = come("a")
        send(again, b"from the new one")
        send(ends[1], b"from b")
        send(ends[2], b"from c")
        assert took(ends[1]) == took(ends[2]) == b"from the new one"
        assert {took(again), took(again)} == {b"from b", b"from c"}
        fault.end()
        send(ends[2], b"the end")
        assert took(ends[1]) == b"the end"  # nothing of c came before
        lan.end()
        for end in (*ends, again):
            end.close()

    def test_a_network_that_is_over_says_so(self, lan, tmp_path):
        lan.end()
        guest = cast("Any", None)
        for call in (lan.address, lan.interface, lan.name_of, lan.unplug, lambda _: lan.capture(tmp_path / "p"),
                     lambda it: lan.link(it, loss=0.1), lambda it: lan.partition([it], [it])):  # fmt: skip
            with pytest.raises(ConfigError, match="the network 'lan' is over") as refused:
                call(guest)
            assert refused.value.remedy
        assert not (tmp_path / "p").exists()


class TestWithoutItsSwitch:
    """What a test has seen of a network proves nothing then."""

    def test_faults_do_not_begin(self):
        switch = FakeSwitch()
        switch.gone = True
        engine = FakeEngine()
        with pytest.raises(LaunchError, match="gone"):
            _pull(engine, network().seat("a", port="port0"), switch)
        assert engine.machines.faults.in_force == []

    @pytest.mark.parametrize("kind", ["link", "cable"])
    def test_the_end_of_a_fault_says_so(self, kind):
        switch, engine = FakeSwitch(), FakeEngine()
        if kind == "link":
            rules = [Rule(Conditions(cut=True), "a", None)]
            fault = LinkFault(cast("Any", engine), "cut", cast("Any", switch), rules).begin()
        else:
            fault = _pull(engine, network().seat("a", port="port0"), switch)
        switch.gone = True
        with pytest.raises(LaunchError, match="gone"), fault:
            pass
        assert engine.machines.faults.in_force == []
        assert engine.is_up

    def test_so_does_the_end_of_the_network(self):
        lan = network()
        seat = lan.seat("a", port="port0")
        seat.engine = cast("Any", FakeEngine())
        rules = [Rule(Conditions(cut=True), "a", None)]
        LinkFault(seat.engine, "cut", lan.switch, rules).begin()
        cast("Any", lan.switch).gone = True
        with pytest.raises(LaunchError, match="gone"):
            lan.end()
        assert (lan.is_over, lan.lines()) == (True, [])

    def test_so_does_the_end_of_the_guest(self):
        lan = network()
        seat = lan.seat("a", port="port0")
        engine = SimpleNamespace(
            explained=nullcontext, check_disks=lambda: None, machines=SimpleNamespace(cards=[seat])
        )
        guest = cast("Any", SimpleNamespace(engine=engine))
        with leasing.on_sound_host(guest):
            pass
        cast("Any", lan.switch).gone = True
        with pytest.raises(LaunchError, match="gone"), leasing.on_sound_host(guest):
            pass
        with pytest.raises(LaunchError) as caught, leasing.on_sound_host(guest):
            raise AssertionError
        assert isinstance(caught.value.__cause__, AssertionError)


def test_networks_end_with_the_run_but_before_the_switch():
    ended: list[str] = []

    class Switch(FakeSwitch):
        def __init__(self, name, seed):
            self.name, self.gone = name, name == "gone"

        def close(self):
            ended.append(self.name)
            self.check()

    class Backend:
        stack = ExitStack()

        @cached_property
        def hypervisor(self):
            self.stack.callback(ended.append, "switch")
            return SimpleNamespace(switch=SimpleNamespace(network=Switch))

    with (backend := Backend()).stack:
        networks = Networks(cast("Any", backend))
        for name in ("a", "gone", "b"):
            networks.make(name, None, None, "fixed", 1)
    assert ended == ["a", "gone", "b", "switch"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"addresses": "static"}, "addresses='static' is unknown"),
        ({"seed": "1"}, "seed='1' is not a whole number"),
        ({"seed": True}, "seed=True is not a whole number"),
    ],
)
def test_networks_that_cannot_be_made(more, text):
    values = {"ipv4": None, "ipv6": None, "addresses": "fixed", "seed": 1, **more}
    with pytest.raises(ConfigError, match=text):
        Networks(cast("Any", None)).make("lan", **values)


def test_names_are_found_again():
    assert hosts_text(["10.1.0.1 a"]).splitlines() == [
        "# vmsandbox: networks", "10.1.0.1 a", "# vmsandbox: end",
    ]  # fmt: skip


class TestStrangers:
    def test_a_card_is_read(self):
        assert Card.read(RECORD) == Card(**RECORD)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("port", "port0,x=y"), ("port", "pcie.0"), ("mac", "52:56:00:00:00:01,x=y"), ("mac", 7)],
    )
    def test_what_could_do_harm_is_refused(self, name, value):
        with pytest.raises(ValueError, match="network card"):
            Card.read({**RECORD, name: value})


class TestSetUpAgain:
    """A guest answers after a start, and its networks cannot be set up."""

    @pytest.fixture
    def engine(self, monkeypatch):
        def fails(engine, *, fresh):
            engine.running.restarts.again = engine.restarts_again
            raise GuestLost("the helper restarted")

        monkeypatch.setattr(joining, "_set_up", fails)
        engine = cast("Any", FakeEngine())
        restarts = SimpleNamespace(returns=1, again=False)
        restarts.is_again_since = lambda returns: restarts.again and returns == 1
        engine.running = SimpleNamespace(restarted=True, restarts=restarts)
        return engine

    def test_that_is_told(self, engine):
        engine.restarts_again = False
        joining._again(engine)
        (text,) = engine.machines.faults.unrestored
        assert text == "its networks could not be set up again: the helper restarted"

    def test_not_if_it_restarts_once_more(self, engine):
        """It is set up once more."""
        engine.restarts_again = True
        joining._again(engine)
        assert engine.machines.faults.unrestored == []
