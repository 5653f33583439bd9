"""What may leave a guest whose network is a list, frame by frame."""

import socket
import struct
from ipaddress import ip_address

import pytest

from pytest_vmsandbox.core.allowed import canonical, targets
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import parse_network
from pytest_vmsandbox.machine.gate import dns, frames, lookup
from pytest_vmsandbox.machine.gate.gate import Gate

GUEST, GUEST6 = "10.0.2.15", "fec0::5054:ff:fe12:3456"
CARD, ROUTER = bytes.fromhex("525400123456"), bytes.fromhex("52550a000202")
SYN, ACK, RST = frames.SYN, frames.ACK, frames.RST
LIST = ["192.0.2.1:443", "[2001:db8::1]:443", "localhost:8080", "example.org:443"]


def ip(source, target, protocol, payload, *, part=0):
    source, target = ip_address(source).packed, ip_address(target).packed
    if len(source) == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, part, 64, protocol, 0)
    else:
        head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64)
    kind = frames.IPV4 if len(source) == 4 else frames.IPV6
    return ROUTER + CARD + kind.to_bytes(2) + head + source + target + payload


def tcp(target, port, flags=SYN, *, source=GUEST, of=40000, data=b""):
    segment = struct.pack("!HHIIBBHHH", of, port, 1000, 2000, 5 << 4, flags, 64, 0, 0) + data
    return ip(source, target, frames.TCP, segment)


def udp(target, port, data, *, source=GUEST):
    payload = struct.pack("!HHHH", 5353, port, 8 + len(data), 0) + data
    return ip(source, target, frames.UDP, payload)


def ask(name, kind=dns.IPV4_ADDRESS, server="10.0.2.3"):
    labels = b"".join(bytes([len(it)]) + it.encode() for it in name.split("."))
    message = struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, kind, 1)
    return udp(server, 53, message, source=GUEST6 if ":" in server else GUEST)


class Tried:
    """A gate, and what came out of it."""

    def __init__(self, *listed):
        self.addresses = {}
        self.out, self.back = [], []
        self.gate = Gate(
            targets(canonical(listed or LIST)), out=self.out.append, back=self.back.append,
            resolve=lambda name, then: then(self.addresses.get(name, [])),
        )  # fmt: skip
        self.gate.leaves(b"the guest runs, and the router is asked")
        (asked,) = self.out
        assert frames.packet(asked).payload[:1] == b"\x85"
        self.out.clear()

    def leaves(self, frame):
        """Whether a frame gets out; and what comes back instead."""
        self.gate.leaves(frame)
        passed = self.out == [frame]
        assert passed or not self.out
        self.out.clear()
        back, self.back[:] = list(self.back), []
        return passed, *back


@pytest.fixture
def tried():
    return Tried()


def is_sound(frame):
    """Checks the checksums of an answer. Returns the packet."""
    packet = frames.packet(frame)
    begin, end = packet.header
    if len(packet.source) == 4:
        assert frames.checksum(frame[begin:end]) == b"\xff\xff"
    length = len(packet.payload)
    pseudo = packet.source + packet.target + struct.pack("!II", length, packet.protocol)
    if packet.protocol == frames.ICMP:
        pseudo = b""
    assert frames.checksum(pseudo + packet.payload) == b"\xff\xff"
    assert frame[:6] == CARD
    return packet


