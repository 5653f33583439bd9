"""A network of the switch: it learns where addresses are, and brings frames there by the rules in force."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from functools import partial
from time import monotonic

from .conditions import Conditions, Fate, Flow, Rule
from .pcap import Capture
from .ports import MOST_UNDERWAY, OVERHEAD, Counts, Port
from .timetable import Action, Timetable

TO_ALL = "*"
AGE_SECONDS = 300.0  # after which an address that was silent is forgotten
MOST_ADDRESSES = 256  # of one port: the next one replaces its oldest
PATIENCE_SECONDS = 0.5  # that a guest's frames wait for another one that takes nothing
SILENT_SECONDS = 0.1  # after which a guest that takes nothing gets no patience
OVERTAKEN_SECONDS = 0.1  # that a frame waits for one to overtake it
MOST_OF_LOG = 1 << 20  # bytes

Step = tuple[Rule, Flow, Fate]


class Log:
    """Lines about decisions, up to a limit."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._left = MOST_OF_LOG

    def add(self, line: str) -> None:
        """Add a line."""
        if self._left > 0:
            self._left -= len(line) + 1
            self.lines.append(line if self._left > 0 else "(the log is full)")


class Network:
    """A network with its ports, and nothing in common with others.

    Args:
        timetable: of the switch.
        changed: gets each port that has something to do then.

    Attributes:
        ports: that are open. Several can have one label.
        counts: label → what has gone through its ports.
        log: what was decided.
        captures: that are under way, by their numbers.
    """

    def __init__(self, name: str, seed: int, timetable: Timetable, changed: set[Port]) -> None:
        self.ports: list[Port] = []
        self.counts: dict[str, Counts] = {}
        self.captures: dict[int, Capture] = {}
        self.log = Log()
        self._seed = [seed, name]
        self._timetable = timetable
        self._changed = changed
        self._places: dict[bytes, Port] = {}
        self._rules: dict[int, Rule] = {}
        self._imposed: dict[tuple[str | None, str | None], int] = {}
        self._paths: dict[tuple[str, str], list[tuple[Rule, Flow]]] = {}

    # -- rules ------------------------------------------------------------------------------------

    def impose(self, conditions: Conditions, source: str | None, dest: str | None) -> int:
        """Have conditions act from now on. Returns the number of the rule."""
        number = sum(self._imposed.values()) + 1
        nth = self._imposed[source, dest] = self._imposed.get((source, dest), 0) + 1
        seed = json.dumps([*self._seed, source is None, dest is None, nth])
        self._rules[number] = Rule(number, conditions, source, dest, seed)
        self._paths.clear()
        usual = vars(Conditions())
        said = [f"{name}={it:g}" for name, it in vars(conditions).items() if it != usual[name]]
        self.log.add(" ".join([f"{number} begins {source or TO_ALL}>{dest or TO_ALL}", *said]))
        return number

    def end_rule(self, number: int) -> None:
        """End a rule, if it is in force."""
        if self._rules.pop(number, None):
            self._paths.clear()
            self.log.add(f"{number} ends")

    def _path(self, source: Port, dest: Port | None) -> list[tuple[Rule, Flow]]:
        """What acts on frames of a port that go to another port; None: before it is known where they go."""
        key = source.label, dest.label if dest else TO_ALL
        try:
            return self._paths[key]
        except KeyError:
            pass
        rules = self._rules.values()
        if dest is None:
            acting = [rule for rule in rules if rule.source == source.label and rule.dest is None]
        else:
            acting = [
                *(rule for rule in rules if (rule.source, rule.dest) == key),
                *(rule for rule in rules if rule.source is None and rule.dest in {None, key[1]}),
            ]
        way = f"{source.place}>{dest.place if dest else TO_ALL}"
        path = self._paths[key] = [(rule, rule.flow(">".join(key), way)) for rule in acting]
        return path

    def _decide(self, source: Port, dest: Port | None) -> list[Step] | None:
        """Decide about a frame; None if it does not arrive."""
        steps = []
        for rule, flow in self._path(source, dest):
            fate = flow.decide(rule.conditions)
            if said := str(fate):
                self.log.add(f"{rule.number} {flow.name} {flow.count} {said}")
            if fate.dropped:
                source.counts.dropped[fate.dropped] += 1
                return None
            steps.append((rule, flow, fate))
        return steps

    # -- frames -----------------------------------------------------------------------------------

    def forward(self, source: Port, packet: bytes) -> None:
        """Take a frame from a port. Its length is before it."""
        for capture in self.captures.values():
            capture.add(packet[4:])
        now = monotonic()
        if not self._rules:
            self._learn(source, packet[10:16], now)
            for dest in self._targets(source, packet[4:10], now):
                self._deliver(source, dest, packet)
            return
        steps = self._decide(source, None)
        if steps is None:
            return
        self._learn(source, packet[10:16], now)
        # All is decided now: the order in which frames come through the first rules depends on time.
        ways = [
            (dest, way)
            for dest in self._targets(source, packet[4:10], now)
            if (way := self._decide(source, dest)) is not None
        ]

        def fan_out(then: float) -> None:
            for dest, way in ways:
                copies = copies_of(steps + way)
                arrive = partial(self._arrive, source, dest, packet, copies)
                Journey(self._timetable, source, packet, way, arrive).begin(then)

        Journey(self._timetable, source, packet, steps, fan_out).begin(now)

    def _arrive(self, source: Port, dest: Port, packet: bytes, copies: int, _: float) -> None:
        if not dest.is_closed:
            for _ in range(copies):
                self._deliver(source, dest, packet)

    def _learn(self, port: Port, address: bytes, now: float) -> None:
        if address[0] & 1:  # of a group: nobody's
            return
        known = self._places.get(address)
        if known is not port:
            if known is not None:
                del known.addresses[address]
            if len(port.addresses) >= MOST_ADDRESSES:
                oldest, _ = port.addresses.popitem(last=False)
                del self._places[oldest]
            self._places[address] = port
        port.addresses[address] = now
        port.addresses.move_to_end(address)

    def _targets(self, source: Port, address: bytes, now: float) -> Iterable[Port]:
        place = self._places.get(address)
        if place is not None and now - place.addresses[address] < AGE_SECONDS:
            return () if place is source else (place,)
        return [port for port in self.ports if port.label != source.label]

    def _deliver(self, source: Port, dest: Port, packet: bytes) -> None:
        self._changed.add(dest)
        if dest.put(packet) or source.is_closed:
            return
        if monotonic() - dest.waiting_since > SILENT_SECONDS:
            self._give_up(dest)  # it is frozen, so its peers should not wait at all
        else:
            source.awaited.add(dest)
            dest.awaiting.add(source)
            self._changed.add(source)
            if dest.patience is None:
                until = monotonic() + PATIENCE_SECONDS
                dest.patience = self._timetable.add(until, lambda _: self._give_up(dest))

    def _give_up(self, port: Port) -> None:
        """Let nobody wait for a port any longer: what goes there is dropped until its guest has caught up."""
        port.is_deaf = True
        self._release(port)

    def eased(self, port: Port) -> None:
        """See whether a port has taken what was for it, so that others can go on."""
        if port.has_caught_up() and (port.is_deaf or port.awaiting):
            port.is_deaf = False
            self._release(port)

    def _release(self, port: Port) -> None:
        if port.patience is not None:
            port.patience.take()
            port.patience = None
        for source in port.awaiting:
            source.awaited.discard(port)
            self._changed.add(source)
        port.awaiting.clear()

    # -- ports ------------------------------------------------------------------------------------

    def add(self, number: int, label: str, place: str, channel: socket.socket) -> Port:
        """A new port."""
        port = Port(number, label, place, channel, self.counts.setdefault(label, Counts()))
        self.ports.append(port)
        return port

    def remove(self, port: Port) -> None:
        """Forget a port, and close it."""
        self.ports.remove(port)
        for address in port.addresses:
            del self._places[address]
        port.addresses.clear()
        self._release(port)
        for other in port.awaited:
            other.awaiting.discard(port)
        port.close()


