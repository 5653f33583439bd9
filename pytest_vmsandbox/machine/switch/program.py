"""The switch as a program. It has one thread, takes frames from ports to ports, and ends when its control socket ends.

The control socket carries one JSON message per packet, and each gets one answer, ``{}`` or what is named here:

* ``{"do": "network", "name": …, "seed": N}``: ``{"network": N}``
* ``{"do": "port", "network": N, "label": …, "place": …}`` with a stream socket: ``{"port": N}``
* ``{"do": "impose", "network": N, "source": …, "dest": …, "conditions": {…}}``: ``{"rule": N}``
* ``{"do": "capture", "network": N}`` with a file: ``{"capture": N}``
* ``{"do": "statistics"|"decisions", "network": N}`` with a file, which gets JSON
* ``{"do": "end", "network": N, "port"|"rule"|"capture": N}`` ends one of these, and ``{"do": "close", "network": N}`` all
* ``{"do": "check"}``: nothing happens
* ``{"error": TEXT}`` is the answer to what cannot be done.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
from itertools import count

from .conditions import Conditions
from .confined import confine
from .forwarding import Network
from .pcap import Capture
from .ports import READING, Port, ProtocolError
from .timetable import Timetable

TYPE_CHECKING = False  # type checkers know it; importing typing would take too long
if TYPE_CHECKING:
    from typing import Any

_MOST_OF_MESSAGE = 1 << 17  # bytes
_WRITES = frozenset({"statistics", "decisions"})


def main(control: int, uid: int = -1, gid: int = -1) -> None:
    """Be the switch until the control socket ends.

    Args:
        control: the descriptor of the control socket.
        uid: the user to become; −1 for the present one.
        gid: the group to become.
    """
    channel = socket.socket(fileno=control)
    confine(uid, gid)
    Program(channel).run()


class Program:
    """The networks, and the loop that serves them."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._timetable = Timetable()
        self._changed: set[Port] = set()
        self._networks: dict[int, Network] = {}
        self._ports: dict[Port, Network] = {}
        self._numbers = count(1)

    def run(self) -> None:
        """Serve until the control socket ends."""
        self._selector.register(self._control, selectors.EVENT_READ)
        while True:
            for key, events in self._selector.select(self._timetable.seconds()):
                if key.data is None:
                    if not self._obey():
                        return
                else:
                    if events & READING:
                        self._read(key.data)
                    self._changed.add(key.data)
            self._timetable.run()
            self._settle()

    # -- frames -----------------------------------------------------------------------------------

    def _read(self, port: Port) -> None:
        network = self._ports.get(port)
        if network is None:  # closed since
            return
        try:
            for packet in port.read():
                network.forward(port, packet)
        except (OSError, ProtocolError):
            self._remove(port)
        for capture in network.captures.values():  # before anyone has these frames
            capture.flush()

    def _settle(self) -> None:
        """Write what waits in ports, and have the selector wait for what they can do next."""
        while self._changed:
            port = self._changed.pop()
            if port not in self._ports:
                continue
            try:
                port.write()
            except OSError:
                self._remove(port)
                continue
            self._ports[port].eased(port)
            wanted = port.wanted()
            if wanted != port.waits:
                if not port.waits:
                    self._selector.register(port.socket, wanted, port)
                elif not wanted:
                    self._selector.unregister(port.socket)
                else:
                    self._selector.modify(port.socket, wanted, port)
                port.waits = wanted

    def _remove(self, port: Port) -> None:
        if port.waits:
            self._selector.unregister(port.socket)
            port.waits = 0
        self._ports.pop(port).remove(port)

    # -- requests ---------------------------------------------------------------------------------

    def _obey(self) -> bool:
        """Answer one request. Returns False at the end of the control socket."""
        try:
            message, fds, _, _ = socket.recv_fds(self._control, _MOST_OF_MESSAGE, 1)
            if not message:
                return False
            request = json.loads(message)
            try:
                answer = self._answer(request, fds)
            except (LookupError, ValueError, OSError) as error:
                answer = {"error": str(error)}
            self._control.send(json.dumps(answer).encode())
        except OSError:
            return False
        return True

    def _answer(self, request: dict[str, Any], fds: list[int]) -> dict[str, object]:
        what = request["do"]
        if what == "network":
            number = next(self._numbers)
            self._networks[number] = Network(
                request["name"], request["seed"], self._timetable, self._changed
            )
            return {"network": number}
        if what == "check":
            return {}
        network = self._networks[request["network"]]
        if what == "port":
            channel = socket.socket(fileno=fds[0])
            port = network.add(next(self._numbers), request["label"], request["place"], channel)
            self._ports[port] = network
            self._changed.add(port)
            return {"port": port.number}
        if what == "impose":
            conditions = Conditions(**request["conditions"])
            return {"rule": network.impose(conditions, request["source"], request["dest"])}
        if what == "capture":
            number = next(self._numbers)
            network.captures[number] = Capture(fds[0])
            return {"capture": number}
        if what in _WRITES:
            with os.fdopen(fds[0], "w", encoding="utf-8") as file:
                json.dump(
                    network.log.lines if what == "decisions" else network.counts, file, default=vars
                )
        elif what == "end":
            self._end(network, request)
        else:
            self._close(request["network"])
        return {}

    def _end(self, network: Network, request: dict[str, Any]) -> None:
        if rule := request.get("rule"):
            network.end_rule(rule)
        elif number := request.get("port"):
            for port in [port for port in network.ports if port.number == number]:
                self._remove(port)
        elif capture := network.captures.pop(request["capture"], None):
            capture.close()

    def _close(self, number: int) -> None:
        network = self._networks.pop(number)
        for port in network.ports[:]:
            self._remove(port)
        for capture in network.captures.values():
            capture.close()
