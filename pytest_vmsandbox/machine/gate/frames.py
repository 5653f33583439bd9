"""Reads Ethernet frames with IP, and makes the answers that refuse them. The guest's frames are not trusted."""

from __future__ import annotations

import struct
from dataclasses import dataclass

ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD  # types of frames
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58  # protocols
SYN, RST, ACK, FIN = 0x02, 0x04, 0x10, 0x01
_ETHERNET = 14
_PORTS = struct.Struct("!HH")
_TCP = struct.Struct("!HHIIBBHHH")
HOPS = 64
_ROUTER_ASKER = b"\x52\x54\0\x12\x34\x57"  # the address of an Ethernet card that nobody has
_MOST_QUOTED = 1200  # bytes of a refused packet, in the answer


@dataclass(frozen=True, kw_only=True)
class Packet:
    """An IP packet in a frame.

    Attributes:
        frame: all of it.
        header: where the IP header begins and ends.
        source, target: addresses, 4 or 16 bytes.
        protocol: of what it carries.
        payload: what it carries, without padding.
        is_part: whether it is a fragment.
    """

    frame: bytes
    header: tuple[int, int]
    source: bytes
    target: bytes
    protocol: int
    payload: bytes
    is_part: bool

    @property
    def ports(self) -> tuple[int, int] | None:
        """The ports of source and target, if it has such."""
        if self.is_part or self.protocol not in (TCP, UDP) or len(self.payload) < 8:
            return None
        source, target = _PORTS.unpack_from(self.payload)
        return source, target

    @property
    def flags(self) -> int:
        """Those of TCP."""
        return self.payload[13] if len(self.payload) >= _TCP.size else 0


def frame_type(frame: bytes) -> int:
    """What is in a frame: one of the types above, or another one."""
    return int.from_bytes(frame[12:14]) if len(frame) >= _ETHERNET else 0


def packet(frame: bytes) -> Packet | None:
    """The IP packet in a frame. None if it is no whole one, or has headers that we do not know."""
    kind, ip = frame_type(frame), frame[_ETHERNET:]
    if kind == IPV4 and len(ip) >= 20 and ip[0] >> 4 == 4:
        header, size = (ip[0] & 15) * 4, int.from_bytes(ip[2:4])
        if not 20 <= header <= size <= len(ip):
            return None
        return Packet(
            frame=frame, header=(_ETHERNET, _ETHERNET + header), source=ip[12:16], target=ip[16:20],
            protocol=ip[9], payload=ip[header:size], is_part=bool(int.from_bytes(ip[6:8]) & 0x3FFF),
        )  # fmt: skip
    if kind == IPV6 and len(ip) >= 40 and ip[0] >> 4 == 6:
        size = int.from_bytes(ip[4:6])
        if 40 + size > len(ip):
            return None
        return Packet(
            frame=frame, header=(_ETHERNET, _ETHERNET + 40), source=ip[8:24], target=ip[24:40],
            protocol=ip[6], payload=ip[40 : 40 + size], is_part=False,
        )  # fmt: skip
    return None


def router_solicitation() -> bytes:
    """A frame that asks the router of IPv6 to tell all hosts how to configure themselves."""
    source, target = bytes(16), b"\xff\x02" + bytes(13) + b"\x02"
    pseudo = source + target + struct.pack("!II", 8, ICMPV6)
    message = b"\x85\0" + checksum(pseudo + b"\x85" + bytes(7)) + bytes(4)
    head = struct.pack("!IHBB", 6 << 28, 8, ICMPV6, 255) + source + target
    return b"\x33\x33\0\0\0\x02" + _ROUTER_ASKER + IPV6.to_bytes(2) + head + message


def refusal(packet: Packet) -> bytes | None:
    """What tells the sender of a packet at once that it is refused; None if nothing may be said to it."""
    if packet.protocol == TCP and not packet.is_part and len(packet.payload) >= _TCP.size:
        return None if packet.flags & RST else _reset(packet)
    return _prohibited(packet)


def udp_answer(packet: Packet, data: bytes) -> bytes:
    """An answer to a UDP packet, as if from its target."""
    source, target = _PORTS.unpack_from(packet.payload)
    head = struct.pack("!HHHH", target, source, 8 + len(data), 0)
    return _answer(packet, UDP, head + data, 6)


def _reset(packet: Packet) -> bytes:
    source, target, sequence, acknowledged, offset, flags, *_ = _TCP.unpack_from(packet.payload)
    size = max(0, len(packet.payload) - (offset >> 4) * 4) + bool(flags & SYN) + bool(flags & FIN)
    if flags & ACK:
        numbers, answer = (acknowledged, 0), RST
    else:
        numbers, answer = (0, (sequence + size) & 0xFFFFFFFF), RST | ACK
    return _answer(packet, TCP, _TCP.pack(target, source, *numbers, 5 << 4, answer, 0, 0, 0), 16)


def _prohibited(packet: Packet) -> bytes | None:
    """ICMP: the administrator has prohibited this. Errors must not be answered."""
    begin, end = packet.header
    if len(packet.target) == 4:
        if packet.protocol == ICMP and packet.payload[:1] not in (b"\x08", b"\x0d"):
            return None
        quoted = packet.frame[begin:end] + packet.payload[:8]
        return _answer(packet, ICMP, b"\x03\x0d" + bytes(6) + quoted, 2)
    if (packet.protocol == ICMPV6 and packet.payload[:1] < b"\x80") or packet.target[0] == 0xFF:
        return None
    quoted = packet.frame[begin:end] + packet.payload[:_MOST_QUOTED]
    return _answer(packet, ICMPV6, b"\x01\x01" + bytes(6) + quoted, 2)


def _answer(packet: Packet, protocol: int, payload: bytes, checksum_at: int) -> bytes:
    """A frame back to the sender of a packet, with checksums."""
    source, target = packet.target, packet.source
    ethernet = packet.frame[6:12] + packet.frame[:6] + packet.frame[12:14]
    if len(source) == 4:
        pseudo = source + target + struct.pack("!HH", protocol, len(payload))
        head = struct.pack("!BBHIBBH", 0x45, 0, 20 + len(payload), 0, HOPS, protocol, 0)
        head += source + target
        head = head[:10] + checksum(head) + head[12:]
    else:
        pseudo = source + target + struct.pack("!II", len(payload), protocol)
        head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, HOPS) + source + target
    if protocol == ICMP:
        pseudo = b""
    payload = payload[:checksum_at] + checksum(pseudo + payload) + payload[checksum_at + 2 :]
    return ethernet + head + payload


def checksum(data: bytes) -> bytes:
    """The checksum of the Internet. The field itself is zero in `data`."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (total ^ 0xFFFF or 0xFFFF).to_bytes(2)
