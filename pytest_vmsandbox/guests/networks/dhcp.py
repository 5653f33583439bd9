"""A small DHCP server on a network, for systems that ask for their address.

It knows the cards of all guests, and gives each the address that `Network.address` tells. It does not
answer others. It has no router and no name server to offer. Guests are not trusted: a frame that is no
right request is ignored.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address

from pytest_vmsandbox.guests.networks.subnets import Subnets
from pytest_vmsandbox.machine.framed import Frames, framed
from pytest_vmsandbox.machine.gate.frames import ARP, HOPS, IPV4, UDP, checksum, frame_type
from pytest_vmsandbox.machine.loop import LoopThread

MAC = bytes.fromhex("525601000001")  # of the server
_EVERYBODY = b"\xff" * 6
_LEASE_SECONDS = 3600
_MOST_UNSENT = 1 << 16  # bytes
_SERVER_PORT, _CLIENT_PORT = 67, 68
_ANY = IPv4Address(0)
_COOKIE = bytes.fromhex("63825363")
_FIXED = struct.Struct("!BBBB4sHH4s4s4s4s16s64s128s")  # BOOTP, up to the cookie
_DISCOVER, _OFFER, _REQUEST, _ACK, _NAK, _INFORM = 1, 2, 3, 5, 6, 8
_PAD, _END = 0, 255
_MASK, _WANTED, _LEASE, _KIND, _SERVER = 1, 50, 51, 53, 54


@contextmanager
def serving(
    end: socket.socket,
    loop: LoopThread,
    subnets: Subnets,
    address_of: Callable[[str], IPv4Address | None],
) -> Iterator[None]:
    """A server on a port of the switch, until the end of the block.

    Args:
        end: the end of the port that QEMU would have.
        address_of: the address for a MAC address; None if it is unknown.
    """
    frames, unsent = Frames(), bytearray()
    server = Server(subnets, address_of)

    def feed(data: bytes) -> None:
        for frame in frames.feed(data):
            answer = server.answer(frame)
            if answer and len(unsent) < _MOST_UNSENT:  # a client asks again
                unsent.extend(framed(answer))
        with suppress(OSError):  # the switch reads later, or is gone
            del unsent[: end.send(unsent)]

    with loop.reading(end, feed):
        yield


class Server:
    """Answers to frames."""

    def __init__(self, subnets: Subnets, address_of: Callable[[str], IPv4Address | None]) -> None:
        self._address = subnets.server
        self._mask = subnets.ipv4.netmask
        self._address_of = address_of

    def answer(self, frame: bytes) -> bytes:
        """The frame that answers another one; empty for none."""
        try:
            kind = frame_type(frame)
            if kind == ARP:
                return self._about_itself(frame)
            if kind == IPV4:
                return self._to_request(frame)
        except (struct.error, ValueError, IndexError):
            pass
        return b""

    def _about_itself(self, frame: bytes) -> bytes:
        """Where the server is: clients renew their lease there."""
        head: bytes
        head, mac, ip, _, wanted = struct.unpack_from("!8s6s4s6s4s", frame, 14)
        if head != bytes.fromhex("0001080006040001") or wanted != self._address.packed:
            return b""
        answer = struct.pack("!8s6s4s6s4s", head[:7] + b"\x02", MAC, self._address.packed, mac, ip)
        return frame[22:28] + MAC + ARP.to_bytes(2) + answer

    def _to_request(self, frame: bytes) -> bytes:
        start = 14 + (frame[14] & 15) * 4
        ports = struct.unpack_from("!HH", frame, start)
        if frame[14] >> 4 != 4 or frame[23] != UDP or ports != (_CLIENT_PORT, _SERVER_PORT):
            return b""
        message = frame[start + 8 :]
        operation, hardware, length, _, identity, _, flags, client, *_, card, _, _ = (
            _FIXED.unpack_from(message)
        )
        options = _options(message[_FIXED.size :])
        known = self._address_of(":".join(f"{byte:02x}" for byte in card[:6]))
        if (operation, hardware, length) != (1, 1, 6) or known is None:
            return b""
        asked, kind = IPv4Address(client), options.get(_KIND, b"")
        if options.get(_SERVER, self._address.packed) != self._address.packed:
            return b""  # the client has chosen another server
        if kind == bytes([_DISCOVER]):
            said, yours = _OFFER, known
        elif kind == bytes([_REQUEST]):
            wanted = IPv4Address(options.get(_WANTED, client))
            said, yours = (_ACK, known) if wanted == known else (_NAK, _ANY)
        elif kind == bytes([_INFORM]):
            said, yours = _ACK, _ANY
        else:
            return b""
        body = self._message(identity, flags, client, yours, card, said)
        to_all = said == _NAK or (asked == _ANY and flags & 0x8000)
        mac = _EVERYBODY if to_all else card[:6]
        dest = IPv4Address("255.255.255.255") if to_all else (yours if asked == _ANY else asked)
        return mac + MAC + IPV4.to_bytes(2) + self._datagram(dest, body)

    def _message(
        self, identity: bytes, flags: int, client: bytes, yours: IPv4Address, card: bytes, kind: int
    ) -> bytes:
        zero = bytes(4)
        if kind == _NAK:
            client = zero
        head = _FIXED.pack(
            2, 1, 6, 0, identity, 0, flags,
            client, yours.packed, self._address.packed, zero, card, b"", b"",
        )  # fmt: skip
        options = [(_KIND, bytes([kind])), (_SERVER, self._address.packed)]
        if kind != _NAK:
            options.append((_MASK, self._mask.packed))
        if yours != _ANY:
            options.append((_LEASE, struct.pack("!I", _LEASE_SECONDS)))
        packed = b"".join(bytes([number, len(value)]) + value for number, value in options)
        return (head + _COOKIE + packed + bytes([_END])).ljust(300, b"\0")

    def _datagram(self, dest: IPv4Address, body: bytes) -> bytes:
        """An IPv4 packet with a UDP datagram. IPv4 needs no checksum of that."""
        udp = struct.pack("!HHHH", _SERVER_PORT, _CLIENT_PORT, 8 + len(body), 0) + body
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, HOPS, UDP, 0)
        head += self._address.packed + dest.packed
        return head[:10] + checksum(head) + head[12:] + udp


def _options(data: bytes) -> dict[int, bytes]:
    """The options of a message.

    Raises:
        ValueError, IndexError: it has none, or they are cut off.
    """
    if data[:4] != _COOKIE:
        raise ValueError("no options")
    found: dict[int, bytes] = {}
    place = 4
    while (number := data[place]) != _END:
        place += 1
        if number != _PAD:
            length = data[place]
            found[number] = data[place + 1 : place + 1 + length]
            place += 1 + length
    return found
