"""What plugins and conftest files of a guest hang on reports, and what else they tell.

The guest is this machine, as in `tests/differential`. `tests/compatibility` has the plugins of others.
"""

import json

import pytest

from support.inside import Suite


@pytest.fixture
def suite(tmp_path_factory):
    return Suite(tmp_path_factory.mktemp("s"))


HANGS = """
import enum
import os
import pathlib

import pytest

class Colour(enum.Enum):
    RED = 1

VALUES = {
    "mine": {"a": [1, 2.5, None, True], "b": ("c", {})},
    "_private": "text",
    "path": pathlib.Path("/somewhere"),
    "members": {"colour": Colour.RED, 3: b"bytes"},
    "here": os.path.dirname(__file__) + "/x",
    "an_object": object(),
    "a_function": len,
    "too_deep": [],
    "too_much": "x" * 7_000_000,
    "failed": True,
    "vm_infrastructure": True,
    "outcome": "failed",
}
loop = VALUES["too_deep"]
loop.append([loop, loop])

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if "VMSANDBOX_GUEST" in os.environ and call.when == "call":
        vars(report).update(VALUES, outcome="passed")
    return report

def pytest_runtest_logreport(report):
    if "VMSANDBOX_GUEST" not in os.environ and report.when == "call":
        found = {name: getattr(report, name, "none") for name in VALUES}
        print("seen:", __import__("json").dumps(found))
"""


def test_attributes_of_reports(suite):
    """What JSON has comes here, also by way of xdist; for all else there is a line."""
    suite.write("conftest.py", HANGS)
    suite.write("test_it.py", "def test_there(): pass\n\ndef test_next(): pass\n")
    status, output = suite.run("--in-vm", "-s", "-n1")
    assert status == 0, output
    assert "2 passed" in output
    (seen, *_) = (it for it in output.splitlines() if "seen: " in it)
    assert json.loads(seen.partition("seen: ")[2]) == {
        "mine": {"a": [1, 2.5, None, True], "b": ["c", {}]},
        "_private": "text",
        "path": "/somewhere",
        "members": {"colour": "Colour.RED", "3": "bytes"},
        "here": f"{suite.path}/x",
        "an_object": "none",
        "a_function": "none",
        "too_deep": "none",
        "too_much": "none",
        "failed": False,
        "vm_infrastructure": "none",
        "outcome": "passed",
    }
    for name in ("an_object", "a_function"):
        assert (
            output.count(
                f"a hook gives reports the attribute {name}, which does not come back from guests"
            )
            == 1
        )
    assert output.count("a hook gives reports the attribute members with values that") == 1
    for name in ("too_deep", "too_much"):
        assert (
            f"the attribute {name} of a report does not come back from the guest, because it is too large"
            in output
        )
    assert "the attribute mine" not in output


STATUS = """
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.function = item.function
    return report

def pytest_report_teststatus(report):
    if report.when == "call" and report.function.__name__ != "":
        return report.outcome, "?", "MINE"
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_status_that_cannot_be_told(suite, workers):
    """No test is lost from the count, and the run is not green."""
    suite.write("conftest.py", STATUS)
    suite.write("test_it.py", "def test_a(): pass\n\ndef test_b(): pass\n")
    status, output = suite.run("--in-vm", "-v", "-n", workers)
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "2 passed" in output
    assert output.count("the hook pytest_report_teststatus of a plugin or a conftest.py") == 1
    assert "no attribute 'function' (" in output


def test_a_status_that_cannot_be_told_here_ends_the_run(suite):
    """As in plain pytest."""
    suite.write("conftest.py", "def pytest_report_teststatus(report): report.nothing\n")
    suite.write("test_it.py", "def test_here(): pass\n")
    status, output = suite.run()
    assert status == pytest.ExitCode.INTERNAL_ERROR, output


TELLS = """
import os

import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    log = item.ihook.pytest_runtest_logreport
    if "VMSANDBOX_GUEST" in os.environ and call.when == "call":
        match item.name:
            case "test_renamed":
                report.nodeid += " (changed)"
            case "test_twice":
                log(report=report)
            case "test_many":
                report.user_properties += [("a", n) for n in range(12_000)]
            case "test_long":
                report.user_properties += [("a", "x" * 1000) for n in range(9_000)]
            case "test_retried":
                log(report=type(report)(item.nodeid, item.location, {}, "retried", None, "call"))
    return report
