"""Tries the states that power cuts can leave, and makes the broken ones small."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pytest_vmsandbox.core.deadline import monotonic
from pytest_vmsandbox.guests.crash.conversation import NO_END, Looks, Verdict
from pytest_vmsandbox.guests.crash.report import (
    CrashFailure,
    CrashPointError,
    CrashReport,
    writes_of,
)
from pytest_vmsandbox.guests.crash.states import History, State

_KINDS = 5  # that are made small and shown; more are mostly one cause in several words
_ENDLESS = 5  # states on which the check does not end, after which the search does: each takes all its time
_ENDLESS_TRIES = 3  # to make one of them smaller


@dataclass
class _Kind:
    """States that break in one way: how many, the first of them, and what was said of it."""

    count: int
    state: State
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search for states that break a promise.

    Args:
        disk: the name of the disk.
        bench: shows a state to the check.
        chosen: the states to try. They come when they are needed.
        tries: states that are tried at most to make one of them smaller.
    """

    disk: str
    history: History
    bench: Looks
    chosen: Iterable[State]
    tries: int

    def run(self) -> CrashReport:
        """Try all states.

        Raises:
            CrashPointError: the check also fails if nothing is lost, or is not steady.
        """
        began = monotonic()
        self._check_without_power_cut()
        tried = 0
        kinds: dict[str, _Kind] = {}
        for state in self.chosen:
            tried += 1
            verdict = self._verdict(state)
            if not verdict.is_broken:
                continue
            if verdict.kind in kinds:
                kinds[verdict.kind].count += 1
            else:
                kinds[verdict.kind] = _Kind(1, state, verdict)
            if verdict.kind == NO_END and kinds[NO_END].count == _ENDLESS:
                break
        found = sorted(kinds.values(), key=lambda kind: -kind.count)
        return CrashReport(
            disk=self.disk,
            requests=len(self.history.entries),
            states=tried,
            broken=sum(kind.count for kind in found),
            failures=tuple(self._failure(kind) for kind in found[:_KINDS]),
            seconds=monotonic() - began,
        )

    def _verdict(self, state: State) -> Verdict:
        return self.bench.verdict(state, self.history.acknowledged(state))

    def _check_without_power_cut(self) -> None:
        """Check the disk before the recording and after it: without a power cut, nothing is broken."""
        last = State(len(self.history.entries))
        for state, acknowledged, when in (
            # What was promised before the first write is left out: it was not promised before the recording.
            (State(0), [], "as it was before the recording"),
            (last, self.history.acknowledged(last), "with all writes"),
        ):
            verdict = self.bench.verdict(state, acknowledged)
            if verdict.is_broken:
                raise CrashPointError(
                    f"the check fails for the disk {when}: {verdict.kind}. No power cut is to blame",
                    details=verdict.reason,
                    remedy="mend the check or the workload. The disk must be formatted before the recording, and "
                    "the check must accept it as it was then, with nothing acknowledged",
                )

    def _failure(self, kind: _Kind) -> CrashFailure:
        """The smallest state of a kind.

        Raises:
            CrashPointError: the check says something else of the same state now.
        """
        again = self._verdict(kind.state)
        if again.kind != kind.verdict.kind:
            raise CrashPointError(
                f"the check is not steady: of the state {kind.state.name}, it first said {kind.verdict.kind!r}, then "
                f"{again.kind or 'ok'!r}",
                details=kind.verdict.reason,
                remedy="let the verdict depend on nothing but the disk and what was acknowledged: no timeouts, no "
                "random numbers",
            )
        tries = min(self.tries, _ENDLESS_TRIES) if again.kind == NO_END else self.tries
        state, verdict = smallest(self.history, kind.state, kind.verdict, self._verdict, tries)
        return CrashFailure(
            kind=verdict.kind,
            count=kind.count,
            state=state.name,
            reason=verdict.reason,
            acknowledged=tuple(self.history.acknowledged(state)),
            writes=writes_of(self.history, state),
            image=None,
        )


def smallest(
    history: History, state: State, verdict: Verdict, look: Callable[[State], Verdict], tries: int
) -> tuple[State, Verdict]:
    """A smaller state that breaks in the same way, and what is said of it.

    Args:
        look: tells what is said of a state.
        tries: how many states are looked at.
    """
    known: set[State] = {state}
    left = tries
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for candidate in history.smaller(state):
            if candidate in known:
                continue
            if not left:
                return state, verdict
            left -= 1
            known.add(candidate)
            said = look(candidate)
            if said.kind == verdict.kind:
                state, verdict, is_smaller = candidate, said, True
                break
    return state, verdict
