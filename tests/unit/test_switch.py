"""The switch: what it decides, and its real process between sockets that stand for guests."""

import io
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pytest_vmsandbox.core.errors import ConfigError, LaunchError
from pytest_vmsandbox.machine.process import Launcher
from pytest_vmsandbox.machine.switch import forwarding, ports
from pytest_vmsandbox.machine.switch.conditions import Conditions, Rule
from pytest_vmsandbox.machine.switch.pcap import Capture
from pytest_vmsandbox.machine.switch.switch import Switch
from pytest_vmsandbox.machine.switch.timetable import Timetable

ALL = b"\xff" * 6
GROUP = bytes.fromhex("333300000001")  # IPv6: all hosts
SECONDS = 20.0


def address(label):
    return b"\x02" + label.encode().ljust(5, b"\0")[:5]


class Card:
    """A guest's network card, played by this process."""

    def __init__(self, network, label, **more):
        self.label = label
        self.port = network.port(label, **more)
        self.socket = self.port.socket
        self.socket.settimeout(SECONDS)
        self._rest = b""

    def send(self, dest, body=b"", *, source=None):
        dest = dest if isinstance(dest, bytes) else address(dest.label)
        frame = dest + (source or address(self.label)) + b"\x88\xb5" + body
        self.socket.sendall(struct.pack(">I", len(frame)) + frame)

    def take(self, count=1):
        """The contents of the next frames."""
        return [self._frame()[14:] for _ in range(count)]

    def _frame(self):
        while True:
            size = int.from_bytes(self._rest[:4], "big") + 4
            if len(self._rest) >= max(size, 5):
                frame, self._rest = self._rest[4:size], self._rest[size:]
                return frame
            data = self.socket.recv(1 << 16)
            assert data, "the switch has closed the port"
            self._rest += data


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    with Launcher(tmp_path_factory.mktemp("run")) as launcher:
        yield launcher


@pytest.fixture(scope="module")
def switch(launcher):
    with Switch(launcher) as switch:
        yield switch


@pytest.fixture
def lan(switch):
    network = switch.network("lan", seed=1)
    yield network
    network.close()


@pytest.fixture
def cards(lan):
    """Makes cards, which know where the others are."""
    with ExitStack() as stack:

        def make(labels):
            made = [Card(lan, label) for label in labels]
            for card in made:
                stack.callback(card.socket.close)
            for card in made:
                card.send(ALL, b"hello")
            for card in made:
                card.take(len(made) - 1)
            return made

        yield make


def counts(network, label, key, least):
    """The statistics of a port, when it has counted enough. What is sent and what is asked come on different ways."""
    deadline = time.monotonic() + SECONDS
    while True:
        found = network.statistics()[label]
        value = found.dropped.get(key, 0) if key not in vars(found) else getattr(found, key)
        if value >= least:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.005)


