"""What is red in plain pytest is red inside, where it is no report that says so.

The guest is this machine, as in `tests/differential`.
"""

import xml.etree.ElementTree as ET

import pytest

from support.inside import Suite


@pytest.fixture
def suite(tmp_path_factory):
    return Suite(tmp_path_factory.mktemp("s"))


PROTOCOL = """
import pytest
from _pytest.runner import runtestprotocol

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    runtestprotocol(item, nextitem=nextitem, log=True)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
"""


def test_no_other_plugin_runs_it_here(suite):
    (suite.path / "sub").mkdir()
    suite.write("sub/conftest.py", PROTOCOL)
    suite.write("sub/test_it.py", f"def test_it(): open({str(suite.folder / 'ran')!r}, 'w')\n")
    status, output = suite.run("--in-vm")
    assert status == 1, output
    assert "1 error" in output
    assert "tried to run it on this machine" in output
    assert not (suite.folder / "ran").exists()


@pytest.mark.parametrize("isolation", ["session", "module", "test"])
def test_a_session_that_a_hook_has_failed(suite, isolation):
    suite.write(
        "conftest.py",
        "import os\n\ndef pytest_sessionfinish(session):\n"
        "    if 'VMSANDBOX_GUEST' in os.environ: session.exitstatus = 1\n",
    )
    suite.write("test_it.py", "def test_a(): pass\ndef test_b(): pass\n")
    status, output = suite.run("--in-vm", f"--vm-isolation={isolation}")
    assert status == 1, output
    assert "2 passed" in output
    assert output.count("pytest in this guest ended with status 1. No test caused that") == 1


def test_a_file_of_other_tests_that_cannot_be_collected_there(suite):
    """One worker tells it; in the guest of the other, pytest ends with status 1 for it, too."""
    suite.write("test_fine.py", "def test_ok(): pass\n")
    suite.write(
        "test_here.py",
        "import os\n\nassert 'VMSANDBOX_GUEST' not in os.environ\n\ndef test_it(): pass\n",
    )
    status, output = suite.run("--in-vm", "-n2")
    assert status == 1, output
    assert "1 passed, 1 error" in output
    assert "No test caused that" not in output


ENDS = """
import pytest

@pytest.fixture
def ends():
    yield
    {}

def test_first(): pass

def test_fails(ends): assert 0, "the reason"

def test_last(): pass
"""


@pytest.mark.parametrize("how", ["pytest.exit('enough', 1)", "raise KeyboardInterrupt"])
def test_what_a_test_told_before_it_ended_the_run(suite, how):
    suite.write("test_it.py", ENDS.format(how))
    junit = suite.folder / "junit.xml"
    _, output = suite.run("--in-vm", f"--junitxml={junit}")
    assert "1 failed, 1 passed" in output
    assert "the reason" in output
    names = [case.get("name") for case in ET.parse(junit).iter("testcase")]
    assert names == ["test_first[debian-13]", "test_fails[debian-13]"]


HOOK = """
import sys

import pytest

def {}:
    if "pytest_vmsandbox.plugin" not in sys.modules:  # in the guest
        raise {}
"""


@pytest.mark.parametrize(
    ("isolation", "hook", "raised", "status", "last"),
    [
        ("session", "pytest_sessionstart()", "pytest.Session.Failed('enough')", 1, "no tests ran"),
        ("session", "pytest_runtest_logfinish()", "pytest.Session.Failed('enough')", 1, "1 passed"),
        ("session", "pytest_runtest_protocol()", "pytest.Session.Interrupted('enough')", 2, "Interrupted: enough"),
        ("test", "pytest_collection_modifyitems()", "pytest.exit.Exception('enough', 7)", 7, "Exit: enough"),
    ],
)  # fmt: skip
def test_a_hook_that_ends_the_run(suite, isolation, hook, raised, status, last):
    """It ends as it would in plain pytest."""
    suite.write("conftest.py", HOOK.format(hook, raised))
    suite.write("test_it.py", "def test_a(): pass\ndef test_b(): pass\n")
    found, output = suite.run("--in-vm", f"--vm-isolation={isolation}")
    assert found == status, output
    assert last in output
    assert "error" not in output


def test_a_fixture_that_lets_the_session_fail(suite):
    suite.write("test_it.py", "def test_a(request): request.session.shouldfail = 'enough'\n")
    status, output = suite.run("--in-vm")
    assert status == pytest.ExitCode.TESTS_FAILED, output


