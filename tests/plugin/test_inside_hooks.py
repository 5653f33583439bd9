"""Hooks of other plugins that fail for tests inside guests: they end nothing, and are told once.

The guest is this machine, as in `tests/differential`.
"""

import re
import xml.etree.ElementTree as ET

import pytest

from support.inside import Suite

# Each does on this side only what would end a run.
HERE = """
import os

import pytest

def here():
    return "VMSANDBOX_GUEST" not in os.environ

"""
HOOKS = {
    "a report that needs what the setup made": (
        "pytest_runtest_makereport",
        """
def pytest_runtest_setup(item): item.started = {}

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    item.started[call.when] = call.start
    return (yield)
""",
    ),
    "a wrapper that raises when the report is made": (
        "pytest_runtest_makereport",
        """
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if here(): pytest.fail("no")
    return report
""",
    ),
    "a report that is none": (
        "pytest_runtest_makereport",
        """
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    return "nonsense" if here() else None
""",
    ),
    "told of a report": (
        "pytest_runtest_logreport",
        """
def pytest_runtest_logreport(report):
    if here(): raise KeyError(report.nodeid[:4])
""",
    ),
    "told of a report, before all others": (
        "pytest_runtest_logreport",
        """
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report):
    if here(): raise KeyError("first")
""",
    ),
    "told of a report, after all others": (
        "pytest_runtest_logreport",
        """
@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    if here(): raise KeyError("last")
""",
    ),
    "a wrapper that raises before the others are told": (
        "pytest_runtest_logreport",
        """
@pytest.hookimpl(wrapper=True)
def pytest_runtest_logreport(report):
    if here(): raise KeyError("before")
    return (yield)
""",
    ),
    "a wrapper that raises after the others were told": (
        "pytest_runtest_logreport",
        """
@pytest.hookimpl(wrapper=True)
def pytest_runtest_logreport(report):
    yield
    if here(): raise KeyError("after")
""",
    ),
    "an old wrapper that raises before the others are told": (
        "pytest_runtest_logreport",
        """
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_logreport(report):
    if here(): raise KeyError("before")
    yield
""",
    ),
    "told that a test starts": (
        "pytest_runtest_logstart",
        """
def pytest_runtest_logstart(nodeid):
    if here(): raise KeyError("start")
""",
    ),
    "told that a test ends": (
        "pytest_runtest_logfinish",
        """
def pytest_runtest_logfinish(nodeid):
    if here(): pytest.skip("I skip")
""",
    ),
    "told of a warning": (
        "pytest_warning_recorded",
        """
def pytest_warning_recorded(when):
    if here() and when == "runtest": raise KeyError("warned")
""",
    ),
}
TESTS = """
import os
import warnings

def test_ok(): warnings.warn("mind this")

def test_dies(): os._exit(1)

def test_fails(): assert not os.environ

def test_ok_again(): pass
"""


@pytest.fixture
def suite(tmp_path_factory):
    return Suite(tmp_path_factory.mktemp("s"))


def outcomes(junit):
    """For each test of junit's file, in order, what is wrong with it."""
    cases = ET.parse(junit).iter("testcase")
    return [[part.tag for part in case if part.tag in {"failure", "error"}] for case in cases]


@pytest.mark.parametrize("kind", HOOKS)
def test_all_else_is_as_without_it(suite, kind):
    check(suite, *HOOKS[kind], isolation="session")


def test_also_where_each_test_has_a_guest_of_its_own(suite):
    check(suite, *HOOKS["a report that needs what the setup made"], isolation="test")


def check(suite, name, source, *, isolation):
    (suite.path / "conftest.py").write_text(HERE + source)
    suite.write("test_it.py", TESTS)
    junit = suite.folder / "junit.xml"
    status, output = suite.run("--in-vm", f"--vm-isolation={isolation}", f"--junitxml={junit}")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "INTERNALERROR" not in output
    assert "2 failed, 2 passed, " in output
    assert output.count("UserWarning: mind this") == 1
    assert outcomes(junit) == [[], ["failure"], ["failure"], []]
    assert "FAILED test_it.py::test_dies[debian-13]" in output
    told = re.findall(r"^vmsandbox: the hook (\w+) of a plugin", output, re.MULTILINE)
    assert set(told) == {name}
    assert len(told) <= 2


def test_a_run_is_not_green_if_a_report_may_have_been_lost_on_its_way(suite):
    (suite.path / "conftest.py").write_text(HERE + HOOKS["told of a report"][1])
    suite.write("test_it.py", "def test_ok(): pass\n")
    status, output = suite.run("--in-vm")
    assert "1 passed" in output
    assert status == pytest.ExitCode.TESTS_FAILED


def test_pytest_exit_in_a_hook_ends_the_run(suite):
    (suite.path / "conftest.py").write_text(
        HERE + "def pytest_runtest_logreport(report):\n    if here(): pytest.exit('enough', 7)\n"
    )
    suite.write("test_it.py", TESTS)
    status, output = suite.run("--in-vm")
    assert status == 7, output


@pytest.mark.parametrize("place", ["in the middle", "at the end"])
def test_a_hook_of_ours_that_fails_when_a_guest_ends(suite, place):
    with (suite.folder / "host_plugin.py").open("a") as file:
        file.write(
            "def pytest_vmsandbox_guest_stopping(config, guest, failed):\n"
            "    raise ValueError('cannot stop')\n"
        )
    lost = "import os, signal\n\ndef test_lost():\n    os.kill(os.getppid(), signal.SIGKILL)\n"
    suite.write("test_it.py", (lost if place == "in the middle" else "") + "def test_ok(): pass\n")
    status, output = suite.run("--in-vm")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "INTERNALERROR" not in output
    assert "1 passed" in output
    assert "ValueError('cannot stop')" in output


def test_an_item_whose_class_cannot_show_our_errors(suite):
    """A test of a plugin's own kind, in a file that the guest cannot collect."""
    (suite.path / "conftest.py").write_text(
        HERE
        + """
class Mine(pytest.Item):
    def runtest(self): os._exit(3)
    def repr_failure(self, excinfo, style=None): return None if self.name == "none" else 1 / 0
    def reportinfo(self): return self.path, 0, self.name

class File(pytest.File):
    def collect(self): return [Mine.from_parent(self, name=name) for name in ("none", "raises")]

def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".mine": return File.from_parent(parent, path=file_path)
"""
    )
    suite.write("a.mine", "")
    suite.write("test_it.py", "def test_ok(): pass\n")
    status, output = suite.run("--in-vm")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "2 failed, 1 passed" in output
    assert output.count("InterpreterLost") >= 2