class TestForwarding:
    def test_learns_where_addresses_are(self, cards):
        a, b, c = cards("abc")
        a.send(b, b"for b")
        b.send(a, b"for a")
        assert b.take() == [b"for b"]
        assert a.take() == [b"for a"]
        a.send(ALL, b"for all")
        assert c.take() == b.take() == [b"for all"]  # c got nothing before

    @pytest.mark.parametrize("dest", [ALL, GROUP, address("nobody")])
    def test_floods_groups_and_unknown_addresses(self, cards, dest):
        a, b, c = cards("abc")
        a.send(dest, b"x")
        assert b.take() == c.take() == [b"x"]
        b.send(a, b"end")
        assert a.take() == [b"end"]  # not its own frame

    def test_an_address_can_move(self, cards):
        a, b, c = cards("abc")
        c.send(ALL, b"I am b", source=address("b"))
        assert a.take() == [b"I am b"]
        a.send(b, b"x")
        assert c.take() == [b"x"]

    def test_a_port_can_have_the_label_of_another(self, lan, cards):
        """As when a guest moves to another QEMU."""
        a, old, c = cards("abc")
        new = Card(lan, "b")
        with new.socket:
            a.send(old, b"1")
            assert old.take() == [b"1"]
            new.send(ALL, b"moved")
            assert a.take() == c.take() == [b"moved"]
            a.send(old, b"2")
            assert new.take() == [b"2"]
            old.port.close()
            a.send(old, b"3")
            assert new.take() == [b"3"]

    def test_a_card_that_is_gone_is_forgotten(self, lan, cards):
        a, b, c = cards("abc")
        b.socket.close()
        lan.statistics()  # it has seen that by then
        a.send(b, b"x")
        assert c.take() == [b"x"]

    def test_a_network_that_is_closed_takes_its_ports_along(self, switch):
        network = switch.network("short")
        card = Card(network, "a")
        with card.socket:
            network.close()
            assert card.socket.recv(1) == b""
        network.close()

    @settings(
        max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        st.lists(
            st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)),
            min_size=1,
            max_size=60,
        )
    )
    def test_nothing_crosses_networks(self, switch, frames):
        """All networks have the same name, labels and addresses."""
        with ExitStack() as stack:
            networks = [switch.network("lan") for _ in range(3)]
            for network in networks:
                stack.callback(network.close)
            made = [[Card(network, label) for label in "abc"] for network in networks]
            for card in (card for row in made for card in row):
                stack.callback(card.socket.close)
            for place, source, dest in frames:
                row = made[place]
                row[source].send(ALL if dest == 3 else row[dest], bytes([place]))
            for place, row in enumerate(made):
                for number, card in enumerate(row):
                    row[number - 1].send(ALL, b"end")
                    while (body := card.take()[0]) != b"end":
                        assert body == bytes([place])
                    for other in row:
                        if other not in {card, row[number - 1]}:
                            while other.take() != [b"end"]:
                                pass