class TestTCP:
    @pytest.mark.parametrize(
        ("target", "port"),
        [("192.0.2.1", 443), ("2001:db8::1", 443), ("10.0.2.2", 8080), ("fec0::2", 8080)],
    )
    def test_what_is_listed_passes(self, tried, target, port):
        source = GUEST6 if ":" in target else GUEST
        for flags in (SYN, ACK, RST):
            assert tried.leaves(tcp(target, port, flags, source=source)) == (True,)

    @pytest.mark.parametrize(
        ("target", "port"),
        [("192.0.2.1", 80), ("192.0.2.2", 443), ("2001:db8::2", 443), ("10.0.2.2", 8081),
         ("fec0::2", 443), ("10.0.2.3", 53), ("127.0.0.1", 8080), ("0.0.0.0", 8080), ("::1", 8080)],
    )  # fmt: skip
    def test_the_rest_is_reset_at_once(self, tried, target, port):
        source = GUEST6 if ":" in target else GUEST
        passed, reset = tried.leaves(tcp(target, port, source=source))
        assert not passed
        packet = is_sound(reset)
        assert (packet.source, packet.target) == (
            ip_address(target).packed, ip_address(source).packed
        )  # fmt: skip
        assert packet.ports == (port, 40000)
        assert packet.flags == RST | ACK
        assert struct.unpack_from("!II", packet.payload, 4) == (0, 1001)  # the SYN counts

    def test_a_reset_is_not_answered(self, tried):
        assert tried.leaves(tcp("192.0.2.2", 443, RST)) == (False,)

    def test_an_answer_to_a_connection_from_outside(self, tried):
        answer = tcp("10.0.2.2", 50000, SYN | ACK, of=22)
        assert tried.leaves(answer)[0] is False
        comes = tcp(GUEST, 22, SYN, source="10.0.2.2", of=50000)
        tried.gate.arrives(comes)
        assert tried.back == [comes]
        tried.back.clear()
        assert tried.leaves(answer) == (True,)
        assert tried.leaves(tcp("10.0.2.2", 50000, ACK, of=22)) == (True,)
        assert tried.leaves(tcp("10.0.2.2", 50001, ACK, of=22))[0] is False
        # The guest can open none to the same port of this machine.
        assert tried.leaves(tcp("10.0.2.2", 50000, SYN, of=22))[0] is False

    def test_fragments_do_not_pass(self, tried):
        whole = tcp("192.0.2.1", 443)[34:]
        for part in (0x2000, 1, 0x2001):
            frame = ip(GUEST, "192.0.2.1", frames.TCP, whole, part=part)
            passed, refused = tried.leaves(frame)
            assert not passed
            assert is_sound(refused).protocol == frames.ICMP


class TestOthers:
    def test_what_qemu_answers_itself_passes(self, tried):
        arp = b"\xff" * 6 + CARD + frames.ARP.to_bytes(2) + bytes(28)
        neighbour = ip("fe80::1", "ff02::2", frames.ICMPV6, b"\x85" + bytes(7))
        assert tried.leaves(arp) == tried.leaves(neighbour) == (True,)
        assert tried.leaves(udp("255.255.255.255", 67, b"?", source="0.0.0.0")) == (True,)

    @pytest.mark.parametrize(
        "frame",
        [
            udp("192.0.2.1", 443, b"x"), udp("8.8.8.8", 53, b"x"), udp("10.0.2.2", 69, b"x"),
            udp("192.0.2.1", 67, b"x"), udp("2001:db8::1", 443, b"x", source=GUEST6),
            ip(GUEST, "192.0.2.1", frames.ICMP, b"\x08" + bytes(15)),
            ip(GUEST6, "2001:db8::1", frames.ICMPV6, b"\x80" + bytes(15)),
            ip(GUEST, "192.0.2.1", 132, bytes(20)),
        ],
    )  # fmt: skip
    def test_the_rest_is_prohibited(self, tried, frame):
        passed, refused = tried.leaves(frame)
        assert not passed
        packet, of = is_sound(refused), frames.packet(frame)
        assert packet.payload[:2] == (b"\x03\x0d" if len(of.source) == 4 else b"\x01\x01")
        assert packet.payload[8:].startswith(frame[14 : 14 + 28])

    @pytest.mark.parametrize(
        "frame",
        [
            b"", bytes(13), bytes(60), ROUTER + CARD + b"\x81\x00" + tcp("192.0.2.1", 443)[12:],
            *(tcp("192.0.2.1", 443)[:size] for size in range(0, 54, 5)),
            *(tcp("2001:db8::1", 443, source=GUEST6)[:size] for size in range(0, 74, 7)),
            ip(GUEST6, "2001:db8::1", 0, bytes(40)),  # headers before TCP
            ip(GUEST, "192.0.2.1", frames.ICMP, b"\x03" + bytes(15)),  # an error
        ],
    )  # fmt: skip
    def test_what_is_no_whole_packet_is_dropped(self, tried, frame):
        assert tried.leaves(frame)[0] is False


