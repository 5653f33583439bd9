"""Guests that say anything about the tests that run in them: an error, and the next test goes on."""

import io
import json
import xml.etree.ElementTree as ET
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.guests.running.ledger import Ledger
from pytest_vmsandbox.inside.connection import Connection, GuestPaths
from pytest_vmsandbox.inside.session import Collected, GuestSession
from pytest_vmsandbox.inside.wire import encode
from pytest_vmsandbox.plugin.in_vm import debugging, leases, provisioning, side_messages
from pytest_vmsandbox.plugin.in_vm.provisioning import Lease
from pytest_vmsandbox.plugin.in_vm.remote_reports import ReportReader
from pytest_vmsandbox.plugin.plan import plan_of
from support.reports import check_text

ONE, TWO = "test_suite.py::test_one", "test_suite.py::test_two"
SUITE = """
import pytest
pytestmark = pytest.mark.in_vm
def test_one(): pass
def test_two(): pass
"""
PLACE = GuestPaths(python="/python", runner="/runner", folder="/run")
EVIL = "\x1b[2J\x1b]0;x\x07over\rwritten\u202e"


def report(when, outcome="passed", nodeid=ONE, **more):
    fields = {"nodeid": nodeid, "when": when, "outcome": outcome, "longrepr": None}
    return {"report": {**fields, "sections": [], "user_properties": [], **more}}


SETUP, CALL, TEARDOWN = (report(when) for when in ("setup", "call", "teardown"))
DONE = {"done": ONE, "stop": None}
FAILED = report("call", "failed", longrepr="why")
SKIPPED = report("setup", "skipped", longrepr=["x.py", 1, "Skipped: why"])


class Script:
    """A supervisor that says of the first test what it likes, and of others what is right."""

    def __init__(self, said):
        self.said, self.waiting = said, []
        self.name, self.image, self.alive, self.loss = "alpha-1-1", "alpha-1", True, None
        self.engine, self.running = self, None
        self.machines = SimpleNamespace(faults=Ledger(None))

    def send(self, data, timeout):
        for line in data.splitlines():
            self.take(json.loads(line))

    def take(self, message):
        if message["do"] == "run" and message["id"] == ONE:
            self.waiting += self.said
        elif message["do"] == "run":
            nodeid = message["id"]
            self.waiting += [report(when, nodeid=nodeid) for when in ("setup", "call", "teardown")]
            self.waiting.append({"done": nodeid, "stop": None})
        elif message["do"] == "finish":
            self.waiting.append({"exit": 9, "tail": EVIL})
        elif message["do"] == "signal" and message["name"] != "DUMP":
            self.waiting.append({"exit": -9, "tail": EVIL})

    def receive(self, timeout):
        if not self.waiting:
            return b""
        return encode(self.waiting.pop(0))

    def run(self, argv, **how):
        return SimpleNamespace(stdout="")


@pytest.fixture
def told(suite, monkeypatch):
    """Run two tests in a guest that says certain things of the first."""

    def told(*said, args=(), items=(ONE, TWO), failed=()):
        def get(self, item):
            key = plan_of(item).place
            lease = self._leases.setdefault(
                key,
                SimpleNamespace(
                    session=None,
                    stack=ExitStack(),
                    has_failed=False,
                    has_collected=False,
                    loss_of_others=None,
                ),
            )
            if lease.session is None:
                script: Any = Script(said)
                outcomes = ["rerun"] if "pytest_rerunfailures" in args else []
                lease.guest = script
                lease.tree, lease.place = "/there", PLACE
                lease.reader = ReportReader("/there", suite.path, {}, outcomes=outcomes)
                lease.connection = Connection(script, script, patience=1.0)
                lease.session = GuestSession(lease.connection)
                lease.session.collected = Collected(items=dict.fromkeys(items), failed=dict(failed))
            return lease

        monkeypatch.setattr(leases.Leases, "lease", get)
        suite.write(SUITE)
        result = suite.run("-rA", "--junitxml=junit.xml", *args)
        check_text("\n".join(result.outlines + result.errlines))
        assert "INTERNALERROR" not in result.stdout.str()
        for element in ET.parse(suite.path / "junit.xml").iter():
            check_text("".join([element.text or "", *element.attrib.values()]))
        return result

    return told