def copies_of(steps: Iterable[Step]) -> int:
    """How often a frame arrives."""
    return 1 + sum(fate.is_doubled for _, _, fate in steps)


class Journey:
    """A frame on its way through rules that act on it.

    Args:
        source: the port that it comes from.
        steps: the rules, with what is decided.
        arrive: called with the time when it is through.
    """

    __slots__ = ("_arrive", "_packet", "_source", "_steps", "_timetable")

    def __init__(
        self,
        timetable: Timetable,
        source: Port,
        packet: bytes,
        steps: list[Step],
        arrive: Action,
    ) -> None:
        self._timetable = timetable
        self._source = source
        self._packet = packet
        self._steps = steps[::-1]  # the next one is the last
        self._arrive = arrive

    def begin(self, now: float) -> None:
        """Set out, if not too much of its port is under way."""
        if not self._steps:
            self._arrive(now)
            return
        size = len(self._packet) + OVERHEAD
        if self._source.underway + size > MOST_UNDERWAY:
            self._source.counts.dropped["overflow"] += 1
            return
        self._source.underway += size
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        """Go on until it has to wait, or is through."""
        if not self._steps:
            self._end()
            self._arrive(now)
            return
        rule, flow, fate = self._steps.pop()
        at = rule.sent_at(len(self._packet), now)
        if at is None:
            self._source.counts.dropped["queue"] += 1
            self._end()
            return
        at = flow.last = max(at + rule.conditions.latency + fate.jitter, flow.last)
        held = flow.held.take() if flow.held else None
        if fate.is_overtaken and held is None:
            flow.held = self._timetable.add(at + OVERTAKEN_SECONDS, self._go_on)
            return
        flow.held = None
        if at > now:
            self._timetable.add(at, self._go_on)
            if held:
                self._timetable.add(at, held)
        else:
            self._go_on(now)
            if held:
                held(now)

    def _end(self) -> None:
        self._source.underway -= len(self._packet) + OVERHEAD
