"""In which order the states of a recording are tried.

The telling ones come first: the flushes and the promises, then each prefix, one write that is lost, one
that is there alone, writes that are torn, all subsets of the writes between two flushes if these are few, and
random states. Each kind is spread over the whole recording, so all of it is covered if only a few states
can be tried. No two states have the same content.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import combinations, islice
from typing import TypeVar

from pytest_vmsandbox.guests.crash.log import SECTOR, Entry
from pytest_vmsandbox.guests.crash.states import TEAR, History, State, pieces

_BATCH = 50  # states
_FEW = 8  # writes, of which all subsets are tried
_LARGE = 64  # pieces: a write with more is one thing when contents are compared
_RUNS = 4  # of pieces that are there when a write is torn at random
_FRUITLESS = 200  # random states that were known already, after which there are hardly more
_T = TypeVar("_T")


class Exploration(Iterable[State]):
    """States that a power cut can leave, each with another content or other promises.

    The same arguments give the same states.

    Args:
        seed: of the random ones.
        count: how many there are at most.
        tear: bytes that the disk writes as a whole, a multiple of 512.

    Attributes:
        boundaries: how many points there are at which the disk was told to flush or something was promised,
            with the begin and the end.
        untried: at how many of them all and nothing of what was pending is not among the states. It is right
            when all states were taken.
    """

    def __init__(self, history: History, *, seed: int, count: int, tear: int = TEAR) -> None:
        self._history, self._seed, self._count, self._tear = history, seed, count, tear
        marks = {mark.position for mark in history.marks}
        self._points = sorted({0, len(history.entries), *history.flushes, *marks})
        # Who promises before a flush has most to lose.
        self._early = [it for it in sorted(marks) if history.pending(it)]
        self.boundaries = self.untried = len(self._points)

    def __iter__(self) -> Iterator[State]:
        history, tear = self._history, self._tear
        self.untried = self.boundaries
        fingerprint = _Fingerprints(history, tear).of
        known: set[tuple[int, int]] = set()

        def fresh(states: Iterator[State]) -> Iterator[State]:
            fruitless = 0
            for state in states:
                key = (fingerprint(state), history.promises(state))
                if key not in known:
                    known.add(key)
                    fruitless = 0
                    yield state
                elif (fruitless := fruitless + 1) >= _FRUITLESS and states is chance:
                    return

        chance = _random_ones(history, random.Random(f"{self._seed}"), tear)  # noqa: S311  # no secrets
        first = fresh(self._at_boundaries())
        chosen = _in_turn(
            first,
            fresh(State(point) for point in spread(range(len(history.entries) + 1))),
            fresh(_one_lost(history)),
            fresh(_one_alone(history)),
            fresh(_one_torn(history, tear)),
            fresh(_in_turn(*map(_subsets, _few_pending(history)))),
            fresh(chance),
        )
        telling = list(islice(first, -(-self._count // 2)))  # the rest is for other kinds
        yield from _batches(iter(telling))
        yield from _batches(islice(chosen, self._count - len(telling)))

    def _at_boundaries(self) -> Iterator[State]:
        """All and nothing of what was pending, when the disk was told to flush or something was promised."""
        for point in spread(self._early):
            yield State(point, _numbers(self._history.pending(point)))
        for point in spread(self._points):
            yield State(point, _numbers(self._history.pending(point)))
            self.untried -= 1
            yield State(point)


def _batches(states: Iterator[State]) -> Iterator[State]:
    """The same states. In each batch, the earlier points come first: such a sequence is cheap to build."""
    while batch := list(islice(states, _BATCH)):
        yield from sorted(batch, key=lambda state: state.point)


def spread(items: Sequence[_T]) -> Iterator[_T]:
    """All items once, so that the first ones are spread over all of them: first, middle, quarters."""
    if items:
        bits = (len(items) - 1).bit_length()
        for index in range(1 << bits):
            place = int(f"{index:0{bits}b}"[::-1], 2) if bits else 0
            if place < len(items):
                yield items[place]


def _in_turn(*streams: Iterator[State]) -> Iterator[State]:
    """One of each, again and again, until all have ended."""
    left = deque(streams)
    while left:
        stream = left.popleft()
        with suppress(StopIteration):
            yield next(stream)
            left.append(stream)


def _one_lost(history: History) -> Iterator[State]:
    for entry in spread(_volatile(history)):
        yield State(history.end(entry.number), frozenset({entry.number}))


def _one_alone(history: History) -> Iterator[State]:
    for entry in spread(_volatile(history)):
        point = history.end(entry.number)
        yield State(point, _numbers(history.pending(point)) - {entry.number})


def _one_torn(history: History, tear: int) -> Iterator[State]:
    """One write with its first half, its last half, its first and its last piece only."""
    for entry, number in spread(_large(history, tear)):
        for there in (range(number // 2), range(number // 2, number), {0}, {number - 1}):
            torn = {(entry.number, piece) for piece in range(number) if piece not in there}
            yield State(history.end(entry.number), torn=frozenset(torn), tear=tear)


def _few_pending(history: History) -> list[tuple[int, list[Entry]]]:
    """The ends of the stretches between flushes with few writes, and these writes."""
    ends = list(spread([*history.flushes, len(history.entries)]))
    found = ((end, history.pending(end)) for end in ends)
    return [(end, pending) for end, pending in found if len(pending) <= _FEW]


def _subsets(stretch: tuple[int, list[Entry]]) -> Iterator[State]:
    """All states at the end of a stretch, as long as nothing is torn."""
    end, pending = stretch
    numbers = [entry.number for entry in pending]
    for size in range(len(numbers) + 1):
        for lost in combinations(numbers, size):
            yield State(end, frozenset(lost))


def _random_ones(history: History, chance: random.Random, tear: int) -> Iterator[State]:
    """Some writes are lost, others torn. This does not end by itself."""
    volatile, large = _volatile(history), dict(_large(history, tear))
    while volatile:
        entry = chance.choice(volatile)
        end = history.end(entry.number)
        point = end if chance.random() < 0.5 else chance.randint(entry.number + 1, end)
        pending = history.pending(point)
        share = chance.choice((0.0, 0.1, 0.5, 0.9))
        lost = {it.number for it in pending if chance.random() < share}
        torn: set[tuple[int, int]] = set()
        for it in chance.sample(pending, min(len(pending), chance.randint(0, 3))):
            if number := large.get(it, 0):
                there = _some_pieces(number, chance)
                torn |= {(it.number, piece) for piece in set(range(number)) - there}
                lost.discard(it.number)
        yield State(point, frozenset(lost), frozenset(torn), tear)


def _some_pieces(number: int, chance: random.Random) -> set[int]:
    """Some pieces of a write, but not all, in few runs, so that the names of states are short."""
    if number <= 2 * _RUNS:
        return set(chance.sample(range(number), chance.randint(1, number - 1)))
    ends = sorted(chance.sample(range(number + 1), 2 * chance.randint(1, _RUNS)))
    found = set[int]().union(*map(range, ends[::2], ends[1::2]))
    return found if len(found) < number else found - {chance.randrange(number)}


def _numbers(entries: Sequence[Entry]) -> frozenset[int]:
    return frozenset(entry.number for entry in entries)


def _volatile(history: History) -> list[Entry]:
    """All entries that a power cut at some point may lose."""
    return [it for it in history.entries if it.kind != "flush" and not it.is_durable]


def _large(history: History, tear: int) -> list[tuple[Entry, int]]:
    """The writes that can be torn, and how many pieces each has."""
    found = (
        (entry, len(pieces(entry, tear))) for entry in _volatile(history) if entry.kind == "write"
    )
    return [(entry, number) for entry, number in found if number > 1]


_Versions = tuple[
    tuple[int, int], ...
]  # which entries show in a block, and in which of its sectors
_EMPTY: _Versions = ()
_Large = tuple[int, tuple[int, ...]]  # an entry, and the pieces that it has lost


class _Fingerprints:
    """Numbers for contents of the disk: equal only for equal contents, as far as entries can tell.

    The fingerprint of a disk is the exclusive or of those of its blocks, so only blocks that a state
    changes are computed. A discarded range counts as a block of its own, and so does a large write, with
    what it has lost.
    """

    def __init__(self, history: History, tear: int) -> None:
        self._history, self._tear = history, tear
        self._durable: dict[int, int] = {}  # by the number of durable entries
        self._before: dict[int, dict[int, _Versions]] = {}
        blocks: dict[int, _Versions] = {}
        whole, floor = 0, 0
        for end in (*history.flushes, len(history.entries)):
            self._durable[floor] = whole
            touched, ranges = self._changes(floor, State(end), blocks.get)
            self._before[floor] = {block: blocks.get(block, _EMPTY) for block in touched}
            whole ^= self._difference(self._before[floor], touched, ranges)
            blocks |= touched
            floor = end

    def of(self, state: State) -> int:
        """The fingerprint of a state."""
        floor = self._history.floor(state.point)
        before = self._before[floor]
        return self._durable[floor] ^ self._difference(
            before, *self._changes(floor, state, before.get)
        )

    def _changes(
        self, floor: int, state: State, before: Callable[[int, _Versions], _Versions]
    ) -> tuple[dict[int, _Versions], list[_Large]]:
        """What the entries after the durable ones change: blocks, and large ranges."""
        touched: dict[int, _Versions] = {}
        ranges: list[_Large] = []
        lost: defaultdict[int, list[int]] = defaultdict(list)
        for number, piece in sorted(state.torn):
            lost[number].append(piece)
        for entry in self._history.entries[floor : state.point]:
            if entry.kind == "flush" or entry.number in state.lost:
                continue
            if entry.kind == "discard" or entry.length > _LARGE * self._tear:
                ranges.append((entry.number, tuple(lost[entry.number])))
                continue
            first = entry.offset // self._tear
            for piece, (start, end) in enumerate(pieces(entry, self._tear)):
                if piece not in lost[entry.number]:
                    block = first + piece
                    base = block * self._tear
                    mask = (1 << (end - base) // SECTOR) - (1 << (start - base) // SECTOR)
                    older = touched.get(block) or before(block, _EMPTY)
                    shown = [(it, rest) for it, had in older if (rest := had & ~mask)]
                    touched[block] = (*shown, (entry.number, mask))
        return touched, ranges

    @staticmethod
    def _difference(
        before: dict[int, _Versions], after: dict[int, _Versions], ranges: Sequence[_Large]
    ) -> int:
        found = 0
        for block, versions in after.items():
            if (old := before[block]) != versions:
                found ^= _token(block, old) ^ _token(block, versions)
        for number, lost in ranges:
            found ^= _token(-1 - number, lost)
        return found


def _token(block: int, versions: object) -> int:
    """A random number for one block."""
    text = repr((block, versions)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
