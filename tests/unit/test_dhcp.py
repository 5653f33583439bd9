from __future__ import annotations

import random
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Network

import pytest

from pytest_vmsandbox.guests.networks.dhcp import MAC, Server
from pytest_vmsandbox.guests.networks.subnets import Subnets
from pytest_vmsandbox.machine.framed import Frames

CARD = bytes.fromhex("525609ab0003")
ALL = b"\xff" * 6
KNOWN, ANY = IPv4Address("10.1.0.3"), IPv4Address(0)
SUBNETS = Subnets(ipv4=IPv4Network("10.1.0.0/24"), ipv6=IPv6Network("fd00:1::/64"))
DISCOVER, OFFER, REQUEST, ACK, NAK, RELEASE, INFORM = 1, 2, 3, 5, 6, 7, 8


@pytest.fixture
def server():
    return Server(SUBNETS, {"52:56:09:ab:00:03": KNOWN}.get)


def request(kind, *, card=CARD, flags=0, client=ANY, options=()):
    packed = b"".join(
        bytes([n, len(value)]) + value for n, value in [(53, bytes([kind])), *options]
    )
    message = struct.pack(
        "!BBBB4sHH4s4s4s4s16s192x",
        1,
        1,
        6,
        0,
        b"ABCD",
        0,
        flags,
        client.packed,
        *[bytes(4)] * 3,
        card,
    )
    message += bytes.fromhex("63825363") + b"\0" + packed + b"\xff"
    udp = struct.pack("!HHHH", 68, 67, 8 + len(message), 0) + message
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, client.packed, b"\xff" * 4
    )
    return ALL + card + b"\x08\0" + ip + udp


def read(frame):
    """Destination of frame and packet, kind of message, the client's address, and the options."""
    assert frame[6:12] == MAC
    head = frame[14:34]
    total = sum(struct.unpack("!10H", head))
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF
    assert struct.unpack_from("!H", head, 2)[0] == len(frame) - 14
    assert struct.unpack_from("!HHH", frame, 34) == (67, 68, len(frame) - 34)
    message = frame[42:]
    assert message[4:8] == b"ABCD"
    options, rest = {}, message[240:]
    while rest[0] != 255:
        options[rest[0]] = rest[2 : 2 + rest[1]]
        rest = rest[2 + rest[1] :]
    (kind,) = options.pop(53)
    return frame[:6], IPv4Address(head[16:20]), kind, IPv4Address(message[16:20]), options


SERVER = SUBNETS.server.packed
LEASE = {1: b"\xff\xff\xff\0", 51: struct.pack("!I", 3600), 54: SERVER}


def test_an_offer_and_its_request(server):
    assert read(server.answer(request(DISCOVER))) == (CARD, KNOWN, OFFER, KNOWN, LEASE)
    wanted = [(50, KNOWN.packed), (54, SERVER)]
    assert read(server.answer(request(REQUEST, options=wanted))) == (CARD, KNOWN, ACK, KNOWN, LEASE)


def test_a_client_that_hears_only_broadcasts(server):
    to, dest, *_ = read(server.answer(request(DISCOVER, flags=0x8000)))
    assert (to, str(dest)) == (ALL, "255.255.255.255")


def test_a_lease_is_renewed(server):
    assert read(server.answer(request(REQUEST, client=KNOWN)))[2:4] == (ACK, KNOWN)
    asks = bytes.fromhex("0001080006040001") + CARD + KNOWN.packed + bytes(6)
    arp = ALL + CARD + b"\x08\x06" + asks
    answer = server.answer(arp + SERVER)
    assert answer == CARD + MAC + b"\x08\x06" + bytes.fromhex("0001080006040002") + MAC + SERVER + (
        CARD + KNOWN.packed
    )
    assert server.answer(arp + KNOWN.packed) == b""


def test_an_address_of_another_network_is_refused(server):
    to, _, kind, yours, options = read(
        server.answer(request(REQUEST, options=[(50, IPv4Address("10.9.0.9").packed)]))
    )
    assert (to, kind, yours, options) == (ALL, NAK, ANY, {54: SERVER})


def test_who_has_an_address_may_ask_for_the_rest(server):
    dest, kind, yours, options = read(server.answer(request(INFORM, client=KNOWN)))[1:]
    assert (dest, kind, yours, options) == (KNOWN, ACK, ANY, {1: LEASE[1], 54: SERVER})


@pytest.mark.parametrize(
    "frame",
    [
        request(DISCOVER, card=bytes.fromhex("525609ab0004")),
        request(RELEASE),
        request(REQUEST, options=[(54, b"\x0a\x01\0\x09")]),
        b"",
        ALL + CARD + b"\x86\xdd" + bytes(60),
    ],
    ids=["unknown card", "release", "another server", "empty", "IPv6"],
)
def test_what_gets_no_answer(server, frame):
    assert server.answer(frame) == b""


def test_nonsense_does_no_harm(server):
    chance = random.Random(16)
    whole = request(REQUEST, options=[(50, KNOWN.packed)])
    for _ in range(3000):
        frame = bytearray(whole[: chance.randrange(len(whole) + 1)])
        for _ in range(chance.randrange(6)):
            if frame:
                frame[chance.randrange(len(frame))] = chance.randrange(256)
        server.answer(bytes(frame))


def test_frames_come_in_pieces():
    frames, found = Frames(), []
    stream = b"".join(struct.pack("!I", len(frame)) + frame for frame in (b"one", b"", b"three"))
    for place in range(len(stream)):
        found += frames.feed(stream[place : place + 1])
    assert found == [b"one", b"", b"three"]