"""
TOLD = {
    "renamed": "a hook in the guest renames reports, here {} to test_it.py::test_renamed (changed).",
    "twice": "{}: its call was reported twice in the guest. Only the first report counts",
    "many": "{}: it has 12000 user properties, and some of them are lost. A guest sends at most 10,000",
    "long": "{}: it has 9000 user properties, and some of them are lost. A guest sends at most 10,000",
    "retried": "{}: a plugin in the guest reports the outcome retried. No plugin on this side knows it, so that report is left out",
}


def test_what_a_guest_cannot_tell_as_it_is(suite):
    """The test counts, its guest stays, and one line says what it was."""
    suite.write("conftest.py", TELLS)
    suite.write("test_it.py", "\n".join(f"def test_{name}(): pass" for name in TOLD))
    status, output = suite.run("--in-vm")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "5 passed in" in output
    for name, line in TOLD.items():
        assert output.count("vmsandbox: " + line.format(f"test_it.py::test_{name}[debian-13]")) == 1
    assert suite.guests == ["debian-13-1"]


LOGS = """
import logging
import threading

import pytest

@pytest.fixture
def logs():
    logging.getLogger("mine").info("from the setup")
    yield
    logging.info("from the teardown")

def test_a(logs):
    logging.debug("too low")
    logging.info("50%% of it")
    logging.warning("two %s", "words")
    try:
        raise ValueError("no")
    except ValueError:
        logging.exception("raised")
    many = [threading.Thread(target=logging.error, args=(f"thread {n} " + "x" * 5_000,)) for n in range(20)]
    for thread in many: thread.start()
    for thread in many: thread.join()

def test_b(): pass
"""


def test_live_logs_and_the_log_file(suite):
    """They have the lines of plain pytest. A test's outcome comes after those of its teardown."""
    suite.write("test_it.py", LOGS)
    args = ["--log-cli-level=INFO", "--log-file=the.log", "--log-file-level=WARNING"]
    shown, written = [], []
    for inside in ([], ["--in-vm"]):
        status, output = suite.run(*args, *inside)
        assert status == 0, output
        live = output.partition("\ntest_it.py::test_a")[2].partition("=====")[0].splitlines()
        in_order = [it for it in live if it and "thread " not in it and "vmsandbox" not in it]
        shown.append(sorted(" ".join(it.replace("[debian-13]", "").split()) for it in in_order))
        written.append(sorted((suite.path / "the.log").read_text().splitlines()))
    assert shown[0] == shown[1]
    assert "INFO mine:test_it.py:9 from the setup" in shown[1]
    assert written[0] == written[1]
    assert sum("thread " in it for it in written[1]) == 20


COVERED = """
import pytest

import lib

def test_a(cov):
    lib.covered()
    assert cov.get_option("run:branch") is False

def test_b(no_cover): lib.fixture()

@pytest.mark.no_cover
def test_c(): lib.marked()
"""


def test_fixtures_of_pytest_cov(suite):
    names = ("covered", "fixture", "marked")
    suite.write("lib.py", "\n".join(f"def {name}():\n    return 1\n" for name in names))
    suite.write("test_it.py", COVERED)
    status, output = suite.run("--in-vm", "--cov=lib", "--cov-report=term-missing")
    assert status == 0, output
    assert "3 passed" in output
    assert "5, 8" in next(it for it in output.splitlines() if it.startswith("lib.py"))


def test_fixtures_of_pytest_cov_that_measures_nothing(suite):
    suite.write("test_it.py", "def test_a(cov, no_cover): assert cov is None\n")
    status, output = suite.run("--in-vm")
    assert status == 0, output


def test_properties_of_the_suite(suite):
    suite.write(
        "test_it.py",
        """
import pytest

@pytest.fixture(scope="session", autouse=True)
def whole(record_testsuite_property):
    record_testsuite_property("begun", 1)
    yield
    record_testsuite_property("ended", "2")

def test_a(): pass
""",
    )
    status, output = suite.run("--in-vm", "--junitxml=junit.xml")
    assert status == 0, output
    text = (suite.path / "junit.xml").read_text()
    assert '<property name="begun" value="1" /><property name="ended" value="2" />' in text
