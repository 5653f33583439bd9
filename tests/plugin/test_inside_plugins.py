"""Tests inside guests beside other plugins, which have to do with how a test is run.

The guest is this machine, as in `tests/differential`.
"""

import pytest

from support.inside import Suite


@pytest.fixture
def suite(tmp_path_factory):
    return Suite(tmp_path_factory.mktemp("s"))


# -- pytest-timeout ---------------------------------------------------------------------------------

HANGS = """
import time

import pytest

def hang():
    time.sleep(90)

{mark}
def test_hangs():
    hang()

def test_next(): pass

@pytest.mark.in_vm(False)
def test_here(): pass
"""


@pytest.mark.parametrize(
    ("mark", "args", "ini"),
    [
        ("@pytest.mark.timeout(1)", (), ""),
        ("@pytest.mark.timeout(1, method='thread')", (), ""),
        ("", ("--timeout=1",), ""),
        ("", (), "timeout = 1\nfilterwarnings = error\n"),
        ("@pytest.mark.timeout(1)\n@pytest.mark.vm(test_timeout=80)", (), ""),
        ("@pytest.mark.timeout(80)\n@pytest.mark.vm(test_timeout=1)", (), ""),
    ],
    ids=["marker", "thread", "option", "ini", "shorter than ours", "longer than ours"],
)
def test_a_limit_of_pytest_timeout(suite, mark, args, ini):
    """It fails the test that hangs, with its stack; the run and the guest go on."""
    (suite.path / "pytest.ini").write_text(f"[pytest]\n{ini}")
    suite.write("test_it.py", HANGS.format(mark=mark))
    status, output = suite.run("--in-vm", *args)
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "1 failed, 2 passed" in output
    assert "the test did not end within 1 s, and its interpreter was killed" in output
    assert 'test_it.py", line 7 in hang\n' in output
    assert suite.guests == ["debian-13-1"]


@pytest.mark.parametrize(
    ("mark", "ini"),
    [
        ("@pytest.mark.timeout(1, func_only=True)", ""),
        ("@pytest.mark.timeout(80, func_only=True)\n@pytest.mark.vm(test_timeout=1)", ""),
        ("", "timeout = 1\ntimeout_func_only = true"),
    ],
    ids=["marker", "longer than ours", "ini"],
)
def test_a_limit_of_the_function_alone(suite, mark, ini):
    (suite.path / "pytest.ini").write_text(f"[pytest]\n{ini}")
    suite.write("test_it.py", HANGS.format(mark=mark))
    status, output = suite.run("--in-vm")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "1 failed, 2 passed" in output
    assert "the test did not end within 1 s, and its interpreter was killed" in output


def test_a_limit_of_the_function_alone_leaves_fixtures_their_time(suite):
    suite.write(
        "test_it.py",
        """
import time

import pytest

@pytest.fixture
def slow():
    time.sleep(1.5)
    yield
    time.sleep(1.5)

@pytest.mark.timeout(1, func_only=True)
def test_is_quick(slow): pass

@pytest.mark.timeout(1, func_only=True)
def test_is_not(slow): time.sleep(90)
""",
    )
    status, output = suite.run("--in-vm")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "1 failed, 1 passed" in output


# -- hooks of plugins that stay here ----------------------------------------------------------------


@pytest.mark.parametrize("place", ["conftest.py", "mine.py"])
def test_hooks_that_are_unknown_in_the_guest(suite, place):
    """Those of ours and of host-only plugins, which conftest files and plugins of users may have."""
    suite.write(
        place,
        "def pytest_vmsandbox_guest_ready(config, guest): print('it is', guest.name)\n\n"
        "def pytest_xdist_setupnodes(config, specs): pass\n\n",
    )
    suite.write("test_it.py", "def test_there(): pass\n")
    status, output = suite.run("--in-vm", "-s", *(["-p", "mine"] if place == "mine.py" else []))
    assert status == 0, output
    assert "1 passed" in output
    assert output.count("it is debian-13-1") == 1


# -- plugins that take over the protocol of a test ------------------------------------------------

FAILS = """
import os

import pytest

{mark}
def test_fails():
    print(f"it runs in {{os.environ['VMSANDBOX_GUEST']}}, child of {{os.getppid()}}")
    assert not os.environ["VMSANDBOX_GUEST"]

def test_next(): pass
"""
DOES_NOTHING = "vmsandbox: {} has no effect on tests that run inside a guest"
NO_RERUNS = "vm_guest_plugins = pytest_cov"
ASKED = {
    "reruns": ("pytest-rerunfailures", "", ("--reruns=2",), NO_RERUNS),
    "forced": ("pytest-rerunfailures", "", ("--force-reruns=2",), NO_RERUNS),
    "flaky": ("pytest-rerunfailures", "@pytest.mark.flaky(reruns=2)", (), NO_RERUNS),
    "ini": ("pytest-rerunfailures", "", (), f"reruns = 2\n{NO_RERUNS}"),
    "forked": ("pytest-forked", "", ("--forked",), ""),
    "marked forked": ("pytest-forked", "@pytest.mark.forked", (), ""),
}