class TestNames:
    ADDRESS, ADDRESS6 = ip_address("198.51.100.1").packed, ip_address("2001:db8::5").packed

    @pytest.mark.parametrize("server", ["10.0.2.3", "fec0::3"])
    def test_the_addresses_of_a_listed_name_may_be_reached(self, tried, server):
        tried.addresses["example.org"] = [self.ADDRESS, self.ADDRESS6]
        assert tried.leaves(tcp("198.51.100.1", 443))[0] is False
        passed, answer = tried.leaves(ask("Example.ORG", server=server))
        assert not passed  # this machine looks it up
        packet = is_sound(answer)
        assert packet.ports == (53, 5353)
        number, flags, questions, records = struct.unpack_from("!4H", packet.payload, 8)
        assert (number, flags, questions, records) == (7, 0x8180, 1, 1)
        assert packet.payload.endswith(b"\0\0\0\0\0\4" + self.ADDRESS)
        assert tried.leaves(tcp("198.51.100.1", 443)) == (True,)
        assert tried.leaves(tcp("198.51.100.1", 80))[0] is False
        assert tried.leaves(tcp("2001:db8::5", 443, source=GUEST6))[0] is False  # not asked for
        assert tried.leaves(ask("example.org", dns.IPV6_ADDRESS))[1].endswith(self.ADDRESS6)
        assert tried.leaves(tcp("2001:db8::5", 443, source=GUEST6)) == (True,)

    @pytest.mark.parametrize("name", ["example.com", "www.example.org", "org", "xexample.org"])
    def test_another_name_does_not_exist(self, tried, name):
        tried.addresses[name] = [self.ADDRESS]
        _, answer = tried.leaves(ask(name))
        assert is_sound(answer).payload[10:12] == b"\x81\x83"
        assert tried.leaves(tcp("198.51.100.1", 443))[0] is False

    def test_what_is_known_of_a_name_is_its_addresses(self, tried):
        _, answer = tried.leaves(ask("example.org", 16))
        assert is_sound(answer).payload[10:16] == b"\x81\x80\0\1\0\0"

    def test_a_name_that_cannot_be_looked_up(self, tried):
        tried.addresses["example.org"] = None
        _, answer = tried.leaves(ask("example.org"))
        assert is_sound(answer).payload[10:12] == b"\x81\x82"

    def test_many_addresses(self, tried):
        tried.addresses["example.org"] = [bytes([198, 51, 100, it]) for it in range(100)]
        _, answer = tried.leaves(ask("example.org"))
        assert len(is_sound(answer).payload) <= 8 + 512

    def test_what_is_no_question_is_not_answered(self, tried):
        whole = ask("example.org")
        for size in range(len(whole) - 42):
            frame = udp("10.0.2.3", 53, whole[42 : 42 + size])
            assert tried.leaves(frame) == (False,)

    @pytest.mark.parametrize(
        "text", ["127.0.0.1", "127.1.2.3", "0.0.0.0", "::1", "::", "fe80::1%lo", "169.254.1.1",
                 "224.0.0.1", "::ffff:127.0.0.1", "no address"]
    )  # fmt: skip
    def test_a_name_does_not_open_this_machine(self, text):
        assert not lookup.leads_out(text)

    def test_nor_by_its_own_addresses(self, monkeypatch):
        class Probe(socket.socket):
            def connect(self, address):
                pass

            def getsockname(self):
                return "198.51.100.7", 1

        monkeypatch.setattr(socket, "socket", Probe)
        assert lookup.leads_out("198.51.100.8")
        assert not lookup.leads_out("198.51.100.7")


class TestLists:
    @pytest.mark.parametrize(
        ("written", "read"),
        [
            ("nat", "nat"),
            (["B.example.org.:80", "a:1", "a:1"], "a:1 b.example.org:80"),
            ("a:1, b:2\nc:3", "a:1 b:2 c:3"),
            (("127.0.0.1:80", "[::1]:81", "localhost:80"), "localhost:80 localhost:81"),
            (["[2001:DB8:0::1]:80"], "[2001:db8::1]:80"),
        ],
    )
    def test_what_users_write(self, written, read):
        assert parse_network(written) == read
        assert parse_network(read) == read

    @pytest.mark.parametrize(
        "written",
        [
            "private", "", [], [80], None, 80, ["example.org"], ["example.org:0"], ["a:65536"], ["*.a:1"],
            ["http://a:80"], ["a:80/x"], ["a: 80"], ["a b:80"], ["2001:db8::1:80"], ["[a]:80"], ["1.2:80"],
            ["-a:1"], ["10.0.2.2:80"], ["127.0.0.2:80"], ["0.0.0.0:80"], ["224.0.0.1:80"], ["[fec0::2]:80"],
            ["255.255.255.255:80"], [f"a{it}:1" for it in range(257)], ["nat"], "nat a:1",
        ],
    )  # fmt: skip
    def test_what_is_none(self, written):
        with pytest.raises(ConfigError) as error:
            parse_network(written)
        assert error.value.remedy
