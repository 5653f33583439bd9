"""Which states a power cut can leave: compared with all of them, on small logs."""

import itertools
import os
import random
import struct
import tempfile
import tracemalloc
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.core.errors import CacheError, CommandResult, ConfigError, MonitorError
from pytest_vmsandbox.guests.crash import exploring, recording
from pytest_vmsandbox.guests.crash.building import Builder
from pytest_vmsandbox.guests.crash.exploring import Exploration, spread
from pytest_vmsandbox.guests.crash.log import SECTOR, Entry, Log
from pytest_vmsandbox.guests.crash.states import History, Mark, State, pieces

SECTORS = 16  # of the small disks here
TEAR = 1024
SEEDS = range(12)


def some_history(seed, *, length=10, plain=False):
    """A random recording of a small disk. plain: only writes and flushes."""
    chance, entries = random.Random(seed), []
    for number in range(length):
        kind: Any = chance.choices(["write", "flush", "discard"], [6, 2, 0 if plain else 1])[0]
        if kind == "flush":
            entries.append(Entry(number, "flush"))
            continue
        first = chance.randrange(SECTORS)
        size = chance.randint(1, min(5, SECTORS - first))
        place = None if kind == "discard" else 1000 * (number + 1)
        durable = kind == "write" and not plain and chance.random() < 0.1
        entries.append(Entry(number, kind, first * SECTOR, size * SECTOR, place, durable))
    marks = [Mark(at, f"promise {at}") for at in sorted(chance.sample(range(length + 1), 3))]
    return History(entries, marks)


