"""Reports about the current test, and about the end of a session."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Generator
from typing import Any

import pytest

from .apart import keep_apart
from .other_plugins import scenario_of
from .serialize import attributes_of, bounded, serialized, text_of
from .wire import Wire, clean, portable

keep_apart(globals())

MAX_PROPERTIES = 10_000  # of a report: user_properties
# The outcomes of attempts that pytest-rerunfailures and pytest-retry repeat.
RERUN, RETRIED = "rerun", "retried"
ENDINGS = ((pytest.exit.Exception, "left"), (pytest.Session.Interrupted, "stopped"))


class InAnotherGuest(BaseException):
    """The next attempt at a test has its own guest, so pytest-rerunfailures must not begin one here."""


class Reporter:
    """A plugin that sends pytest's reports to the host.

    Args:
        outcomes: further outcomes that plugins of the host know.
        alone: whether each attempt at a test has a guest of its own.
    """

    def __init__(self, wire: Wire, outcomes: list[str], alone: bool) -> None:
        self.wire = wire
        self.outcomes = ("passed", "failed", "skipped", *outcomes)
        self.alone = alone
        self.begin("")

    def begin(self, nodeid: str) -> None:
        """A test begins."""
        self.running = nodeid
        self.is_rerun = False  # whether this attempt at it is followed by another
        self.reported: list[str] = []  # its phases, so far

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if self.is_rerun and self.alone:
            raise InAnotherGuest

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = serialized(report)
        when, outcome = data["when"], data["outcome"]
        # Older pytest-rerunfailures report no teardown of an attempt before another one.
        if when == "setup" and (self.is_rerun or "teardown" in self.reported):
            self.is_rerun, self.reported = False, []
            self.wire.note({"again": True})
        if data["nodeid"] != self.running:
            self.note("renamed", data["nodeid"])
            data["nodeid"] = self.running
        if outcome not in self.outcomes:
            self.note("outcome", outcome)
            return
        # This report ends a phase of its test. Those of subtests and of pytest-retry do not.
        if "_report_type" not in data and outcome != RETRIED:
            if when in self.reported:
                self.note("twice", when)
                return
            self.reported.append(when)
            self.is_rerun |= outcome == RERUN
        for name in ("keywords", "location"):  # the host has its own
            data.pop(name, None)
        properties = report.user_properties[:MAX_PROPERTIES]
        data["user_properties"] = [[str(name), portable(value)] for name, value in properties]
        data["attributes"], notes = attributes_of(report)
        data["scenario"] = scenario_of(report)
        data = bounded({name: clean(value) for name, value in data.items()})
        for note in notes:
            self.wire.note(note)
        if len(data["user_properties"]) < len(report.user_properties):
            self.note("properties", len(report.user_properties))
        # Send a failure at once: it counts even if the guest is lost right after it.
        tell = self.wire.note if outcome == "passed" else self.wire.say
        tell({"report": data})

    def note(self, kind: str, name: object) -> None:
        """Send a note for people about an unexpected report."""
        self.wire.note({"note": kind, "name": clean(str(name))})

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: object
    ) -> None:
        category = warning_message.category
        try:
            source = linecache.getline(warning_message.filename, warning_message.lineno)
        except Exception:  # Python shows warnings without it, too
            source = ""
        message = {
            "warning": str(warning_message.message),
            "category": [category.__module__, category.__name__],
            "file": warning_message.filename,
            "line": warning_message.lineno,
            "when": when,
            "node": nodeid,
            "location": location,
            "source": source,
        }
        self.wire.note(clean(message))

    @pytest.hookimpl(tryfirst=True, wrapper=True)
    def pytest_sessionstart(self) -> Generator[None, Any, Any]:
        """Report a failure of the whole run. For that, pytest has no hook."""
        try:
            return (yield)
        except pytest.Session.Failed as error:
            self.wire.say(clean({"interrupted": str(error), "how": "failed"}))
            raise

    pytest_collection = pytest_runtestloop = pytest_sessionstart

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        error = excinfo.value
        how = next((how for kind, how in ENDINGS if isinstance(error, kind)), "key")
        status = getattr(error, "returncode", None) if how == "left" else None
        self.wire.say(clean({"interrupted": str(error), "how": how, "status": status}))

    def pytest_internalerror(self, excrepr: object) -> None:
        self.wire.say({"internal": clean(text_of(excrepr))})


class Calls:
    """Reports when a test's function begins and ends. Reports of phases may come too late for that.

    It is a plugin only for tests that need it, because a traceback's arguments may show it.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        self.wire.say({"call": True})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> None:
        if call.when == "call":
            self.wire.say({"call": False})
