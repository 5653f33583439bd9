"""One attempt at a test inside a guest: which of its reports are here, and which are missing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_vmsandbox.inside.wire import broken
from pytest_vmsandbox.plugin.remote_reports import PHASES, RERUN


class Attempt:
    """One attempt at a test; pytest-rerunfailures, flaky and their like may make others.

    Attributes:
        due: the phases of which no report is here yet.
        missing: those that were left out.
        has_called: whether the test's function has begun.
    """

    def __init__(self) -> None:
        self.has_called = False
        self.due = list(PHASES)
        self.missing: list[str] = []
        self._reports: list[tuple[pytest.TestReport, bool]] = []
        self._is_lost = False

    @property
    def is_rerun(self) -> bool:
        """Whether another one follows."""
        return not self._is_lost and any(report.outcome == RERUN for report, _ in self._reports)

    @property
    def has_failed(self) -> bool:
        """Whether the test has failed in it."""
        return any(report.failed for report in self.reports)

    @property
    def reports(self) -> list[pytest.TestReport]:
        """What it has come to; of subtests, those count that the last attempt has."""
        is_rerun = self.is_rerun
        return [report for report, is_subtest in self._reports if not (is_subtest and is_rerun)]

    def add(self, report: pytest.TestReport, *, is_subtest: bool = False) -> None:
        """Take the report of a phase, or of a subtest.

        Raises:
            GuestLost: it is of a phase that is not due.
        """
        if not is_subtest:
            if report.when not in self.due:
                raise broken(f"a report of {report.when} where none was due")
            while (phase := self.due.pop(0)) != report.when:  # right if another attempt follows
                self.missing.append(phase)
            if report.when == "setup" and not report.passed:
                self.due = ["teardown"]
        self._reports.append((report, is_subtest))

    def fail(
        self,
        failed: Callable[[str], pytest.TestReport],
        passed: Callable[[str], pytest.TestReport],
    ) -> None:
        """End with an error in the phase that is due, or is missing.

        Args:
            failed, passed: make the reports of a phase.
        """
        if self.has_called and self.due[:1] == ["setup"]:  # its report was held back
            self.add(passed("setup"))
        phase = [*self.missing, *self.due, "teardown"][0]
        if self.missing:
            before = PHASES[: PHASES.index(phase)]
            self._reports = [pair for pair in self._reports if pair[0].when in before]
        self._reports.append((failed(phase), False))
        if phase != "teardown":
            self._reports.append((passed("teardown"), False))
        self.due, self.missing = [], []
        self._is_lost = True