def applied(disk, offset, length, data):
    """A disk, as a tuple of what each sector has, with one extent written: sectors of the log, or 0."""
    new = list(disk)
    for sector in range(length // SECTOR):
        new[offset // SECTOR + sector] = 0 if data is None else data + sector * SECTOR
    return tuple(new)


def content(history, state):
    disk = ("base",) * SECTORS
    for entry in history.entries[: history.floor(state.point)]:
        disk = applied(disk, entry.offset, entry.length, entry.data)
    for extent in history.extents(state):
        disk = applied(disk, extent.offset, extent.length, extent.data)
    return disk


def all_contents(history, *, tear):
    """Every content that any power cut leaves, computed in the plainest way. tear=None: nothing is torn."""
    found = set()
    for point in range(len(history.entries) + 1):
        flushes = [it.number for it in history.entries[:point] if it.kind == "flush"]
        disks = {("base",) * SECTORS}
        for entry in history.entries[:point]:
            certain = bool(flushes) and entry.number < flushes[-1]
            parts = [(0, entry.length)]
            if tear and entry.kind == "write":
                parts = [(a - entry.offset, b - entry.offset) for a, b in pieces(entry, tear)]
            for start, end in parts if entry.kind != "flush" else []:
                data = None if entry.data is None else entry.data + start
                with_it = {applied(disk, entry.offset + start, end - start, data) for disk in disks}
                disks = with_it if certain or entry.is_durable else disks | with_it
        found |= disks
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_only_possible_states_are_explored_and_each_content_once(seed):
    history = some_history(seed)
    possible = all_contents(history, tear=TEAR)
    seen = set()
    for state in Exploration(history, seed=seed, count=300, tear=TEAR):
        history.check(state)
        found = content(history, state)
        assert found in possible
        key = (found, history.promises(state))
        if all(it.kind != "discard" for it in history.entries):
            assert key not in seen
        seen.add(key)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_contents_without_tearing_are_found_in_a_small_recording(seed):
    history = some_history(seed, length=8)
    large = 16 * SECTOR  # nothing tears
    found = {content(history, it) for it in Exploration(history, seed=1, count=5000, tear=large)}
    assert found == all_contents(history, tear=None)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_content_is_left_out_if_writes_are_large(seed, monkeypatch):
    monkeypatch.setattr(exploring, "_LARGE", 0)
    history = some_history(seed, length=8)
    large = 16 * SECTOR  # nothing tears
    found = {content(history, it) for it in Exploration(history, seed=1, count=5000, tear=large)}
    monkeypatch.setattr(exploring, "_LARGE", 1)
    torn = [content(history, it) for it in Exploration(history, seed=1, count=300, tear=TEAR)]
    assert found == all_contents(history, tear=None)
    assert set(torn) <= all_contents(history, tear=TEAR)


def test_huge_writes_take_little_memory():
    half = 2 << 30
    history = History([Entry(0, "write", 512, half, 512), Entry(1, "write", half, half, half)])
    tracemalloc.start()
    try:
        found = list(Exploration(history, seed=1, count=60))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 << 20
    assert len(found) == 60
    for state in found:
        history.check(state)
        assert State.parse(state.name) == state
        assert len(state.name) < 150


def test_pieces_of_a_huge_write_are_larger():
    whole = pieces(Entry(0, "write", 512, 4 << 20, 512), 4096)
    assert len(whole) == 1025
    assert whole[:2] == [(512, 4096), (4096, 8192)]
    huge = pieces(Entry(0, "write", 512, 2 << 30, 512), 4096)
    assert huge[:2] == [(512, 2 << 20), (2 << 20, 4 << 20)]
    assert huge[-1] == (2 << 30, (2 << 30) + 512)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_order_of_pending_writes_is_a_state(seed):
    history = some_history(seed, length=6, plain=True)
    point = len(history.entries)
    pending = history.pending(point)
    base = content(history, State(point, frozenset(it.number for it in pending)))
    possible = all_contents(history, tear=SECTOR)
    for order in itertools.permutations(pending):
        disk = base
        for entry in order:
            disk = applied(disk, entry.offset, entry.length, entry.data)
        assert disk in possible


@pytest.mark.parametrize("seed", SEEDS)
def test_exploring_is_deterministic_and_bounded(seed):
    history = some_history(seed, length=40)

    def names(of):
        return [it.name for it in Exploration(history, seed=of, count=60, tear=TEAR)]

    assert names(1) == names(1)
    assert len(names(1)) == 60
    assert names(1) != names(2)
    assert names(1)[:10] == names(2)[:10]  # the telling ones do not depend on chance


def transactions(number, early=()):
    """A program that writes twice, flushes, and promises; too early in some of its transactions."""
    entries: list[Entry] = []
    marks = []
    for it in range(number):
        entries += [Entry(3 * it + at, "write", 8192 * at, 4096, 4096) for at in range(2)]
        entries.append(Entry(3 * it + 2, "flush"))
        marks.append(Mark(3 * it + (2 if it in early else 3), it))
    return History(entries, marks)


def test_a_promise_before_its_flush_is_tried_first():
    history = transactions(1700, early={1234})
    lost = State(3 * 1234 + 2, frozenset({3 * 1234, 3 * 1234 + 1}))
    assert lost in set(Exploration(history, seed=1, count=600))


def test_boundaries_that_are_left_out_are_counted():
    history = transactions(100)
    few, many = (Exploration(history, seed=1, count=count) for count in (60, 6 * 201))
    assert (
        few.boundaries == 201
    )  # 100 flushes, as many promises, and the begin; the last one is the end
    assert len(list(few)) == 60
    assert 150 < few.untried < 201
    assert len(list(many)) > 200
    assert many.untried == 0


def test_few_states_are_spread_over_the_whole_recording():
    history = some_history(3, length=400)
    points = [it.point for it in Exploration(history, seed=1, count=40)]
    assert all(any(low <= point <= low + 100 for point in points) for low in (0, 100, 200, 300))


@pytest.mark.parametrize("seed", SEEDS)
def test_names_make_the_same_state_again(seed):
    history = some_history(seed, length=30)
    for state in Exploration(history, seed=seed, count=200, tear=TEAR):
        assert State.parse(state.name) == state
        assert str(state) == state.name


def test_names():
    assert State(41).name == "41"
    assert State(41, frozenset({38, 40})).name == "41-38-40"
    torn = frozenset({(40, 2), (40, 5), (40, 6), (40, 7)})
    assert State(41, frozenset({38}), torn).name == "41-38-40.2.5~7"
    assert State(41, torn=frozenset({(40, 2)}), tear=512).name == "41-40.2@512"
    assert State(41, tear=512) == State(41)


@pytest.mark.parametrize(
    "name",
    [
        "", "x", "41-", "-3", "41-40.", "41-40-38", "41-38-38", "041", "41-40.2.3", "41-40.3~2", "41@512",
        "41-40.2@4096", "41-40.2@100", "41-40.2@0", "41 ", "٤١", 41,
        "41-40.0~9999999999", "41-40.0~1026", "41-40.9999999999", "9" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_name(name):
    with pytest.raises(ConfigError, match="is no name of a state"):
        State.parse(name)


@pytest.mark.parametrize("name", ["5", "4-0", "4-1", "4-9", "4-2.9", "4-2.0~1", "3-3", "4-3.0"])
def test_a_state_of_another_recording(name):
    entries = [
        Entry(0, "write", 0, SECTOR, 1000),
        Entry(1, "flush"),
        Entry(2, "write", 0, 8192, 3000),
        Entry(3, "discard", 0, 8192),
    ]
    with pytest.raises(ConfigError, match="no power cut in this recording"):
        History(entries).check(State.parse(name))


@pytest.mark.parametrize("seed", SEEDS)
def test_smaller_states_are_possible_and_come_to_an_end(seed):
    history, chance = some_history(seed, length=30), random.Random(seed)
    for state in itertools.islice(Exploration(history, seed=seed, count=200, tear=TEAR), 100, 200):
        now = state
        for _ in range(200):
            smaller = list(history.smaller(now))
            for it in smaller:
                history.check(it)
            if not smaller:
                break
            now = chance.choice(smaller)
        assert now == State(0)


def test_what_was_promised():
    history = History(
        [Entry(0, "flush"), Entry(1, "flush")], [Mark(1, "a"), Mark(1, "b"), Mark(2, 3)]
    )
    found = [history.acknowledged(State(point)) for point in range(3)]
    assert found == [[], ["a", "b"], ["a", "b", 3]]


def test_spread_has_all_items_once():
    for length in range(40):
        assert sorted(spread(range(length))) == list(range(length))
    assert list(spread(range(8))) == [0, 4, 2, 6, 1, 5, 3, 7]


# -- the content ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_gets_the_content_of_one_state_after_the_other(seed, tmp_path):
    history = some_history(seed, length=30)
    chance = random.Random(seed)
    data = chance.randbytes(1000 * 40)
    before = chance.randbytes(4 * SECTOR) + bytes((SECTORS - 4) * SECTOR)

    def expected(state):
        parts = []
        for number, sector in enumerate(content(history, state)):
            if sector == "base":
                parts.append(before[number * SECTOR : (number + 1) * SECTOR])
            else:
                parts.append(data[sector : sector + SECTOR] if sector else bytes(SECTOR))
        return b"".join(parts)

    with ExitStack() as stack:
        base, log = (stack.enter_context(tempfile.TemporaryFile(buffering=0)) for _ in range(2))
        base.write(before[: 4 * SECTOR])
        base.truncate(len(before))
        log.write(data)
        with Builder(base, log, history, tmp_path) as builder:
            assert builder.size == len(before)
            for number, state in enumerate(Exploration(history, seed=seed, count=150, tear=TEAR)):
                with builder.state(state):
                    assert os.pread(base.fileno(), len(before) + 1, 0) == expected(state)
                if number % 50 == 0:
                    builder.write(state, tmp_path / state.name)
                    assert (tmp_path / state.name).read_bytes() == expected(state)
            with pytest.raises(ConfigError), builder.state(State(99)):
                pass
        assert os.pread(base.fileno(), len(before) + 1, 0) == before


def test_a_file_stays_sparse(tmp_path):
    size = 1 << 30
    history = History([Entry(0, "write", 4096, 8192, 512), Entry(1, "discard", 0, size)])
    with ExitStack() as stack:
        base, log = (stack.enter_context(tempfile.TemporaryFile(buffering=0)) for _ in range(2))
        base.truncate(size)
        log.write(b"x" * 16384)
        with Builder(base, log, history, tmp_path) as builder:
            for point in (2, 1, 2):
                with builder.state(State(point)):
                    assert os.fstat(base.fileno()).st_blocks * SECTOR < 1 << 20
            builder.write(State(1), tmp_path / "disk.raw")
        assert (tmp_path / "disk.raw").stat().st_blocks * SECTOR < 1 << 20
        assert os.fstat(base.fileno()).st_blocks * SECTOR < 1 << 20


def test_zeros_in_the_log_become_holes(tmp_path):
    history = History([Entry(0, "write", 0, 64 << 20, 4096)])
    with ExitStack() as stack:
        base, log = (stack.enter_context(tempfile.TemporaryFile(buffering=0)) for _ in range(2))
        base.write(b"old" * 4096)
        base.truncate(64 << 20)
        log.truncate(4096 + (64 << 20))
        log.seek(4096 + 8192)
        log.write(b"new" * 4096)
        with Builder(base, log, history, tmp_path) as builder, builder.state(State(1)):
            assert os.fstat(base.fileno()).st_blocks * SECTOR < 1 << 20
            new = bytes(8192) + b"new" * 4096
            assert os.pread(base.fileno(), 24576, 0) == new.ljust(24576, b"\0")


# -- the log ---------------------------------------------------------------------------------------


def header(sector, count, flags=0):
    return struct.pack("<QQQQ", sector, count, flags, 0).ljust(SECTOR, b"\0")


SUPER = struct.pack("<QQQL", 0x6A736677736872, 1, 2, SECTOR).ljust(SECTOR, b"\0")


@pytest.fixture
def file():
    with tempfile.TemporaryFile(buffering=0) as file:
        yield file


def test_a_log_is_read_while_it_grows(file):
    log = Log(file, 1 << 20)
    assert log.read()
    file.write(SUPER + header(8, 2) + bytes(1024) + header(0, 0, 1))
    assert log.read()
    file.write(header(0, 4, 4) + header(1, 1, 2) + bytes(SECTOR))
    assert log.finish() == [
        Entry(0, "write", 4096, 1024, 1024),
        Entry(1, "flush"),
        Entry(2, "discard", 0, 2048),
        Entry(3, "write", 512, 512, 3584, is_durable=True),
    ]


def test_a_header_that_is_still_being_written(file):
    file.write(SUPER + header(8, 1) + bytes(SECTOR) + bytes(SECTOR) + header(0, 0, 1))
    log = Log(file, 1 << 20)
    assert not log.read()
    assert len(log.entries) == 1
    with pytest.raises(MonitorError, match=r"its end is missing \(1 entries are whole\)"):
        log.finish()
    file.seek(3 * SECTOR)
    file.write(header(0, 0, 1))
    assert len(log.finish()) == 3


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (SUPER + header(8, 2) + bytes(SECTOR), "its end is missing"),
        (SUPER + header(8, 2)[:20], "its end is missing"),
        (SUPER + header(1 << 40, 1) + bytes(SECTOR), "no request at byte 512"),
        (SUPER + header(0, 0, 1) + header(0, 0, 16), "no request at byte 1024"),
        (b"x" * SECTOR + header(0, 0, 1), "it does not begin as one"),
    ],
)
def test_a_damaged_log(file, content, why):
    file.write(content)
    with pytest.raises(MonitorError, match=why):
        Log(file, 1 << 20).finish()


def test_nothing_was_written(file):
    assert Log(file, 1 << 20).finish() == []


# -- recording -------------------------------------------------------------------------------------


def test_a_disk_that_the_guest_does_not_flush():
    engine: Any = SimpleNamespace(name="tiny-1")

    def answers(text):
        engine.run = lambda command: CommandResult(
            argv=command.argv, returncode=0, stdout=text, stderr=b"", duration=0.0
        )
        return recording._refuse_write_through(engine, "disk0")

    assert answers(b"") is answers(b"/dev/vda\n") is None
    with pytest.raises(ConfigError, match="takes 'disk0' for a disk without a cache") as caught:
        answers(b"/dev/vda\n/sys/block/vda/cache_type\n/sys/block/vda/queue/write_cache\n")
    assert "tee /sys/block/vda/cache_type /sys/block/vda/queue" in caught.value.remedy


def test_a_disk_that_is_too_large_for_a_file(file):
    with pytest.raises(CacheError, match="could not copy a disk"):
        recording.flatten(recording.Content(1 << 62, None, ()), file)
