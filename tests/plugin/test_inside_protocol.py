"""Tests inside guests among others: which guest they share, what is torn down when, Ctrl-C.

The guest is this machine, as in `tests/differential`.
"""

import signal

import pytest

from support.inside import Suite


@pytest.fixture
def suite(tmp_path_factory):
    return Suite(tmp_path_factory.mktemp("s"))


TWO = """
import os

import pytest

@pytest.fixture(scope="session")
def once():
    return os.getpid()

PIDS = []

def test_a(once): PIDS.append(once)

def test_b(once): PIDS.append(once)
"""


@pytest.mark.parametrize(("isolation", "guests"), [("session", 1), ("module", 2), ("test", 4)])
def test_isolation(suite, isolation, guests):
    suite.write("test_one.py", TWO)
    suite.write("test_two.py", TWO)
    status, output = suite.run("--in-vm", f"--vm-isolation={isolation}")
    assert status == 0, output
    assert "4 passed" in output
    assert suite.guests == [f"debian-13-{number + 1}" for number in range(guests)]


def test_the_marker_is_closer_than_the_option(suite):
    suite.write("test_one.py", f"{TWO}\npytestmark = pytest.mark.vm(isolation='test')\n")
    status, output = suite.run("--in-vm", "--vm-isolation=session")
    assert status == 0, output
    assert len(suite.guests) == 2


@pytest.mark.parametrize("isolation", ["session", "test"])
def test_warnings_of_the_collection(suite, isolation):
    """They are told once, whoever has collected; pytest tells them when it has."""
    warn = "import warnings\n\nwarnings.warn('{}')\n\ndef test_a(): pass\n\ndef test_b(): pass\n"
    suite.write("test_one.py", warn.format("of both sides"))
    only_there = "import os\n\nif 'PYTHONPATH' in os.environ: raise ImportError\n\n"
    suite.write("test_two.py", only_there + warn.format("of the guest"))
    status, output = suite.run("--in-vm", f"--vm-isolation={isolation}", "-s")
    assert status == 0, output
    assert "4 passed, 2 warnings" in output
    assert output.count("UserWarning: of both sides") == 1
    assert output.count("UserWarning: of the guest") == 1


def test_fixtures_of_both_sides(suite):
    """What is shared here stays for whom it is shared, and its end is told where it belongs."""
    suite.write(
        "test_both.py",
        """
import pytest

CALLS = []

@pytest.fixture(scope="module")
def shared():
    CALLS.append("up")
    yield
    raise RuntimeError("late")

def test_here(shared): assert CALLS == ["up"]

@pytest.mark.in_vm
def test_there(shared): assert CALLS == ["up"]

def test_here_again(shared): assert CALLS == ["up"]

@pytest.mark.in_vm
def test_last(): pass
""",
    )
    status, output = suite.run()
    assert status == 1, output
    assert "4 passed, 2 errors" in output
    assert "ERROR test_both.py::test_last[debian-13] - RuntimeError: late" in output


def test_interrupted(suite):
    """All is torn down in the guest, then here, and the status is pytest's own."""
    (suite.folder / "host_plugin.py").rename(suite.folder / "vmsandbox_host_plugin.py")
    suite.write(
        "test_long.py",
        """
import time

import pytest

@pytest.fixture(scope="session")
def session():
    yield
    print("the session is over")

@pytest.fixture
def mine(session):
    yield
    print("mine is over")

def test_long(mine):
    print("it runs", flush=True)
    time.sleep(90)

def test_next(): pass
""",
    )
    with suite.start("--in-vm", "-s") as process:
        output = ""
        while "it runs" not in output:
            more = process.stdout.readline()
            assert more, output
            output += more
        process.send_signal(signal.SIGINT)
        output += process.communicate(timeout=300)[0]
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    assert "mine is over\nthe session is over\n" in output
    assert "KeyboardInterrupt" in output
    assert "test_next" not in output


def test_a_test_that_stops_the_run(suite):
    suite.write(
        "test_stop.py",
        """
import pytest

def test_exits(): pytest.exit("enough", 7)

def test_never(): open("never", "w")
""",
    )
    status, output = suite.run("--in-vm", "-v")
    assert status == 7, output
    assert "_pytest.outcomes.Exit: enough" in output
    assert not (suite.path / "never").exists()


def test_an_unknown_option_of_a_conftest_reaches_the_guest(suite):
    suite.write(
        "conftest.py",
        """
def pytest_addoption(parser):
    parser.addoption("--flavour")
    parser.addini("places", "", type="linelist")
""",
    )
    suite.write(
        "test_it.py",
        """
import os

def test_it(pytestconfig):
    assert os.environ["VMSANDBOX_GUEST"] == "debian-13-1"
    assert pytestconfig.getoption("--flavour") == "mint"
    assert pytestconfig.getini("places") == ["a b", "c"]
    assert os.environ["GIVEN"] == "1"
""",
    )
    (suite.path / "pytest.ini").write_text(
        "[pytest]\nplaces =\n    a b\n    c\nvm_env = GIVEN=1\naddopts = --flavour=mint\n"
    )
    status, output = suite.run("--in-vm")
    assert status == 0, output


@pytest.mark.parametrize(("args", "worker"), [((), "master"), (("-n", "1"), "gw0")])
def test_fixtures_of_xdist(suite, args, worker):
    suite.write(
        "test_it.py",
        f"def test_it(worker_id, testrun_uid):\n    assert worker_id == {worker!r} and testrun_uid\n",
    )
    status, output = suite.run("--in-vm", *args)
    assert status == 0, output


def test_a_guest_that_is_lost_is_one_tests_error(suite):
    suite.write(
        "test_it.py",
        """
import os
import signal

def test_first(): pass

def test_kills_its_keeper():
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

def test_last(): pass
""",
    )
    status, output = suite.run("--in-vm")
    assert status == 1, output
    assert "2 passed, 1 error" in output
    # The second is for those of which each may have done it, one by one; the third for the rest.
    assert suite.guests == ["debian-13-1", "debian-13-2", "debian-13-3"]


def test_a_file_that_kills_the_session_that_collects_it(suite):
    """All are told why; nothing is tried again and again."""
    suite.write("test_it.py", "import os\n\nos.environ.get('VMSANDBOX_GUEST') and os._exit(9)\n"
                "def test_a(): pass\n\ndef test_b(): pass\n")  # fmt: skip
    status, output = suite.run("--in-vm")
    assert status == 1, output
    assert output.count("could not collect the tests: the interpreter ended with status 9") >= 2
    assert "2 errors" in output
    assert suite.guests == ["debian-13-1"]
