"""Runs tests many times, and reports how often each fails: ``--vm-repeat``.

A repetition is an item of its own, so xdist deals them out, and ``-x`` and junit's file know each. They are
made after the selection: users select tests, and find in pytest's cache the ids of tests.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pytest_vmsandbox.plugin import rates
from pytest_vmsandbox.plugin.plan import PLAN, REPEATED, Repetition, plan_of

_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_LONGEST_LINE = 150  # characters of what was raised
# How a repetition can end. A later one counts more.
_ENDS = ("passed", "skipped", "xfailed", "failed", "error")


def repeat(items: list[pytest.Item], count: int) -> None:
    """Put that many repetitions in the place of each test.

    Also of those without a guest in sight: a test can ask for one by ``request.getfixturevalue``.
    """
    items[:] = [_repetition(item, n + 1) for item in items for n in range(count)]


def _repetition(item: pytest.Item, number: int) -> pytest.Item:
    """An item that runs a test once. It shares nothing with others that tests can change."""
    one = copy.copy(item)
    one.own_markers = list(item.own_markers)
    one.user_properties = list(item.user_properties)
    one._report_sections = []  # noqa: SLF001  # pytest's own, of this item
    one.stash = one._store = copy.copy(item.stash)  # noqa: SLF001  # likewise
    one.stash._storage = dict(item.stash._storage)  # noqa: SLF001  # there is no public copy
    one.stash[REPEATED] = Repetition(item.nodeid, number)
    if PLAN in item.stash:
        one.stash[PLAN] = replace(plan_of(item), repetition=number)
    _rename(one, _numbered(item.nodeid, number))
    if isinstance(item, pytest.Function) and item.cls is not None:
        for name in ("_instance", "_obj"):  # the instance of the class, and its method
            vars(one).pop(name, None)
    if isinstance(item, pytest.DoctestItem) and item.dtest is not None:
        one.dtest = copy.copy(item.dtest)  # type: ignore[attr-defined]
        one.dtest.globs = dict(item.dtest.globs)  # type: ignore[attr-defined]  # a run empties them
    if hasattr(one, "_initrequest"):
        one._initrequest()  # noqa: SLF001  # the values of its fixtures
    return one


def _rename(item: pytest.Item, nodeid: str) -> None:
    """Give an item another id. Its name stays, as classes of unittest look for their method by it."""
    if hasattr(item, "_id"):  # since pytest 9.2
        item._id = type(item._id).parse(nodeid)  # noqa: SLF001  # there is no public way
    else:
        item._nodeid = nodeid  # type: ignore[attr-defined]  # noqa: SLF001  # likewise


def _numbered(nodeid: str, number: int) -> str:
    """The id of a repetition.

    Example:
        >>> _numbered("a.py::test_x[tiny]", 7), _numbered("a.py::test_x", 7)
        ('a.py::test_x[tiny-#7]', 'a.py::test_x[#7]')
        >>> _numbered("a.py::test_x[tiny]@group", 7)  # as xdist writes it
        'a.py::test_x[tiny-#7]@group'
    """
    base, at, group = nodeid.rpartition("@")
    if not at or set(group) & set("]:/"):
        base, at, group = nodeid, "", ""
    if base.endswith("]"):
        return f"{base[:-1]}-#{number}]{at}{group}"
    return f"{base}[#{number}]{at}{group}"


@dataclass
class _Test:
    """What is known about the repetitions of a test.

    Attributes:
        ends: number → how it ended so far.
        over: the numbers of those that have ended.
        failures: what failed, without its numbers → how often, its line, and the first repetition.
    """

    ends: dict[int, str] = field(default_factory=dict)
    over: set[int] = field(default_factory=set)
    failures: dict[tuple[object, ...], tuple[int, str, int]] = field(default_factory=dict)

    def hear(self, report: pytest.TestReport, number: int) -> bool:
        """Hear a report. Returns whether it shows a failure that no earlier one has shown."""
        end, earlier = _end(report), self.ends.get(number, "passed")
        if earlier != "failed":  # a guest that is lost after the test has failed changes nothing
            self.ends[number] = max(end, earlier, key=_ENDS.index)
        if report.when == "teardown":
            self.over.add(number)
        if not report.failed:
            return True
        key, line = _cause(report)
        count, first_line, first = self.failures.get(key, (0, line, number))
        self.failures[key] = count + 1, first_line, first
        return not count

    def lines(self, nodeid: str, count: int) -> Iterator[str]:
        """How often the test has failed, and why."""
        ends = Counter(self.ends[number] for number in self.over)
        failed = ends["failed"] + ends["xfailed"]
        judged = failed + ends["passed"]
        notes = []
        if missing := count - len(self.over):
            notes.append(f"{missing} did not run, so there is no interval")
        if errors := ends["error"]:
            notes.append(f"{errors} not counted, because the guest failed")
        if ends["skipped"]:
            notes.append(f"{ends['skipped']} skipped")
        if missing or not judged:
            rate = f"failed {failed} of {judged}"
        else:
            rate = rates.described(failed, judged)
        yield "; ".join([f"{nodeid}: {rate}", *notes])
        for times, line, first in sorted(self.failures.values(), key=lambda it: -it[0]):
            yield f"  {times} × {line[:_LONGEST_LINE]} (first: #{first})"


def _end(report: pytest.TestReport) -> str:
    if report.failed:
        return "error" if getattr(report, "vm_infrastructure", False) else "failed"
    if report.skipped:
        return "xfailed" if hasattr(report, "wasxfail") else "skipped"
    return "passed"


def _cause(report: pytest.TestReport) -> tuple[tuple[object, ...], str]:
    """What a failure has in common with others of the same cause, and its line for people.

    Numbers in the line do not count: a duration or a process number differs each time.
    """
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message) if crash is not None else report.longreprtext
    lines = text.strip().splitlines() or [""]
    line = lines[0 if crash is not None else -1].strip()
    if report.when != "call":
        line = f"in {report.when}: {line}"
    place = (crash.path, crash.lineno) if crash is not None else ()
    return (*place, _NUMBER.sub("#", line)), line


class Repeating:
    """Reports how often tests fail. It is registered as a plugin if tests are repeated.

    Args:
        count: how often each test runs.
    """

    def __init__(self, config: pytest.Config, count: int) -> None:
        self._config = config
        self._count = count
        # By id: those of this process, and those heard of.
        self._repetitions: dict[str, Repetition] = {}
        self._tests: dict[str, _Test] = {}

    def repeat(self, items: list[pytest.Item]) -> None:
        """Put repetitions in the places of tests. With ``--collect-only``, tests are shown as they are."""
        if self._config.getoption("collectonly"):
            return
        repeat(items, self._count)
        self._repetitions |= {
            item.nodeid: item.stash[REPEATED] for item in items if REPEATED in item.stash
        }

    def pytest_report_header(self) -> str:
        """Say that tests are repeated."""
        return f"vmsandbox: each test runs {self._count} times, each time in a fresh guest if it needs one"

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Tear down fixtures of wider scopes, too: the next repetition begins as this one did."""
        try:
            return (yield)
        finally:
            if REPEATED in item.stash:
                item.session._setupstate.teardown_exact(None)  # noqa: SLF001  # there is no public way

    @pytest.hookimpl(tryfirst=True)  # before xdist sends the report
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count. A worker of xdist lets the controller know what the report belongs to."""
        if (known := self._repetitions.get(report.nodeid)) is not None:
            report.vm_repetition = list(known)  # type: ignore[attr-defined]
        elif (found := getattr(report, "vm_repetition", None)) is not None:
            known = self._repetitions[report.nodeid] = Repetition(*found)
        if known is not None:
            is_new = self._tests.setdefault(known.test, _Test()).hear(report, known.number)
            report.vm_again = not is_new  # type: ignore[attr-defined]

    @pytest.hookimpl(tryfirst=True)  # before pytest writes its cache
    def pytest_sessionfinish(self) -> None:
        """Let ``--lf`` and ``--sw`` remember tests, not repetitions."""
        plugins: Any = self._config.pluginmanager
        last_failed = getattr(plugins.get_plugin("lfplugin"), "lastfailed", {})
        for key in list(last_failed):
            del last_failed[key]
            last_failed |= dict.fromkeys(self._in_cache(key), True)
        cached = getattr(plugins.get_plugin("stepwiseplugin"), "cached_info", None)
        if cached is not None and cached.last_failed:
            cached.last_failed = next(iter(self._in_cache(cached.last_failed)), None)

    def _in_cache(self, key: Any) -> list[Any]:
        """A failed test as the cache has to know it; nothing if all repetitions have passed.

        Args:
            key: an id: a text, or since pytest 9.2 an object made from one.
        """
        nodeid = str(key)
        if nodeid in self._repetitions:
            nodeid = self._repetitions[nodeid].test
        test = self._tests.get(nodeid)
        if test is not None and not {"failed", "error"} & {*test.ends.values()}:
            return []
        return [getattr(type(key), "parse", str)(nodeid)]

    @pytest.hookimpl(wrapper=True, tryfirst=True, specname="pytest_terminal_summary")
    def pytest_terminal_summary_of_few(
        self, terminalreporter: pytest.TerminalReporter
    ) -> Generator[None, object, object]:
        """Show in full only the first failure of each cause. The others count as usual."""
        stats: Any = terminalreporter.stats
        everything = {name: stats[name] for name in ("failed", "error") if name in stats}
        for name, reports in everything.items():
            stats[name] = [it for it in reports if not getattr(it, "vm_again", False)]
        try:
            return (yield)
        finally:
            stats |= everything

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show how often each test has failed."""
        if self._tests:
            noise = " (with noise)" if self._config.getoption("--vm-noise") else ""
            terminalreporter.write_sep("=", f"how often tests failed{noise}")
        for nodeid, test in self._tests.items():
            for line in test.lines(nodeid, self._count):
                terminalreporter.write_line(line)
