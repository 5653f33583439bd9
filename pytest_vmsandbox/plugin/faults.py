"""Faults that are in force when a test fails are shown, and ended. None outlives the test that began it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pytest

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.core.text import one_line
from pytest_vmsandbox.plugin import alarms
from pytest_vmsandbox.plugin.keeping import belong_together

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.guests.running.ledger import Entry, Ledger


class Speaker(Protocol):
    """Prints lines for people."""

    def say(self, text: str) -> None:
        """Print a line now."""

    def tell(self, text: str) -> None:
        """Print a line at the end of the run."""

    def tell_problem(self, text: str) -> None:
        """Print a line likewise, and let the run fail."""


@dataclass(frozen=True)
class _Met:
    """A fault in a guest that has ended.

    Attributes:
        line: about the fault.
        error: what was raised while it was in force. The test may expect that. None if the guest has ended
            without an error, as it does before a fixture's failure is known.
    """

    line: str
    error: BaseException | None


class FaultsOfTests:
    """Shows and ends the faults of tests. It is registered as a plugin.

    A fault that a fixture of a wider scope began stays in force until that fixture ends it: other tests
    count on it. So does one that a hook for new guests began.

    Args:
        guests: returns the guests that run.
        speaker: prints lines.
    """

    def __init__(self, guests: Callable[[], Iterable[Guest]], speaker: Speaker) -> None:
        self._guests = guests
        self._speaker = speaker
        self._lasting: set[Entry] = set()  # those that outlive a test
        self._met: list[_Met] = []
        self._lines: list[str] = []  # for the next report
        self._goes_on = False  # the function of a test runs, so a failure is that of a subtest

    # -- the course of a test -----------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[object]
    ) -> Generator[None, object, object]:
        """Note which faults a fixture of a wider scope begins."""
        if fixturedef.scope == "function":
            return (yield)
        before = self._in_force()
        result = yield
        self._lasting |= self._in_force() - before
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        """Note that a test goes on even if something fails now.

        At its end, the networks of the guests must still be there: a test that expects silence passes
        without them.
        """
        self._goes_on = True
        try:
            result = yield
            for guest in self._guests():
                for place in guest.engine.machines.cards:
                    place.check()
            return result
        finally:
            self._goes_on = False

    def outlive_tests(self, guest: Guest) -> None:
        """What is in force in a new guest outlives the test that has asked for the guest."""
        self._lasting.update(ledger_of(guest).in_force)

    def at_failure(
        self, item: pytest.Item, phase: str, guests: Iterable[Guest], error: BaseException | str
    ) -> None:
        """A test has failed, which may have used these guests. This raises no error."""
        self._lines = [
            met.line
            for met in self._met
            if (phase == "teardown" if met.error is None else belong_together(met.error, error))
        ]
        for guest in guests:
            ledger = ledger_of(guest)
            found = ledger.at_failure(lambda other: belong_together(other, error))
            # A test that goes on ends its faults itself.
            why = self._end_each([] if self._goes_on else self._of_test(ledger))
            self._lines += [_line(guest, entry, why) for entry in found]
        if item.config.getoption("usepdb", default=False):
            for line in self._lines:  # pytest shows its report after the debugger
                self._speaker.say(line)

    def before_restore(self, item: pytest.Item, guest: Guest, error: BaseException) -> None:
        """A snapshot is about to be restored because of an error. A frozen guest thaws, to be looked at.

        The other faults stay in force, because the test may expect the error. This raises no error.
        """
        frozen = [entry for entry in ledger_of(guest).in_force if entry.fault.freezes]
        with alarms.paused(item):
            self._end_each(frozen)
        for entry in frozen:
            entry.error = error

    def before_end(
        self,
        item: pytest.Item,
        guest: Guest,
        error: BaseException | None,
        *,
        is_looked_at: bool = True,
    ) -> None:
        """A guest is about to end, perhaps because of an error. This raises no error.

        Args:
            is_looked_at: whether it is kept or asked before. Its faults are ended first then.
        """
        ledger = ledger_of(guest)
        in_force = ledger.in_force
        found = ledger.at_failure(lambda _: True)
        with alarms.paused(item):
            why = self._end_each(in_force if is_looked_at else [])
        for entry in found:
            cause = error if entry in in_force else entry.error
            self._met.append(_Met(_line(guest, entry, why), cause))
        self._tell_unrestored(item, guest)

    def shown(self) -> list[str]:
        """The lines for the report of the failure. They are returned once."""
        lines, self._lines = self._lines, []
        return lines

    def end_of_call(self, item: pytest.Item) -> None:
        """The function of a test has passed, and its guests are about to be kept."""
        for guest in () if self._goes_on else self._guests():
            with alarms.paused(item):
                self._end_each(self._of_test(ledger_of(guest)))

    def finish(self, item: pytest.Item) -> None:
        """An attempt at a test is over. What it left in force is ended, because others share the guest."""
        self._met.clear()
        for guest in self._guests():
            ledger = ledger_of(guest)
            with alarms.paused(item):
                for entry, why in self._end_each(self._of_test(ledger)).items():
                    left = f"{item.nodeid} left a fault in force in {guest.name}"
                    if why:
                        self._speaker.tell_problem(
                            f"{left}, which could not be ended: {entry.text}: {why}"
                        )
                    else:
                        self._speaker.tell(f"{left}, which was ended: {entry.text}")
            self._tell_unrestored(item, guest)
            ledger.at_failure(lambda _: False)  # nothing that is over counts for other tests
        self._lasting &= self._in_force()

    # -- the guests ---------------------------------------------------------------------------------

    def _in_force(self) -> set[Entry]:
        return {entry for guest in self._guests() for entry in ledger_of(guest).in_force}

    def _of_test(self, ledger: Ledger) -> list[Entry]:
        """The faults in force that end with the test."""
        return [entry for entry in ledger.in_force if entry not in self._lasting]

    def _tell_unrestored(self, item: pytest.Item, guest: Guest) -> None:
        """Let the run fail if a fault was over that has left something in a guest."""
        unrestored = ledger_of(guest).unrestored
        while unrestored:
            self._speaker.tell_problem(f"{item.nodeid}: {guest.name}: {unrestored.pop(0)}")

    def _end_each(self, entries: list[Entry]) -> dict[Entry, str]:
        """End faults, the last one first. Returns why some could not be ended; empty for the others."""
        return {entry: _why_not_ended(entry) for entry in reversed(entries)}


def ledger_of(guest: Guest) -> Ledger:
    """The ledger of a guest."""
    return guest.engine.machines.faults


def _line(guest: Guest, entry: Entry, why: Mapping[Entry, str]) -> str:
    """A line about a fault.

    Args:
        why: it could not be ended.
    """
    line = f"fault in {guest.name}: {entry}"
    return f"{line}. It could not be ended: {why[entry]}" if why.get(entry) else line


def _why_not_ended(entry: Entry) -> str:
    """End a fault. Returns why that is impossible; empty if it is over."""
    try:
        entry.fault.end()
    except VMSandboxError as error:
        return one_line(error.brief)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is no failure of the test
        return one_line(repr(error))
    return ""