class TestConditions:
    def test_loss_is_as_asked(self, lan, cards):
        a, b = cards("ab")
        lost = 0
        with lan.impose(Conditions(loss=0.3), source="a"):
            for received in range(501, 5002, 500):
                for _ in range(500):
                    a.send(b)
                    b.send(a, b"x")
                before, lost = lost, counts(lan, "a", "received", received).dropped["lost"]
                b.take(500 - (lost - before))
                assert a.take(500) == [b"x"] * 500  # the other direction loses nothing
        assert 0.27 * 5000 <= lost <= 0.33 * 5000

    def decided(self, switch, seed, frames, busy, names):
        """The decisions about frames from a to b, whatever they are called, while a third card is busy or not."""
        network = switch.network("lan", seed=seed)
        with ExitStack() as stack:
            stack.callback(network.close)
            a, b, c = (
                Card(network, label, place=place) for label, place in zip(names, "abc", strict=True)
            )
            for card in (a, b, c):
                stack.callback(card.socket.close)
            bad = Conditions(loss=0.2, duplicate=0.2, reorder=0.2, jitter=0.001)
            network.impose(bad, source=a.label)
            network.impose(bad, source=a.label, dest=b.label)
            network.impose(bad, dest=b.label)
            b.send(ALL)
            a.take()
            for _ in range(frames):
                a.send(b)
                if busy:
                    c.send(b)
            counts(network, a.label, "received", frames)
            lines = [line.translate(str.maketrans(names, "abc")) for line in network.decisions()]
            return [line for line in lines if " a>" in line]

    def test_the_same_seed_decides_the_same(self, switch):
        first, second, other, renamed = (
            self.decided(switch, seed, 300, busy, names)
            for seed, busy, names in (
                *((7, True, "abc"), (7, False, "abc"), (8, False, "abc"), (7, False, "XYZ")),
            )
        )
        assert len(first) > 300
        assert first == second == renamed
        assert first != other
        assert {"lost", "doubled", "overtaken"} < {word for line in first for word in line.split()}

    def test_a_change_does_not_repeat_what_was_decided(self, network):
        """Else a test that sends one frame under each of many short losses would lose all or none."""
        world, a, _ = network("ab")
        for _ in range(100):
            number = world.impose(Conditions(loss=0.5), "a", None)
            give(world, a, address("b"), address("a"))
            world.end_rule(number)
        assert 20 < a.counts.dropped["lost"] < 80

    def test_all_are_doubled(self, lan, cards):
        a, b = cards("ab")
        with lan.impose(Conditions(duplicate=1), source="a", dest="b"):
            for number in range(3):
                a.send(b, bytes([number]))
            assert b.take(6) == [bytes([number]) for number in (0, 0, 1, 1, 2, 2)]

    def test_each_is_overtaken_by_the_next_one(self, lan, cards):
        a, b = cards("ab")
        with lan.impose(Conditions(reorder=1), dest="b"):
            for number in range(6):
                a.send(b, bytes([number]))
            assert b.take(6) == [bytes([number]) for number in (1, 0, 3, 2, 5, 4)]
            a.send(b, b"the last one is not kept for ever")
            assert b.take()

    def test_latencies_add_up(self, lan, cards):
        a, b = cards("ab")
        with ExitStack() as stack:
            for way in ({"source": "a"}, {"source": "a", "dest": "b"}, {"dest": "b"}):
                stack.enter_context(lan.impose(Conditions(latency=0.03, jitter=0.01), **way))
            began = time.monotonic()
            for number in range(20):
                a.send(b, bytes([number]))
            assert b.take(20) == [bytes([number]) for number in range(20)]  # jitter keeps the order
            assert time.monotonic() - began >= 0.09

    def test_nobody_waits_longer_than_a_selector_can(self):
        timetable = Timetable()
        timetable.add(1e300, lambda _: None)
        with selectors.DefaultSelector() as selector:
            read, write = os.pipe()
            selector.register(read, selectors.EVENT_READ)
            os.write(write, b"x")
            assert selector.select(timetable.seconds())
            os.close(read)
            os.close(write)

    def test_a_rate_is_not_exceeded(self):
        rule = Rule(1, Conditions(rate=1e6), "a", None, "")
        sent = [rule.sent_at(1250, now=5.0) for _ in range(100)]  # 10 ms each
        passed = [at for at in sent if at is not None]
        assert passed == pytest.approx([5.01 + number / 100 for number in range(len(passed))])
        assert 0.25 <= passed[-1] - 5.0 <= 0.28  # the queue is bounded
        assert rule.sent_at(1250, now=6.0) == pytest.approx(6.01)

    def test_a_frame_to_all_goes_once_through_the_link_of_its_source(self, network):
        world, a, *others = network("abcd")
        world.impose(Conditions(rate=1.0, reorder=1), "a", None)
        for number in range(4):
            give(world, a, ALL, address("a"), bytes([number]))
        [rule] = world._rules.values()
        assert rule._free_at - time.monotonic() <= 4 * 19 * 8
        for entry in sorted(world._timetable._entries):
            if action := entry.take():
                action(entry.at)
        for port in others:
            assert [packet[18] for packet in port._queue] == [1, 0, 3, 2]

    def test_a_slow_rate_has_room_for_a_window(self):
        rule = Rule(1, Conditions(rate=8000), "a", None, "")
        assert sum(rule.sent_at(1500, now=0.0) is not None for _ in range(100)) == 22  # 32 KiB

    def test_a_partition_one_way(self, lan, cards):
        a, b, c = cards("abc")
        with lan.impose(Conditions(cut=True), source="a", dest="b"):
            a.send(b, b"lost")
            a.send(ALL, b"lost for b")
            assert c.take() == [b"lost for b"]
            b.send(a, b"passes")
            assert a.take() == [b"passes"]
            assert lan.statistics()["a"].dropped == {"cut": 2}
        with lan.impose(Conditions(latency=0.001), source="b") as other:
            assert lan.decisions(other) == ["2 begins b>* latency=0.001"]
        a.send(b, b"healed")
        assert b.take() == [b"healed"]

    def test_a_frame_to_all_is_cut_for_all_at_its_source(self, lan, cards):
        a, b, c = cards("abc")
        rule = lan.impose(Conditions(cut=True), source="a")
        a.send(ALL, b"lost")
        counts(lan, "a", "cut", 1)
        rule.end()
        rule.end()
        a.send(ALL, b"passes")
        assert b.take() == c.take() == [b"passes"]

    @pytest.mark.parametrize(
        "conditions",
        [
            *({"loss": 1.1}, {"duplicate": -1}, {"reorder": float("nan")}),
            *({"latency": -0.1}, {"jitter": 61}, {"rate": 0}, {"rate": float("inf")}),
            *({"rate": 1e-5}, {"rate": float("nan")}, {"latency": float("nan")}),
        ],
    )
    def test_impossible_ones_are_refused(self, lan, conditions):
        with pytest.raises(ConfigError, match=next(iter(conditions))) as caught:
            lan.impose(Conditions(**conditions), source="a")
        assert caught.value.remedy
        assert ("partition or unplug" in caught.value.remedy) == ("rate" in conditions)

    def test_the_log_is_bounded(self):
        log = forwarding.Log()
        for _ in range(200_000):
            log.add("1 a>b 17 lost")
        assert sum(len(line) + 1 for line in log.lines) <= forwarding.MOST_OF_LOG + 100
        assert log.lines[-1] == "(the log is full)"


