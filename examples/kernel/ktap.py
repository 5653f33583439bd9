"""Reads KTAP, in which KUnit and kselftest write their results, from a kernel's log or a program's output.

See Documentation/dev-tools/ktap.rst of Linux. TAP 13 and 14 can be read, too. A log that ends in the middle,
or has lost lines, is an error: what it does not show may have failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

_LOG = re.compile(r"^(?:<\d+>)?\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ?")  # what the kernel's log adds
_VERSION = re.compile(r"K?TAP version \d+$")
_SUBTEST = re.compile(r"# Subtest: (.+)$")
_PLAN = re.compile(r"1\.\.(\d+)(?:\s*# *SKIP *(.*))?$", re.IGNORECASE)
_RESULT = re.compile(
    r"(not )?ok (\d+)(?: +- | +)?(.*?)(?: *(?<!\\)# *(SKIP|TODO|XFAIL|TIMEOUT|ERROR)\b:? *(.*))?$"
)
_TOTAL = re.compile(r"# (.+): pass:\d+ fail:\d+ skip:\d+ total:(\d+)$")


class KTAPError(Exception):
    """The log does not show the results of all tests."""


@dataclass
class Case:
    """One result.

    Attributes:
        name: of the test.
        is_ok: whether it passed.
        directive: SKIP, TODO, XFAIL, TIMEOUT or ERROR; or empty.
        reason: what follows the directive.
        said: lines about it.
        cases: the results that it sums up.
    """

    name: str
    is_ok: bool
    directive: str = ""
    reason: str = ""
    said: list[str] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)

    def leaves(self, path: str = "") -> Iterator[tuple[str, Case]]:
        """The results below this one, with their names; itself, if they do not explain why it failed."""
        name = f"{path}/{self.name}" if path else self.name
        for case in self.cases:
            yield from case.leaves(name)
        if not self.cases or (not self.is_ok and all(case.is_ok for case in self.cases)):
            yield name, self

    def check(self) -> None:
        """Fail, skip or pass as this result says."""
        about = "\n".join([f"{self.directive} {self.reason}".strip(), *self.said]).strip()
        if self.directive in ("SKIP", "XFAIL", "TODO"):
            (pytest.skip if self.directive == "SKIP" else pytest.xfail)(
                self.reason or self.directive
            )
        if not self.is_ok or self.directive:
            pytest.fail(about or "not ok", pytrace=False)

    def report(self, subtests: Any) -> None:
        """Make each result a subtest of the current test."""
        for name, case in self.leaves():
            with subtests.test(name):
                case.check()


@dataclass
class _Group:
    """Results with one indent, until a result with less indent sums them up."""

    indent: int
    name: str = ""
    plan: int | None = None
    is_announced: bool = (
        False  # a line says that it begins: then it must have a plan, or be summed up
    )
    cases: list[Case] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return self.plan is None or len(self.cases) == self.plan


class _Reader:
    """Puts lines together. It has an open group for each indent."""

    def __init__(self) -> None:
        self.finished: list[Case] = []
        self.open: list[_Group] = []
        self.said: list[str] = []
        self.total: tuple[str, int] | None = None

    def begin(self, indent: int) -> None:
        """A line says that a group begins."""
        while self.open and self.open[-1].indent >= indent:
            self._finish(self.open.pop())
        self.open.append(_Group(indent, is_announced=True))
        self.said = []

    def group(self, indent: int) -> _Group:
        """The group with that indent. It may begin without a line of its own."""
        if not any(group.indent == indent for group in self.open):
            self.begin(indent)
            self.open[-1].is_announced = False
        return next(group for group in self.open if group.indent == indent)

    def result(self, indent: int, number: int, case: Case) -> None:
        """A result, which ends the groups with more indent."""
        if self.open and self.open[0].indent > indent:
            self.open.insert(0, _Group(indent))  # of a module: KUnit goes on counting
        group = self.group(indent)
        is_counted = group.plan is not None or bool(group.cases)
        if is_counted and number != len(group.cases) + 1:
            raise KTAPError(
                f"result {len(group.cases) + 1} is missing: «{case.name}» has the number {number}"
            )
        while self.open[-1] is not group:
            inner = self.open.pop()
            self._check(inner)
            case.cases = inner.cases
        if (
            self.total
            and self.total[0] == case.name
            and case.cases
            and len(case.cases) != self.total[1]
        ):
            raise KTAPError(
                f"«{case.name}» has {len(case.cases)} results, and counts {self.total[1]}"
            )
        case.said, self.said, self.total = self.said, [], None
        group.cases.append(case)
        self._close_complete(group)

    def plan(self, indent: int, count: int) -> None:
        """A line says how many results a group has, before or after them."""
        group = self.group(indent)
        group.plan = count
        if group.cases:
            self._close_complete(group)

    def _close_complete(self, group: _Group) -> None:
        is_known = group.plan is not None or not group.is_announced
        if group.indent == 0 and is_known and group.is_complete:
            self._finish(self.open.pop())

    def end(self) -> None:
        """The log ends."""
        while self.open:
            self._finish(self.open.pop())

    def _finish(self, group: _Group) -> None:
        self._check(group)
        if group.plan is None and group.is_announced and not group.indent:
            raise KTAPError("the number of results is not announced")
        if group.indent and group.cases:
            raise KTAPError(
                f"«{group.name or group.cases[-1].name}» began, and no result sums it up"
            )
        self.finished += group.cases

    @staticmethod
    def _check(group: _Group) -> None:
        if not group.is_complete:
            last = f"; the last one is «{group.cases[-1].name}»" if group.cases else ""
            raise KTAPError(
                f"{group.plan} results were announced, and {len(group.cases)} came{last}"
            )


def parse(log: str) -> list[Case]:
    """The results in a log, in order. All other lines are ignored.

    Raises:
        KTAPError: it has none, or some are missing.
    """
    reader = _Reader()
    for line in log.splitlines():
        text = _LOG.sub("", line.rstrip("\r"))
        body = text.lstrip(" ")
        indent = len(text) - len(body)
        if body.startswith("Bail out!"):
            raise KTAPError(body)
        if _VERSION.match(body):
            reader.begin(indent)
        elif found := _SUBTEST.match(body):
            if not reader.open or reader.open[-1].indent != indent or reader.open[-1].cases:
                reader.begin(indent)
            reader.open[-1].name = found[1]
        elif found := _PLAN.match(body):
            reader.plan(indent, int(found[1]))
            if found[1] == "0":
                reader.finished.append(
                    Case("all", is_ok=True, directive="SKIP", reason=found[2] or "")
                )
        elif found := _RESULT.match(body):
            case = Case(found[3], not found[1], (found[4] or "").upper(), found[5] or "")
            reader.result(indent, int(found[2]), case)
        elif reader.open:
            if found := _TOTAL.match(body):
                reader.total = found[1], int(found[2])
            reader.said.append(text)
    reader.end()
    if not reader.finished:
        raise KTAPError("there are no results in it")
    return reader.finished