def test_what_is_right(told):
    told(SETUP, CALL, TEARDOWN, DONE).assert_outcomes(passed=2)


@pytest.mark.parametrize(
    "said",
    [
        [DONE],
        [CALL, SETUP, TEARDOWN, DONE],
        [TEARDOWN, DONE],
        [SETUP, SETUP, CALL, TEARDOWN, DONE],
        [SETUP, TEARDOWN, DONE],
        [SETUP, DONE],
        [report("setup", "failed"), CALL, TEARDOWN, DONE],
        [SKIPPED, CALL, TEARDOWN, DONE],
        [report("setup", nodeid=TWO)],
        [{"report": None}],
        [{"report": []}],
        [report("collect")],
        [report("call", "skipped", longrepr="why")],
        [{"output": 3}],
        [{"output": None}],
        [{"warning": 3, "when": "runtest"}],
        [{"junit": "property", "name": 3, "value": "x"}],
        [{"junit": "attribute"}],
        [{"again": True}, DONE],
        [report("setup", "rerun", longrepr="why")],
    ],
)
def test_an_error_before_the_call(told, said):
    result = told(*said)
    outcomes = result.parseoutcomes()
    assert outcomes.pop("passed") in {1, 2}
    assert {*outcomes} <= {"errors", "error", "failed", "skipped"}
    assert {*outcomes} & {"errors", "error"}
    result.stdout.fnmatch_lines(["*GuestLost*protocol*", "PASSED *test_two*"])


@pytest.mark.parametrize(
    ("said", "passed"),
    [
        ([SETUP, CALL], 2),
        ([SETUP, CALL, DONE], 2),
        ([SETUP, CALL, CALL, TEARDOWN, DONE], 2),
        ([SETUP, FAILED, CALL], 1),
        ([SETUP, CALL, TEARDOWN, TEARDOWN, DONE], 2),
        ([SETUP, CALL, TEARDOWN, SETUP], 2),
        ([SETUP, CALL, TEARDOWN, report("teardown", _report_type="SubTestReport")], 2),
    ],
)
def test_an_error_after_the_call(told, said, passed):
    result = told(*said)
    outcomes = result.parseoutcomes()
    assert outcomes.pop("errors", 0) + outcomes.pop("error", 0) == 1
    assert outcomes == {"passed": passed} | ({"failed": 1} if passed == 1 else {})
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_one*", "PASSED *test_two*"])


RERUN = report("call", "rerun", longrepr="why", attributes={"rerun": 0})


@pytest.mark.parametrize(
    "said",
    [
        [SETUP, RERUN, TEARDOWN, DONE],  # where is the next attempt?
        [SETUP, RERUN, TEARDOWN, {"again": True}, DONE],
        [SETUP, RERUN, TEARDOWN, {"again": True}, CALL, DONE],
        [SETUP, RERUN, TEARDOWN, {"again": True}, {"again": True}, DONE],
        [SETUP, RERUN, TEARDOWN, {"again": True}, TEARDOWN, DONE],
        [SETUP, report("call", "rerun", longrepr="why", attributes={"rerun": "x"})],
    ],
)
def test_another_attempt_that_is_none(told, said):
    result = told(*said, args=["-p", "pytest_rerunfailures"])
    outcomes = result.parseoutcomes()
    assert outcomes.pop("passed") == 1
    assert outcomes.pop("rerun", 1) == 1
    assert outcomes in ({"errors": 1}, {"failed": 1})
    result.stdout.fnmatch_lines(["*GuestLost*protocol*", "PASSED *test_two*"])


def test_an_interpreter_that_is_lost(told):
    result = told(SETUP, {"exit": 3, "tail": EVIL})
    result.assert_outcomes(failed=1, passed=1)


def test_texts_with_tricks(told):
    skipped = report("setup", "skipped", longrepr=[EVIL, 1, EVIL])
    told(skipped, TEARDOWN, DONE).assert_outcomes(skipped=1, passed=1)
    failed = report("call", "failed", longrepr=EVIL, sections=[[EVIL, EVIL]], wasxfail=EVIL)
    told({"output": EVIL}, SETUP, failed, TEARDOWN, DONE, args=["-s", "-v"]).assert_outcomes(
        failed=1, passed=1
    )


