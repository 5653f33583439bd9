from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import Any, cast

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.networks.links import Rule, conditions_of, cuts, rules_of, text_of
from pytest_vmsandbox.guests.networks.network import Network
from pytest_vmsandbox.guests.networks.networks import Networks
from pytest_vmsandbox.guests.networks.setup import hosts_text
from pytest_vmsandbox.guests.networks.subnets import Subnets, checked_name, mac_of, subnets_of
from pytest_vmsandbox.machine.cards import Card
from pytest_vmsandbox.machine.switch.conditions import Conditions

RECORD = {
    "network": "lan", "port": "port1", "mac": "52:56:00:00:00:01", "ipv4": "10.1.0.1/24",
    "ipv6": "fd00:1::1/64", "interface": "eth1",
}  # fmt: skip


class FakeSwitch:
    def close(self):
        pass


def network(ipv4="10.1.0.0/24", addresses="fixed"):
    subnets = Subnets(ipv4=IPv4Network(ipv4), ipv6=IPv6Network("fd00:1::/64"))
    return Network("lan", subnets, addresses, cast("Any", FakeSwitch()))


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

    def test_a_network_that_is_over(self):
        with network() as lan:
            pass
        with pytest.raises(ConfigError, match="the network 'lan' is over"):
            lan.seat("a", port="port0")

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
            ({"latency": "1s"}, "latency='1s' is not a number"),
            ({"loss": True}, "loss=True is not a number"),
            ({"rate": "10MiB"}, "is not a number of bits per second"),
            ({"rate": True}, "is not a number of bits per second"),
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
