"""Reports of pytest's own, broken ones made of them, and what must hold for all that is taken."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tempfile
import unicodedata
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from _pytest.config import _prepareconfig
from _pytest.junitxml import LogXML
from _pytest.terminal import TerminalReporter
from hypothesis import strategies as st

from pytest_vmsandbox.inside.wire import Decoder
from pytest_vmsandbox.plugin.in_vm.remote_reports import ReportReader

SUITE = '''
import unittest

import pytest


def passes(n):
    """
    >>> passes(1)
    2
    """
    return n


def test_passes(record_property):
    record_property("one", "two")
    record_property("many", [1, {"a": None}])


def test_speaks(capsys):
    print("\\x1b[31mred\\x1b[0m\\tübrig\\n")


def test_compares():
    here = {"a": 1, "b": [1, 2, 3]}
    assert here == {"a": 1, "b": [1, 2, 4]}


def deeper(n):
    if n:
        deeper(n - 1)
    else:
        raise ValueError("deep\\nand on two lines")


def test_is_deep():
    deeper(3)


def test_chains():
    try:
        try:
            deeper(0)
        except ValueError as error:
            raise KeyError("k") from error
    except KeyError:
        raise RuntimeError("ü\\x1b[31m")


def test_groups():
    raise ExceptionGroup("several", [ValueError("a"), TypeError("b")])


def test_words():
    pytest.fail("reprcrash", pytrace=False)


def test_skips():
    pytest.skip("not now")


@pytest.mark.skipif(True, reason="never")
def test_skipif():
    pass


@pytest.mark.xfail(reason="known")
def test_xfails():
    assert 0


@pytest.mark.xfail(reason="known")
def test_xpasses():
    pass


@pytest.mark.xfail(strict=True, reason="reprcrash and reprtraceback")
def test_xpasses_strictly():
    pass


@pytest.mark.parametrize("n", [1, 2])
def test_numbers(n):
    assert n == 1


@pytest.fixture
def broken():
    raise OSError(2, "no")


@pytest.fixture
def breaks_down():
    yield
    raise OSError(3, "down")


def test_setup(broken):
    pass


def test_teardown(breaks_down):
    print("said before")


class TestUnit(unittest.TestCase):
    def test_unit(self):
        self.assertEqual([1], [2])

    @unittest.skip("unit")
    def test_unit_skips(self):
        pass
'''
SUBTESTS = """

def test_subtests(subtests):
    for i in range(3):
        with subtests.test(msg="odd", i=i, name="ü"):
            if i == 2:
                pytest.skip("two")
            assert i == 0
    with subtests.test():
        pass
"""
# Every report in every style, as the runner sends it: [head line, text, report], one a line.
RECORDER = """
import json, os, sys

import pytest

sys.path.append(os.environ["RUNNER"])
from runner.reporter import Reporter

file = open("reports", "w")


class Wire:
    def note(self, message):
        self.message = message

    say = note


