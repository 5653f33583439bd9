"""Which states a power cut can leave on a disk: pure computation on the entries of a log.

A disk may keep what it was given in a cache of its own until it is told to flush. A power cut at one
*point* leaves all that was written before the last completed flush. Of what came after that, each write may be
there or not, whatever the order, and the larger ones in part.

The states of a recording are described by `State`, which has a short name. `History` knows which states
there are.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.crash.log import SECTOR, Entry

TEAR = 4096  # bytes: what a disk writes as a whole. Below that, ext4's own super block tears
_MOST_PIECES = (
    1024  # of one write, as large as Linux makes it: 4 MiB. Those of larger ones are larger
)
_NUMBER = r"\d{1,18}"
_PART = rf"-{_NUMBER}(?:\.{_NUMBER}(?:~{_NUMBER})?)*"
_NAME = re.compile(rf"({_NUMBER})((?:{_PART})*)(?:@({_NUMBER}))?", re.ASCII)


@dataclass(frozen=True)
class Mark:
    """Something that the program under test has promised.

    Attributes:
        position: how many entries there were at that moment.
        value: what it has promised, a JSON value.
    """

    position: int
    value: object


@dataclass(frozen=True)
class State:
    """What one power cut leaves on the disk.

    A write is torn along the multiples of `tear` on the disk, a large one along multiples of more: see
    `step`. Its pieces have numbers from 0 on.

    Attributes:
        point: how many entries there were before the power cut.
        lost: the numbers of those that are not on the disk at all.
        torn: number of an entry and of a piece of it that is not on the disk.
        tear: bytes that are written as a whole, a multiple of 512.
    """

    point: int
    lost: frozenset[int] = frozenset()
    torn: frozenset[tuple[int, int]] = frozenset()
    tear: int = TEAR

    def __post_init__(self) -> None:
        if not self.torn:
            object.__setattr__(self, "tear", TEAR)  # it means nothing then

    @property
    def name(self) -> str:
        """A short name, from which `parse` makes the state again.

        Examples: ``41`` has all of the first 41 entries. ``41-38`` has them without entry 38, and
        ``41-40.2.5~7`` without the pieces 2, 5, 6 and 7 of entry 40. ``41-40.2@512`` was torn at 512 bytes,
        not at 4096.
        """
        pieces: defaultdict[int, list[int]] = defaultdict(list)
        for number, piece in self.torn:
            pieces[number].append(piece)
        changed = [
            "".join([str(number), *map(_range, runs(sorted(pieces[number])))])
            for number in sorted({*self.lost, *pieces})
        ]
        return "-".join([str(self.point), *changed]) + (
            "" if self.tear == TEAR else f"@{self.tear}"
        )

    @classmethod
    def parse(cls, name: object) -> State:
        """The state with a name.

        Raises:
            ConfigError: this is no name of a state.
        """
        if not isinstance(name, str) or (match := _NAME.fullmatch(name)) is None:
            raise _no_state(name)
        lost, torn = set(), set()
        for part in match[2].split("-")[1:]:
            number, *ranges = part.split(".")
            if not ranges:
                lost.add(int(number))
            for text in ranges:
                first, _, end = text.partition("~")
                last = min(int(end or first), _MOST_PIECES + 1)  # no write has so many
                torn |= {(int(number), it) for it in range(int(first), last + 1)}
        tear = int(match[3] or TEAR)
        state = cls(int(match[1]), frozenset(lost), frozenset(torn), tear)
        if state.name != name or tear <= 0 or tear % SECTOR:  # each state has one name
            raise _no_state(name)
        return state

    def __str__(self) -> str:
        return self.name


def _no_state(name: object) -> ConfigError:
    return ConfigError(
        f"{name!r} is no name of a state",
        remedy="use a name from a report of crash points, such as '41' or '41-38-40.2'",
    )


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as first and last of each run."""
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], found[-1]


def _range(run: tuple[int, int]) -> str:
    first, last = run
    return f".{first}" if first == last else f".{first}~{last}"


@dataclass(frozen=True)
class Extent:
    """A part of the disk that is written.

    Attributes:
        offset, length: bytes of the disk.
        data: where its content is in the log file, in bytes; None for zeros.
    """

    offset: int
    length: int
    data: int | None


