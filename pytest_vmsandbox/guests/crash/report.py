"""What a search through crash points has found, for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.guests.crash.states import History, State, pieces, runs, step

_MANY = 12  # writes that are shown around those that are lost
_REASON_LINES = 12
_LONG = 300  # characters of what was acknowledged


@dataclass(frozen=True, kw_only=True)
class CrashFailure:
    """One way in which states break the promise.

    Attributes:
        kind: why, in a line without numbers.
        count: how many of the states broke in this way.
        state: the name of the smallest one that was found.
        reason: what the checker said of it.
        acknowledged: what had been acknowledged before that power cut.
        writes: what the disk got since the last flush, one line for each request.
        image: a raw file with that state, or None.
    """

    kind: str
    count: int
    state: str
    reason: str
    acknowledged: tuple[object, ...]
    writes: tuple[str, ...]
    image: Path | None

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.count} broke: {self.kind}"
        yield f"  smallest state: {self.state}"
        yield f"  acknowledged before the power cut: {_shortened(json.dumps(self.acknowledged))}"
        yield "  requests since the last flush (number, bytes, what the power cut left of it):"
        yield from (f"    {line}" for line in self.writes or ("none",))
        yield "  the checker says:"
        lines = self.reason.strip().splitlines() or ["nothing"]
        yield from (f"    {line}" for line in lines[:_REASON_LINES])
        if len(lines) > _REASON_LINES:
            yield f"    … {len(lines) - _REASON_LINES} more lines"
        yield f'  look into it: with cuts.state("{self.state}") as folder: …'
        if self.image is not None:
            yield f"  its disk is in the artifacts of this guest, for vm.attach_disk(): {self.image.name}"


@dataclass(frozen=True, kw_only=True)
class CrashReport:
    """The result of `CrashPoints.check`.

    Attributes:
        disk: the name of the disk.
        requests: how many requests of the guest were recorded: writes, discards and flushes.
        states: how many states were tried.
        broken: how many of them broke the promise.
        failures: the ways in which they did, the most frequent one first.
        seconds: how long the search took.
        boundaries: how many points there are at which the disk was told to flush or a promise was made.
        untried: how many of them were left out, because there were not enough states.
    """

    disk: str
    requests: int
    states: int
    broken: int
    failures: tuple[CrashFailure, ...]
    seconds: float
    boundaries: int = 0
    untried: int = 0

    def __str__(self) -> str:
        lines = [self.brief]
        for failure in self.failures:
            lines += ["", str(failure)]
        return "\n".join(lines)

    @property
    def brief(self) -> str:
        """One line."""
        return (
            f"{self.broken} of {self.states} states that a power cut can leave on {self.disk} break the promise "
            f"({self.requests} requests, {self.seconds:.0f} s)"
        )


def untried_text(report: CrashReport) -> str:
    """What a check that nothing has broken says if it has left something out."""
    return (
        f"{report.untried} of {report.boundaries} flushes and promises on {report.disk} were not tried: pass "
        f"states={6 * report.boundaries} to check() for all, or states={report.states} for no warning"
    )


class CrashPointError(VMSandboxError, AssertionError):
    """A power cut can break what was promised. This is the fault of the program under test.

    Attributes:
        report: the `CrashReport`; None if the check fails without any power cut.
    """

    def __init__(
        self, brief: str, *, details: str = "", remedy: str = "", report: CrashReport | None = None
    ) -> None:
        super().__init__(brief, details=details, remedy=remedy)
        self.report = report


CrashPointError.__module__ = "pytest_vmsandbox"  # pytest's short summary shows it


def writes_of(history: History, state: State) -> tuple[str, ...]:
    """The requests since the last flush before a power cut, a line for each."""
    torn: dict[int, set[int]] = {}
    for number, piece in state.torn:
        torn.setdefault(number, set()).add(piece)
    entries = history.entries[history.floor(state.point) : state.point]
    lines, special = [], []
    for index, entry in enumerate(entries):
        if entry.kind == "flush":
            lines.append(f"{entry.number} flush")
            continue
        fate = "kept"
        if entry.number in state.lost:
            fate = "LOST"
        elif entry.number in torn:
            gone = pieces_in_words(torn[entry.number])
            fate = (
                f"torn, without {gone} of {len(pieces(entry, state.tear))} pieces "
                f"of {step(entry, state.tear)} bytes"
            )
        elif entry.is_durable:
            fate = "kept, FUA"
        if fate.startswith(("LOST", "torn")):
            special.append(index)
        lines.append(
            f"{entry.number} {entry.kind} at {entry.offset}, {format_size(entry.length)}: {fate}"
        )
    return tuple(_around(lines, special))


def pieces_in_words(numbers: set[int]) -> str:
    """Numbers of pieces, as in ``0, 2, 5 to 9``."""
    found = runs(sorted(numbers))
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in found)


def _around(lines: Sequence[str], special: Sequence[int]) -> Iterator[str]:
    """All lines if they are few, else those that matter and their neighbours."""
    if len(lines) <= 2 * _MANY:
        yield from lines
        return
    shown = {near for index in special[:_MANY] for near in (index - 1, index, index + 1)}
    shown |= {len(lines) - 2, len(lines) - 1}
    hidden = 0
    for index, line in enumerate(lines):
        if index in shown:
            if hidden:
                yield f"… {hidden} more"
            hidden = 0
            yield line
        else:
            hidden += 1
    if hidden:
        yield f"… {hidden} more"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONG else f"[…{text[-_LONG:]}"