@pytest.mark.parametrize("args", [(), ("-v",), ("-s", "-vv")])
def test_a_stop_with_tricks(told, args):
    result = told(SETUP, CALL, TEARDOWN, {"done": ONE, "stop": EVIL}, args=args)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*over*"])


@pytest.mark.parametrize("status", [None, 7, -1, 10**300, "x", True])
def test_an_exit_with_tricks(told, status):
    result = told(SETUP, {"interrupted": EVIL, "how": "left", "status": status})
    assert result.ret == (7 if status == 7 else 1 if status is True else 2)
    result.stdout.fnmatch_lines(["*Exit: over*"])


@pytest.mark.parametrize(
    ("how", "status", "text"),
    [("failed", 1, "no tests ran"), ("stopped", 2, "Interrupted: over")],
)
def test_another_end_with_tricks(told, how, status, text):
    result = told(SETUP, {"interrupted": EVIL, "how": how})
    assert result.ret == status
    result.stdout.fnmatch_lines([f"*{text}*"])


@pytest.mark.parametrize("how", ["key", [EVIL], None])
def test_an_interruption_with_tricks(told, how):
    with pytest.raises(KeyboardInterrupt):  # which pytester passes on
        told(SETUP, {"interrupted": EVIL, "how": how})


@pytest.mark.parametrize("failed", [{"longrepr": None}, {"longrepr": EVIL}, {"outcome": 3}])
def test_a_file_that_was_not_collected(told, failed):
    why = {"nodeid": "x", "outcome": "failed", "longrepr": "why", **failed}
    result = told(items=[], failed={"test_suite.py": why})
    assert result.parseoutcomes() == {"errors": 2}


def test_live_output_that_the_terminal_cannot_show(told, monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(side_messages, "sys", SimpleNamespace(stdout=file, stderr=file))
    told(SETUP, {"output": "ü€\n", "of": 1}, CALL, TEARDOWN, DONE).assert_outcomes(passed=2)
    assert file.buffer.getvalue() == rb"\xfc\u20ac" + b"\n"


@pytest.mark.parametrize("kind", ["attribute", "property", "x", 3])
@pytest.mark.parametrize("name", ["time", "name", "xmlns", "a b", "", EVIL, "é", "x" * 10_000])
def test_what_a_test_records_for_junit(told, kind, name):
    said = {"junit": kind, "name": name, "value": EVIL + "\ud800<&>\"'"}
    told(SETUP, said, CALL, TEARDOWN, DONE).assert_outcomes(passed=2)


def test_rubbish_said_while_collecting_is_not_heard_out_again_and_again(suite, monkeypatch):
    """Each guest would say it: the tests that share it are errors, and the run ends."""
    opened = []

    def open_one(self, plan):
        script: Any = Script([])
        opened.append(plan.plain)
        payload: Any = None
        return Lease(
            guest=script,
            payload=payload,
            tree="/there",
            place=PLACE,
            connection=Connection(script, script, patience=1.0),
            reader=ReportReader("/there", suite.path, {}),
            config={},
            stack=ExitStack(),
        )

    def started(supervisor, config, *, timeout):
        return GuestSession(supervisor), [{"warning": 3, "when": "collect"}]

    monkeypatch.setattr(provisioning.Provisioner, "open", open_one)
    monkeypatch.setattr(GuestSession, "started", started)
    suite.write(SUITE)
    result = suite.run("-rA")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*GuestLost*protocol*"])
    assert len(opened) == 1


@pytest.mark.parametrize("about", [None, {}, {"phase": "never"}, {"phase": ["call"]}, "call"])
def test_a_stop_that_is_none(told, about):
    told({"stopped": about}).assert_outcomes(errors=1, passed=1)


def test_a_guest_that_stops_for_ever(told, monkeypatch):
    """The time of stops does not count, so their number is limited."""
    monkeypatch.setattr(debugging, "_MAX_STOPS", 5)
    stop = {"stopped": {"phase": "call", "error": EVIL, "first": True, "stands": True}}
    told(SETUP, *[stop] * 5, CALL, TEARDOWN, DONE).assert_outcomes(passed=2)
    result = told(SETUP, *[stop, {"terminal": EVIL}] * 5, CALL, TEARDOWN, DONE)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*it stopped more than 5 times in one test*"])