class History:
    """All that was written to a disk, and what was promised meanwhile.

    Args:
        entries: of the log.
        marks: what was promised, in the order of time.
    """

    def __init__(self, entries: Sequence[Entry], marks: Sequence[Mark] = ()) -> None:
        self.entries, self.marks = entries, marks
        self.flushes = [entry.number for entry in entries if entry.kind == "flush"]
        self._positions = [mark.position for mark in marks]

    def floor(self, point: int) -> int:
        """How many of the entries before a point are on the disk for good, because of a flush."""
        before = bisect_left(self.flushes, point)
        return self.flushes[before - 1] if before else 0

    def end(self, number: int) -> int:
        """The last point at which an entry may still be lost: the next flush, or the end."""
        after = bisect_left(self.flushes, number)
        return self.flushes[after] if after < len(self.flushes) else len(self.entries)

    def pending(self, point: int) -> list[Entry]:
        """The entries before a point that a power cut may lose."""
        since = self.entries[self.floor(point) : point]
        return [entry for entry in since if entry.kind != "flush" and not entry.is_durable]

    def acknowledged(self, state: State) -> list[object]:
        """What had been promised before the power cut, in the order of time."""
        return [mark.value for mark in self.marks[: self.promises(state)]]

    def promises(self, state: State) -> int:
        """How many promises there were before the power cut."""
        return bisect_right(self._positions, state.point)

    def check(self, state: State) -> None:
        """Check that a power cut can leave this state.

        Raises:
            ConfigError: it cannot, so it belongs to another recording.
        """
        pending = {entry.number: entry for entry in self.pending(state.point)}
        torn: defaultdict[int, set[int]] = defaultdict(set)
        for number, piece in state.torn:
            torn[number].add(piece)
        if (
            state.point > len(self.entries)
            or not {*state.lost, *torn} <= pending.keys()
            or any(_is_impossible(pending[it], lost, state.tear) for it, lost in torn.items())
        ):
            raise ConfigError(
                f"no power cut in this recording leaves the state {state.name!r}",
                remedy="use a name from a report of this recording. Another run may have other numbers",
            )

    def extents(self, state: State) -> Iterator[Extent]:
        """What is written on top of the durable entries, in this order. The state must be possible."""
        torn: defaultdict[int, set[int]] = defaultdict(set)
        for number, piece in state.torn:
            torn[number].add(piece)
        for entry in self.entries[self.floor(state.point) : state.point]:
            if entry.kind == "flush" or entry.number in state.lost:
                continue
            if entry.number not in torn:
                yield Extent(entry.offset, entry.length, entry.data)
                continue
            assert entry.data is not None  # only writes are torn
            for piece, (start, end) in enumerate(pieces(entry, state.tear)):
                if piece not in torn[entry.number]:
                    yield Extent(start, end - start, entry.data + start - entry.offset)

    def smaller(self, state: State) -> Iterator[State]:
        """States that are simpler: less is torn, less is lost, or the power cut is earlier.

        The boldest come first. Who takes one of them again and again comes to an end.
        """
        torn = sorted({number for number, _ in state.torn})
        for numbers in _halves(torn):
            rest = frozenset(it for it in state.torn if it[0] not in numbers)
            yield State(state.point, state.lost, rest, state.tear)
            yield State(state.point, state.lost | numbers, rest, state.tear)
        for numbers in _halves(sorted(state.lost)):
            yield State(state.point, state.lost - numbers, state.torn, state.tear)
        for point in self._earlier(state.point):
            since = self.floor(point)
            yield State(
                point,
                frozenset(it for it in state.lost if since <= it < point),
                frozenset(it for it in state.torn if since <= it[0] < point),
                state.tear,
            )

    def _earlier(self, point: int) -> list[int]:
        """Earlier points, the earliest first."""
        flushes = self.flushes[: bisect_left(self.flushes, point)]
        bold = {it for half in (2, 4, 8) for it in flushes[-len(flushes) // half :][:1]}
        near = {point - (1 << step) for step in range(point.bit_length())}
        return sorted(it for it in bold | near | set(flushes[-3:]) if 0 <= it < point)


def step(entry: Entry, tear: int) -> int:
    """Bytes of a piece of a write: `tear`, or so many times more that there are not too many of them."""
    size = tear
    while entry.length > size * _MOST_PIECES:
        size *= 2
    return size


def pieces(entry: Entry, tear: int) -> list[tuple[int, int]]:
    """The pieces of a write, as first byte and the byte after the last one."""
    size = step(entry, tear)
    cuts = range(entry.offset // size * size + size, entry.end, size)
    return list(itertools.pairwise([entry.offset, *cuts, entry.end]))


def _is_impossible(entry: Entry, lost: set[int], tear: int) -> bool:
    """Whether an entry cannot have lost these pieces, or has lost all of them."""
    return entry.kind != "write" or not lost < set(range(len(pieces(entry, tear))))


def _halves(numbers: Sequence[int]) -> Iterator[frozenset[int]]:
    """All numbers, then halves of them, and so on down to each."""
    size = len(numbers)
    while size:
        for start in range(0, len(numbers), size):
            yield frozenset(numbers[start : start + size])
        size = 0 if size == 1 else -(-size // 2)