class TestHostileGuest:
    def test_a_giant_frame_closes_its_port_only(self, cards):
        a, b, c = cards("abc")
        a.socket.sendall(struct.pack(">I", 65_537))
        assert a.socket.recv(1) == b""
        b.send(c, b"x")
        assert c.take() == [b"x"]

    def test_the_largest_frame_passes(self, cards):
        a, b = cards("ab")
        a.send(b, b"x" * (65_536 - 14))
        assert len(b.take()[0]) == 65_536 - 14

    def test_what_is_no_frame_is_dropped(self, lan, cards):
        a, b = cards("ab")
        a.socket.sendall(b"\0\0\0\0" + struct.pack(">I", 13) + b"x" * 13)
        a.send(b, b"x")
        assert b.take() == [b"x"]
        assert lan.statistics()["a"].dropped == {"short": 2}

    def test_a_guest_that_takes_nothing_stops_nobody(self, lan, cards):
        a, b, c = cards("abc")
        body = b"x" * 60_000
        for _ in range(100):
            a.send(b, body)
        a.send(c, b"in the end")
        assert c.take() == [b"in the end"]
        dropped = lan.statistics()["b"].dropped["unread"]
        assert 0 < dropped < 100
        assert b.take(100 - dropped) == [body] * (100 - dropped)  # nothing else is missing
        a.send(b, b"taken again")
        assert b.take() == [b"taken again"]

    def test_a_sender_waits_for_a_guest_that_is_slow(self, network, ends, monkeypatch):
        world, a, b = network("ab")
        monkeypatch.setattr(ports, "monotonic", lambda: 100.0)
        monkeypatch.setattr(forwarding, "monotonic", lambda: 100.0)
        given = 0
        for _ in range(20):
            while not a.awaited:
                give(world, a, address("b"), address("a"), b"x" * 1000)
                given += 1
            assert not a.wanted() & ports.READING
            while a.awaited:
                b.write()
                ends[b].recv(1 << 20)
                world.eased(b)
        assert b.counts.sent + b.queued // (1018 + ports.OVERHEAD) == given
        assert b.counts.dropped == {}

    def test_addresses_are_bounded_for_each_port(self, network):
        world, a, b = network("ab")
        give(world, a, ALL, address("a"))
        for number in range(1000):
            give(world, b, address("a"), b"\x02" + struct.pack(">IB", number, 0))
        assert len(world._places) == forwarding.MOST_ADDRESSES + 1
        assert world._places[address("a")] is a
        give(world, b, ALL, b"\x03" * 6)
        assert b"\x03" * 6 not in world._places  # a group is nobody's

    def test_a_silent_address_is_forgotten(self, network, monkeypatch):
        world, a, b, c = network("abc")
        give(world, b, ALL, address("b"))
        take(a, c)
        give(world, a, address("b"), address("a"))
        assert take(a, b, c) == [0, 1, 0]
        later = time.monotonic() + forwarding.AGE_SECONDS
        monkeypatch.setattr(forwarding, "monotonic", lambda: later)
        give(world, a, address("b"), address("a"))
        assert take(a, b, c) == [0, 1, 1]

    def test_what_is_under_way_is_bounded(self, network):
        world, a, _ = network("ab")
        world.impose(Conditions(latency=60), "a", None)
        for _ in range(200):
            give(world, a, address("b"), address("a"), b"x" * 60_000)
        assert a.underway <= ports.MOST_UNDERWAY
        assert a.counts.dropped["overflow"] == 200 - ports.MOST_UNDERWAY // (
            60_018 + ports.OVERHEAD
        )

    @pytest.mark.parametrize("is_frozen", [False, True])
    def test_nobody_waits_for_a_guest_that_is_frozen(self, network, monkeypatch, is_frozen):
        world, a, b = network("ab")
        later = 100.0 + 2 * forwarding.SILENT_SECONDS * is_frozen
        monkeypatch.setattr(ports, "monotonic", lambda: 100.0)
        monkeypatch.setattr(forwarding, "monotonic", lambda: later)
        for _ in range(12):
            give(world, a, address("b"), address("a"), b"x" * 60_000)
        assert b.is_deaf is is_frozen
        assert a.awaited == (set() if is_frozen else {b})

    def test_what_waits_is_bounded_whatever_is_patient(self, network):
        world, a, b = network("ab")
        for _ in range(200):
            give(world, a, address("b"), address("a"), b"x" * 60_000)
        assert b.queued <= ports.QUEUE_IS_FULL + 61_000
        assert b.counts.dropped["unread"]

    @settings(deadline=None)
    @given(st.lists(st.integers(1, 400), max_size=30), st.lists(st.integers(14, 300), max_size=8))
    def test_a_stream_may_come_in_any_pieces(self, cuts, sizes):
        frames = [bytes([number]) * size for number, size in enumerate(sizes)]
        stream = io.BytesIO(b"".join(struct.pack(">I", len(it)) + it for it in frames))
        ours, theirs = socket.socketpair()
        port = ports.Port(1, "a", "a", theirs, ports.Counts())
        found = []
        with ours, theirs:
            for size in [*cuts, -1]:
                ours.sendall(stream.read(size))
                found += [it[4:] for it in port.read()]
        assert found == frames

    @settings(deadline=None)
    @given(st.binary(max_size=300))
    def test_any_bytes_are_frames_or_refused(self, data):
        ours, theirs = socket.socketpair()
        network = forwarding.Network("lan", 1, Timetable(), set())
        port = network.add(1, "a", "a", theirs)
        with ours, theirs, suppress(ports.ProtocolError):
            ours.sendall(data)
            for frame in port.read():
                network.forward(port, frame)
        assert port.counts.received_bytes <= len(data)