@pytest.mark.parametrize(
    "hook",
    [
        "@pytest.hookimpl(tryfirst=True)\ndef pytest_configure(config):\n    SEEN.append(config.option.lvl)",
        "def pytest_cmdline_main(config):\n    SEEN.append(config.option.lvl)",
    ],
    ids=["configure", "main"],
)
def test_early_hooks_see_the_options(suite, hook):
    suite.write(
        "conftest.py",
        "import pytest\n\nSEEN = []\n\n"
        "def pytest_addoption(parser): parser.addoption('--lvl', default='1')\n\n"
        f"{hook}\n\n"
        "@pytest.fixture\ndef seen(): return SEEN\n",
    )
    suite.write("test_it.py", "def test_it(seen): assert seen == ['7']\n")
    status, output = suite.run("--in-vm", "--lvl=7")
    assert status == 0, output


ADDED = """
import pytest

def pytest_collection_modifyitems(items):
    first = items[0]
    {}
"""
AGAIN = """type(first).from_parent(
        first.parent, name=first.name, originalname=first.originalname, callobj=first.obj,
        callspec=getattr(first, "callspec", None), fixtureinfo=first._fixtureinfo)"""


@pytest.mark.parametrize(
    ("marker", "hook", "count"),
    [
        ("in_vm", f"items.append({AGAIN})", 2),
        ("other", "first.add_marker(pytest.mark.in_vm)", 1),
    ],
    ids=["a test", "the marker"],
)
def test_what_a_hook_has_added_runs_inside(suite, marker, hook, count):
    suite.write("conftest.py", ADDED.format(hook))
    suite.write("test_it.py", f"import os, pytest\n\n@pytest.mark.{marker}\n{THERE}")
    status, output = suite.run()
    assert status == 0, output
    assert f"{count} passed" in output


THERE = "def test_it(): assert 'VMSANDBOX_GUEST' in os.environ\n"
LATE = f"""
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    first = session.items[0]
    session.items.append({AGAIN})
"""


def test_what_comes_too_late_does_not_run_here(suite):
    suite.write("conftest.py", LATE)
    suite.write("test_it.py", f"import os, pytest\n\n@pytest.mark.in_vm\n{THERE}")
    status, output = suite.run()
    assert status == 1, output
    assert "1 passed, 1 error" in output
    assert "tried to run it on this machine" in output


def test_a_test_that_is_there_several_times_runs_so_often(suite):
    """It is the same item each time."""
    suite.write("conftest.py", "def pytest_collection_modifyitems(items): items *= 2\n")
    ran = suite.folder / "ran"
    test = f"def test_{{}}(): print('{{}}', file=open({str(ran)!r}, 'a'))\n"
    suite.write("test_it.py", "".join(test.format(name, name) for name in "ab"))
    status, output = suite.run("--in-vm")
    assert status == 0, output
    assert ran.read_text().split() == [*"abab"]


LEVELS = """
import enum

import pytest

class Level(enum.Enum):
    FAST = "fast"
    SLOW = "slow"

def pytest_addoption(parser):
    parser.addoption("--level", type=Level, default=Level.FAST)
    parser.addoption("--pair", default=(1, 2))

def pytest_collection_modifyitems(config, items):
    assert config.option.pair == (1, 2)
    if config.option.level is not Level.SLOW:
        for item in items: item.add_marker(pytest.mark.skip(reason="slow"))
"""


@pytest.mark.parametrize("is_given", [True, False])
def test_an_option_that_cannot_be_told(suite, is_given):
    """The guest has the default then: where another value was given, the run is not green."""
    suite.write("conftest.py", LEVELS)
    suite.write("test_it.py", "def test_it(): assert 0\n")
    status, output = suite.run("--in-vm", *(["--level=slow"] if is_given else []))
    assert status == (1 if is_given else 0), output
    assert "1 skipped" in output
    assert ("these options have their default values in guests" in output) == is_given


CHILD = """
import os

def test_it():
    if not (child := os.fork()):
        {does}
        return
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child has failed"
"""


@pytest.mark.parametrize(("does", "passed"), [("assert 1 == 2", False), ("pass", True)])
def test_the_child_of_a_test_that_forks(suite, does, passed):
    """It comes back into pytest, which ends with its own status there."""
    suite.write("test_it.py", CHILD.format(does=does))
    status, output = suite.run("--in-vm")
    assert status == (0 if passed else 1), output
    assert ("the child has failed" in output) is not passed
