"""Decides which frames of a guest may leave it. What is not allowed is refused, and the guest is told at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from ipaddress import ip_address

from pytest_vmsandbox.core.allowed import THIS_MACHINE, Target
from pytest_vmsandbox.machine.gate import dns, frames
from pytest_vmsandbox.machine.gate.frames import Packet

# In QEMU's own network: this machine's loopback, the server for names, and what answers DHCP.
_HERE = (ip_address("10.0.2.2").packed, ip_address("fec0::2").packed)
_NAMES = (ip_address("10.0.2.3").packed, ip_address("fec0::3").packed)
_DHCP = {_HERE[0], b"\xff" * 4}
_DHCP_PORT, _DNS_PORT = 67, 53
# Of ICMPv6: a router is looked for, a neighbour is looked for, and a neighbour is told.
_NEIGHBOURS = {b"\x85", b"\x87", b"\x88"}
_MOST_CONNECTIONS = 65_536  # from outside, that are remembered
_MOST_ADDRESSES = 1024  # of one name, that are remembered

Resolve = Callable[[str, Callable[[list[bytes] | None], None]], None]
Connection = tuple[int, bytes, int]  # the guest's port; the other's address and port


class Gate:
    """Knows what one guest may reach.

    Args:
        targets: the hosts and ports.
        out: takes a frame that may leave the guest.
        back: takes a frame for the guest.
        resolve: finds the addresses of a name, and passes them on later; None if that failed.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        *,
        out: Callable[[bytes], None],
        back: Callable[[bytes], None],
        resolve: Resolve,
    ) -> None:
        self._out, self._back, self._resolve = out, back, resolve
        self._fixed: set[tuple[bytes, int]] = set()
        self._ports: dict[str, set[int]] = {}  # of each name
        self._found: dict[str, OrderedDict[bytes, None]] = {}  # the addresses of each name
        self._has_begun = False
        self._from_outside: OrderedDict[Connection, None] = OrderedDict()
        for target in targets:
            if target.host == THIS_MACHINE:
                self._fixed |= {(address, target.port) for address in _HERE}
            elif isinstance(target.host, str):
                self._ports.setdefault(target.host, set()).add(target.port)
            else:
                self._fixed.add((target.host.packed, target.port))

    def leaves(self, frame: bytes) -> None:
        """Take a frame that the guest has sent.

        With the first one it runs. A clone does not know yet that there is IPv6, so the router has to tell it.
        """
        if not self._has_begun:
            self._has_begun = True
            self._out(frames.router_solicitation())
        if frames.frame_type(frame) == frames.ARP:  # QEMU answers it
            self._out(frame)
        elif (packet := frames.packet(frame)) is None:
            return
        elif self._is_allowed(packet):
            self._out(frame)
        elif not self._answer(packet) and (refusal := frames.refusal(packet)) is not None:
            self._back(refusal)

    def arrives(self, frame: bytes) -> None:
        """Take a frame for the guest. It may answer those who connect to it by forwarded ports."""
        packet = frames.packet(frame)
        if packet is not None and packet.protocol == frames.TCP and packet.ports is not None:
            source, target = packet.ports
            if packet.flags & (frames.SYN | frames.ACK) == frames.SYN:
                self._from_outside[target, packet.source, source] = None
                if len(self._from_outside) > _MOST_CONNECTIONS:
                    self._from_outside.popitem(last=False)
        self._back(frame)

    def _is_allowed(self, packet: Packet) -> bool:
        if packet.protocol == frames.ICMPV6:  # others than neighbours cannot be reached by it
            return packet.payload[:1] in _NEIGHBOURS
        if packet.ports is None:
            return False
        source, target = packet.ports
        if packet.protocol == frames.UDP:
            return target == _DHCP_PORT and packet.target in _DHCP
        if self._is_listed(packet.target, target):
            return True
        # What answers a connection from outside opens none: QEMU opens one for a SYN alone.
        opens = packet.flags & (frames.SYN | frames.ACK) == frames.SYN
        return not opens and (source, packet.target, target) in self._from_outside

    def _is_listed(self, address: bytes, port: int) -> bool:
        if (address, port) in self._fixed:
            return True
        return any(
            port in ports and address in self._found.get(name, ())
            for name, ports in self._ports.items()
        )

    def _answer(self, packet: Packet) -> bool:
        """Answer a question for a name; whether it is one."""
        if packet.protocol != frames.UDP or packet.ports is None or packet.target not in _NAMES:
            return False
        if packet.ports[1] != _DNS_PORT:
            return False
        question = dns.question(packet.payload[8:])
        if question is None:
            return True
        if question.name not in self._ports:
            self._back(frames.udp_answer(packet, question.answer(dns.NO_SUCH_NAME)))
            return True

        def answer(addresses: list[bytes] | None) -> None:
            code = dns.FAILED if addresses is None else dns.NO_ERROR
            size = {dns.IPV4_ADDRESS: 4, dns.IPV6_ADDRESS: 16}.get(question.kind)
            known = self._found.setdefault(question.name, OrderedDict())
            fitting = [address for address in addresses or () if len(address) == size]
            for address in fitting:
                known[address] = None
                known.move_to_end(address)
            while len(known) > _MOST_ADDRESSES:
                known.popitem(last=False)
            self._back(frames.udp_answer(packet, question.answer(code, fitting)))

        self._resolve(question.name, answer)
        return True