@pytest.fixture
def ends():
    """The guest's end of each port that `network` has made."""
    return {}


@pytest.fixture
def network(ends):
    """Makes a network and its ports in this process. Nobody takes what they send."""
    world = forwarding.Network("lan", 1, Timetable(), set())
    with ExitStack() as stack:

        def make(labels):
            for number, label in enumerate(labels):
                ours, theirs = socket.socketpair()
                stack.enter_context(ours)
                stack.enter_context(theirs)
                ends[world.add(number, label, label, theirs)] = ours
            return [world, *world.ports]

        yield make


def give(world, port, dest, source, body=b""):
    frame = dest + source + b"\x88\xb5" + body
    world.forward(port, struct.pack(">I", len(frame)) + frame)


def take(*some):
    """How many frames wait in each port, which are then taken out."""
    found = [len(port._queue) for port in some]
    for port in some:
        port._queue.clear()
        port.queued = 0
    return found


class TestCapture:
    def test_has_all_that_is_sent(self, lan, cards):
        a, b = cards("ab")
        with tempfile.TemporaryFile() as file:
            with lan.capture(file), lan.impose(Conditions(cut=True), source="a"):
                a.send(b, b"captured before it is lost")
                b.send(a, b"y" * 70)
                a.take()
                counts(lan, "a", "cut", 1)
                assert len(frames_of(os.pread(file.fileno(), 1000, 0))) == 2  # as it goes
            a.send(b, b"not captured")
            b.take()
            file.seek(0)
            assert sorted(frame[14:] for frame in frames_of(file.read())) == [
                *(b"captured before it is lost", b"y" * 70)
            ]

    def test_has_a_limit(self, tmp_path):
        path = tmp_path / "small.pcap"
        capture = Capture(os.open(path, os.O_CREAT | os.O_WRONLY), limit=300)
        for _ in range(10):
            capture.add(b"x" * 100)
        capture.close()
        assert frames_of(path.read_bytes()) == [b"x" * 100] * 2

    def test_a_full_disk_is_no_error(self):
        capture = Capture(os.open("/dev/full", os.O_WRONLY))
        for _ in range(3):
            capture.add(b"x" * 65_536)
        capture.close()