@pytest.mark.parametrize(("plugin", "mark", "args", "ini"), ASKED.values(), ids=ASKED)
def test_a_plugin_that_takes_over(suite, plugin, mark, args, ini):
    """The test runs in its guest all the same, once, and it is told that the plugin does nothing."""
    (suite.path / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
    suite.write("test_it.py", FAILS.format(mark=mark))
    status, output = suite.run("--in-vm", *args)
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert output.count("it runs in debian-13-1, child of") == 1
    assert "1 failed, 1 passed in" in output
    assert output.count(DOES_NOTHING.format(plugin)) == 1


def test_nothing_is_said_where_no_test_is_of_a_guest(suite):
    suite.write("test_it.py", "import pytest\n\n@pytest.mark.flaky\ndef test_here(): pass\n")
    status, output = suite.run("--reruns=1")
    assert status == 0, output
    assert "vmsandbox:" not in output


def test_it_is_told_of_xdists_workers_too(suite):
    suite.write("test_it.py", "def test_there(): pass\n")
    status, output = suite.run("--in-vm", "--forked", "-n", "2")
    assert status == 0, output
    assert output.count(DOES_NOTHING.format("pytest-forked")) == 1


def test_both_sides_report_beside_reruns(suite):
    """A plugin that looks at all reports of a test finds those of all phases."""
    suite.write(
        "test_it.py",
        """
import os
import signal

import pytest

@pytest.fixture(scope="module")
def shared():
    yield
    raise RuntimeError("late")

@pytest.mark.in_vm(False)
def test_here(shared): pass

def test_dies(): os.kill(os.getpid(), signal.SIGKILL)

def test_next(): pass
""",
    )
    status, output = suite.run("--in-vm", "--reruns=1")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "INTERNALERROR" not in output
    assert "1 failed, 2 passed, 1 error" in output


# -- pytest-xdist -----------------------------------------------------------------------------------

GROUPED = """
import unittest

import pytest

@pytest.mark.xdist_group("{0}")
@pytest.mark.parametrize("value", ["a", "b"])
def test_it(value): pass

@pytest.mark.xdist_group("{0}")
class TestIt(unittest.TestCase):
    def test_it(self): pass
"""


def test_groups(suite):
    """On this side a test's group is a part of its name, and no guest knows it.

    With pytest 9.2, which lets nobody change a name, xdist 3.8 knows no groups.
    """
    for name in ("one", "two"):
        suite.write(f"test_{name}.py", GROUPED.format("together"))
    status, output = suite.run("--in-vm", "-v", "-n2", "--dist=loadgroup")
    assert status == 0, output
    assert "6 passed" in output
    assert "the ids of its parameters differ" not in output
    if "@together" in output:
        assert suite.guests == ["debian-13-1"]


def test_a_late_teardown_of_a_guest_that_others_follow(suite):
    """A worker does not know whether more tests of a guest come: then no test is left to tell it."""
    suite.write(
        "test_it.py",
        """
import os

import pytest

@pytest.fixture(scope="session", autouse=True)
def all_of_them():
    yield
    if os.environ["VMSANDBOX_GUEST"].startswith("debian-12"):
        raise RuntimeError("late")

def test_a(): pass
""",
    )
    status, output = suite.run("--in-vm", "--vm=debian-13", "--vm=debian-12", "-n1")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "2 passed in" in output
    assert "vmsandbox: ending the guests of tests inside failed: debian-12-1: " in output
    assert "RuntimeError: late" in output


NAMES = """
import os

import pytest

@pytest.mark.in_vm(False)
def test_here(worker_id, testrun_uid): note("here", worker_id, testrun_uid)

@pytest.mark.parametrize("number", range(4))
def test_there(worker_id, testrun_uid, number): note("there", worker_id, testrun_uid)

def note(side, worker_id, testrun_uid):
    names = [os.environ[f"PYTEST_XDIST_{name}"] for name in ("WORKER", "TESTRUNUID", "WORKER_COUNT")]
    assert names == [worker_id, testrun_uid, "2"]
    with open(__file__ + ".notes", "a") as file:
        print(side, worker_id, testrun_uid, file=file)
"""


@pytest.mark.parametrize("isolation", ["session", "test"])
def test_which_worker_it_is(suite, isolation):
    suite.write("test_it.py", NAMES)
    status, output = suite.run("--in-vm", "-n2", f"--vm-isolation={isolation}")
    assert status == 0, output
    assert "5 passed" in output
    notes = [line.split() for line in (suite.path / "test_it.py.notes").read_text().splitlines()]
    assert {side for side, _, _ in notes} == {"here", "there"}
    assert {worker for _, worker, _ in notes} == {"gw0", "gw1"}
    assert len({run for _, _, run in notes}) == 1


def test_a_run_without_workers_has_one_name(suite):
    """Also where each test has a guest of its own."""
    suite.write(
        "test_it.py",
        "import os\n\nimport pytest\n\n"
        "@pytest.mark.parametrize('number', range(2))\n"
        "def test_there(worker_id, testrun_uid, number):\n"
        "    assert not any(name.startswith('PYTEST_XDIST') for name in os.environ)\n"
        "    with open(__file__ + '.notes', 'a') as file:\n"
        "        print(worker_id, testrun_uid, file=file)\n",
    )
    status, output = suite.run("--in-vm", "--vm-isolation=test")
    assert status == 0, output
    notes = (suite.path / "test_it.py.notes").read_text().splitlines()
    assert len(notes) == 2
    assert len(set(notes)) == 1


@pytest.mark.parametrize(("isolation", "guests"), [("session", 2), ("module", 2), ("test", 4)])
def test_files_on_workers(suite, isolation, guests):
    """Each worker has guests of its own; with `loadfile`, one for a file."""
    for name in ("one", "two"):
        suite.write(f"test_{name}.py", "def test_a(): pass\n\ndef test_b(): pass\n")
    status, output = suite.run("--in-vm", "-n2", "--dist=loadfile", f"--vm-isolation={isolation}")
    assert status == 0, output
    assert "4 passed" in output
    assert len(suite.guests) == guests