def record(config, report):
    reporter = Reporter(Wire(), [], alone=False)
    reporter.pytest_runtest_logreport(report)
    data = reporter.wire.message["report"]
    print(json.dumps([report.head_line, report.longreprtext, data]), file=file, flush=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    for style in ("long", "short", "line", "native", "no", "value", "auto"):
        for locals in (False, True):
            if call.excinfo is not None:
                item.config.option.tbstyle, item.config.option.showlocals = style, locals
                report = pytest.TestReport.from_item_and_call(item, call)
                record(item.config, report)
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    record(CONFIG, report)


def pytest_configure(config):
    global CONFIG
    CONFIG = config
"""
RUNNER = Path(__file__).parents[2] / "pytest_vmsandbox/inside"
THERE = "/there"
HERE = Path("/here")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MOVERS = {*map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)])}
EVIL = [
    "\x1b[2J",
    "\x1b\x1b[2J[2J",
    "\x1b[\x1b[0m2J",
    "\x1b]0;title\x07",
    "\x1b]8;;http://x\x1b\\link",
    "\x1b]unterminated",
    "\x1bP1$tx\x1b\\",
    "\x1b_G\x1b\\",
    "\x1bc",
    "\x1b(0",
    "\x1b[38:2:1:2:3m",
    "\x1b[>4;2m",
    "\x9b2J",
    "\x9d0;title\x9c",
    "\x90q",
    "over\rwritten",
    "a\r\nb",
    "\r\x00\n",
    "\x08\x08\x08",
    "\x7f",
    "\x00",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "\ud800",
    "\U0001f600",
    "\u2028",
    "\x1b",
    "\x1b[",
    "\x1b[31m",
    "\x1b[" + "1;" * 50 + "m",
    "m",
    "[2J",
    "\n",
    "E   x",
    "reprcrash reprtraceback",
    "../../etc/passwd",
    "/there/../x",
    "",
]
SHADOWS = [
    "toterminal",
    "get_sections",
    "passed",
    "failed",
    "_from_json",
    "_to_json",
    "__class__",
    "__dict__",
    "_id",
    "id",
    "nodeid",
    "self",
    "cls",
    "node",
    "item_index",
    "worker_id",
    "url",
    "wasxfail",
    "context",
    "head_line",
    "result",
    "longrepr",
    "chain",
    "reprcrash",
    "reprtraceback",
    "$report_type",
    "_report_type",
    "_subtest.context",
    "vm_infrastructure",
    "rerun",
]


@cache
def samples() -> list[tuple[str, str, dict]]:
    """Reports of every kind, made by pytest itself: what it shows of one, and what is sent."""
    with tempfile.TemporaryDirectory() as folder:
        suite = SUITE + (SUBTESTS if pytest.version_tuple >= (9,) else "")
        Path(folder, "test_suite.py").write_text(suite, "utf-8")
        Path(folder, "recorder.py").write_text(RECORDER, "utf-8")
        Path(folder, "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "recorder", "-p", "no:cacheprovider"),
                *("--doctest-modules", "--continue-on-collection-errors", "test_suite.py"),
            ],
            cwd=folder,
            env={
                "PYTHONPATH": folder,
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "RUNNER": str(RUNNER),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            stdout=subprocess.DEVNULL,
            check=False,
        )
        lines = Path(folder, "reports").read_text("utf-8").splitlines()
    return [tuple(json.loads(line)) for line in lines]


class Host:
    """A pytest on this side that shows what it is told, in all its ways."""

    def __init__(self) -> None:
        args = ["-c", "/dev/null", "--rootdir=/", "-p", "no:cacheprovider", "-rA"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
            patch.delenv("PYTEST_ADDOPTS", raising=False)
            self.config = _prepareconfig(args)
        self.config._do_configure()
        self.reader = ReportReader(THERE, HERE, {})
        self.folder = Path(tempfile.mkdtemp())

    def item(self, nodeid: str) -> pytest.Item:
        item: Any = SimpleNamespace(
            nodeid=nodeid,
            location=("tests/test_x.py", 3, "test_x"),
            keywords={"test_x": 1},
            config=self.config,
        )
        return cast("pytest.Item", item)

    def close(self) -> None:
        self.config._ensure_unconfigure()
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()

    def shown(self, *reports: pytest.TestReport, markup: bool, verbose: int) -> str:
        """What a terminal shows of reports."""
        self.config.option.verbose = verbose
        file = io.StringIO()
        reporter = TerminalReporter(self.config, file)
        reporter._tw.hasmarkup = markup
        reporter._session = SimpleNamespace(  # type: ignore[assignment]
            testscollected=1, testsfailed=0, shouldfail=False, shouldstop=False
        )
        for report in reports:
            reporter.pytest_runtest_logreport(report)
        reporter.summary_errors()
        reporter.summary_failures()
        reporter.summary_xfailures()
        reporter.summary_passes()
        reporter.summary_xpasses()
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("CI", raising=False)  # there, pytest cuts nothing
            reporter.short_test_summary()
        return file.getvalue()

    def warned(self, arguments: dict) -> str:
        """What a terminal shows of a warning."""
        file = io.StringIO()
        reporter = TerminalReporter(self.config, file)
        reporter.pytest_warning_recorded(arguments["warning_message"], arguments["nodeid"])
        reporter.summary_warnings()
        return file.getvalue()

    def xml(self, *reports: pytest.TestReport) -> str:
        file = self.folder / "junit.xml"
        log = LogXML(str(file), None, "pytest", "all", "total", "xunit1", True)
        log.pytest_sessionstart()
        for report in reports:
            log.pytest_runtest_logreport(report)
        log.pytest_sessionfinish()
        return file.read_text("utf-8")

    def check(self, report: pytest.TestReport) -> None:
        """What must hold for a report that was taken."""
        assert isinstance(report, pytest.TestReport)
        end = pytest.TestReport(
            report.nodeid, report.location, {}, "passed", None, "teardown"
        )  # pytest closes a test's report with its teardown
        reports = [report] if report.when == "teardown" else [report, end]
        for text in (
            report.longreprtext,
            self.shown(*reports, markup=False, verbose=0),
            self.shown(*reports, markup=True, verbose=1),
            self.shown(*reports, markup=True, verbose=2),
            "".join(f"{name}\n{text}" for name, text in report.sections),
        ):
            check_text(text)
        for element in ET.fromstring(self.xml(*reports)).iter():  # pytest's own
            check_text("".join([element.text or "", *element.attrib.values()]))
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        json.dumps(data).encode()
        dumps(data)
        if not isinstance(report.longrepr, str):  # pytest stumbles over certain words in one
            self.config.hook.pytest_report_from_serializable(config=self.config, data=data)


def dumps(data: object) -> bytes:
    """As xdist sends it."""
    from execnet.gateway_base import dumps as dump

    written: bytes = dump(data)
    return written


def check_text(text: str) -> None:
    """A text that plays no tricks on a terminal."""
    left = COLOUR.sub("", text).replace("\r\n", "\n")
    found = {
        char for char in left if unicodedata.category(char) in {"Cc", "Cs"} and char not in "\t\n"
    } | MOVERS.intersection(left)
    assert not found, (found, text)


# -- strategies ---------------------------------------------------------------------------------

EVIL_TEXT = st.lists(st.sampled_from(EVIL) | st.text(max_size=5), max_size=4).map("".join)
ODD = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**53 + 1, -(10**390), 1e300, -0.0, 5e-324])
    | st.floats(allow_nan=False, allow_infinity=False)
    | EVIL_TEXT
    | st.sampled_from(["passed", "failed", "skipped", "setup", "call", "teardown", "SubTestReport"])
    | st.sampled_from(["ReprEntry", "ReprEntryNative", "long", "short", "value", "native"])
)
KEYS = st.sampled_from(SHADOWS) | EVIL_TEXT
JSON = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def nearly_right(draw) -> dict:
    """A report of pytest's own in which something is not as it should be."""
    report = json.loads(json.dumps(draw(st.sampled_from(samples()))[2]))
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(report))
        holder, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["replace", "text", "drop", "add", "nest", "copy", "twice"]))
        if what == "replace":
            holder[key] = draw(JSON)
        elif what == "text":
            old = holder[key] if isinstance(holder[key], str) else ""
            at = draw(st.integers(0, len(old)))
            holder[key] = old[:at] + draw(EVIL_TEXT) + old[at:]
        elif what == "drop":
            del holder[key]
        elif what == "nest":
            for _ in range(draw(st.integers(1, 45))):
                holder[key] = [holder[key]]
        elif what == "copy":
            other, name = draw(st.sampled_from(places))
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = json.loads(json.dumps(other[name]))
        elif isinstance(holder, list):
            holder.append(json.loads(json.dumps(holder[key])) if what == "twice" else draw(JSON))
        else:
            holder[draw(KEYS)] = draw(JSON)
    return report


def _places(value):
    """Where something can be changed: all places in lists and objects."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(pairs):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def sent(report: object) -> Any:
    """What arrives of a report that is sent."""
    line = json.dumps({"report": report})
    return Decoder().feed(line.encode() + b"\n")[0]["report"]