def frames_of(data):
    """The frames of a file in the format of pcap."""
    magic, *_, link = struct.unpack_from("=IHHiIII", data)
    assert (magic, link) == (0xA1B23C4D, 1)
    found, place = [], 24
    while place < len(data):
        seconds, _, size, full = struct.unpack_from("=IIII", data, place)
        assert abs(seconds - time.time()) < 3600
        assert size == full
        found.append(data[place + 16 : place + 16 + size])
        place += 16 + size
    return found


class TestProcess:
    def test_is_confined(self, lan):
        status = Path(f"/proc/{lan._program.process.pid}/status").read_text(encoding="utf-8")
        fields = dict(line.split(":\t", 1) for line in status.splitlines())
        assert fields["NoNewPrivs"] == "1"
        assert fields["Threads"] == "1"
        if os.geteuid() == 0:
            assert "0" not in fields["Uid"].split() + fields["Gid"].split()
            assert int(fields["CapEff"], 16) == 0

    def test_can_open_no_file_where_the_kernel_has_landlock(self):
        code = """
            import ctypes
            from pytest_vmsandbox.machine.switch.confined import confine
            there = ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
            confine(-1, -1)
            try:
                open("/proc/version")
            except PermissionError:
                print(there)
            else:
                print(not there)
        """
        argv = [sys.executable, "-c", textwrap.dedent(code)]
        assert subprocess.check_output(argv, text=True) == "True\n"

    def test_a_suite_without_networks_has_none(self, tmp_path):
        with Launcher(tmp_path / "run") as launcher, Switch(launcher) as switch:
            assert switch._program is None

    def test_ends_with_the_control_socket(self, launcher):
        with Switch(launcher) as switch:
            program = switch.network("lan")._program
            program.control.shutdown(socket.SHUT_RDWR)
            assert program.process.wait(SECONDS) == 0, program.process.stderr_tail

    def test_a_killed_one_is_reported_and_replaced(self, launcher):
        with Switch(launcher) as switch:
            lost = switch.network("lan")
            card = Card(lost, "a")
            with card.socket:
                os.kill(lost._program.process.pid, signal.SIGKILL)
                assert card.socket.recv(1) == b""
                assert lost._program.process.wait(SECONDS) == -9
                lan = switch.network("lan")  # by another process
                for use in (lost.check, lost.statistics, lambda: lost.end(rule=1), lost.close):
                    with pytest.raises(LaunchError, match="switch of this run is gone") as caught:
                        use()
                    assert caught.value.transient
                for use in (card.port.close, lost.check, lost.close, lan.check):
                    use()  # nobody needs it any more
            a, b = Card(lan, "a"), Card(lan, "b")
            with a.socket, b.socket:
                a.send(ALL, b"x")
                assert b.take() == [b"x"]

    def test_one_that_does_not_answer_is_ended(self, launcher):
        with Switch(launcher) as switch:
            lost = switch.network("lan")
            program = lost._program
            os.kill(program.process.pid, signal.SIGSTOP)
            program.control.settimeout(0.01)
            with pytest.raises(LaunchError, match="switch of this run is gone"):
                lost.statistics()
            os.kill(program.process.pid, signal.SIGCONT)
            assert program.process.wait(SECONDS) == 0, program.process.stderr_tail
            switch.network("lan")

    @pytest.mark.parametrize("victim", ["owner", "launcher"])
    def test_dies_with_its_owner_and_the_launcher(self, tmp_path, victim):
        code = f"""
            import os
            from pathlib import Path
            from pytest_vmsandbox.machine.process import Launcher
            from pytest_vmsandbox.machine.switch.switch import Switch
            with Launcher(Path({str(tmp_path / "run")!r})) as launcher, Switch(launcher) as switch:
                network = switch.network("lan")
                print(launcher._process.pid, network._program.process.pid, flush=True)
                input()
        """
        argv = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
            launcher, program = map(int, owner.stdout.readline().split())
            fd = os.pidfd_open(program)
            os.kill(owner.pid if victim == "owner" else launcher, signal.SIGKILL)
            assert select.select([fd], [], [], SECONDS)[0]  # it has ended
            os.close(fd)
            owner.kill()
