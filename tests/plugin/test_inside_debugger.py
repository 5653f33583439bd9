"""Debuggers of tests inside, at a real terminal. This machine plays the guest, and its SSH client."""

import json
import sys

import pytest

from support.at_terminal import Terminal
from support.environment import without_ours
from support.inside import SUPPORT, Suite

PDB = "(Pdb) "
SUITE = """
import os, sys, unittest, pytest

def test_fails():
    x = 41
    print("captured text")
    assert x == 42

class TestOld(unittest.TestCase):
    def setUp(self):
        self.open = True
    def tearDown(self):
        self.open = False
    def test_it(self):
        self.fail("old")

def test_breaks(capfd):
    y = 7
    breakpoint()
    y = 8
    print("printed after")
    assert capfd.readouterr().out == "printed after\\n"

@pytest.fixture
def ends_badly():
    yield
    z = 99
    raise ValueError("in teardown")

def test_ends_badly(ends_badly):
    assert not os.isatty(1)

def test_never_reached(): pass
"""


@pytest.fixture
def at_terminal(tmp_path):
    """Starts pytest at a terminal, in a suite of these tests."""
    suite, started = Suite(tmp_path), []
    (suite.path / "test_it.py").write_text(SUITE)
    environment = {
        **without_ours(), "PYTHONPATH": f"{SUPPORT.parent}:{SUPPORT}", "TMPDIR": str(tmp_path),
        "VMSANDBOX_CACHE": str(tmp_path / "c"), "VMSANDBOX_RUNTIME": str(tmp_path / "r"),
    }  # fmt: skip

    def start(*args):
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "vmsandbox_local"]
        started.append(Terminal([*argv, "--in-vm", *args], cwd=suite.path, env=environment))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


def test_post_mortem_of_each_failure_and_a_breakpoint(at_terminal):
    terminal = at_terminal("--pdb")
    terminal.dialogue(
        ("captured text", ""), ("E       assert 41 == 42", ""), ("entering PDB", ""),
        (PDB, "p x + 1"), ("\n42\n", ""),
        (PDB, "!print('be' + 'gun'); import time; time.sleep(1000)"), ("begun", "\x03"),
        ("KeyboardInterrupt", ""), (PDB, "where"),
        ("test_it.py(7)test_fails()\n-> assert x == 42", ""), (PDB, "c"),
        ("PDB continue (IO-capturing resumed)", ""),
        (PDB, "p self.open"), ("\nTrue\n", ""), (PDB, "c"),  # before its tearDown, as in plain pytest
        ("PDB set_trace", ""), (PDB, "p y"), ("\n7\n", ""), (PDB, "b 21"), (PDB, "c"),
        ('-> print("printed after")', ""), (PDB, "p y"), ("\n8\n", ""), (PDB, "c"),
        ("ValueError: in teardown", ""), (PDB, "p z"), ("\n99\n", ""), (PDB, "q"),
    )  # fmt: skip
    status, seen = terminal.end()
    assert status == 2
    end = seen.partition("short test summary info")[2]
    assert "Exit: Quitting debugger" in end
    assert "2 failed, 2 passed, 1 error" in end
    assert seen.count("captured text") == 2  # as output, and in the source: not again at the end


def test_a_trace_and_a_breakpoint_without_an_option(at_terminal):
    terminal = at_terminal("--trace", "-k", "test_never_reached")
    terminal.dialogue(("PDB runcall", ""), (PDB, "c"))
    assert terminal.end()[0] == 0
    terminal = at_terminal("-k", "test_breaks", "-s")
    terminal.dialogue(
        ("what follows is written by that guest", ""), ("PDB set_trace", ""), (PDB, "c")
    )
    status, seen = terminal.end()
    assert status == 0, seen


def test_without_a_terminal(tmp_path):
    suite = Suite(tmp_path)
    suite.write("test_it.py", SUITE)
    status, output = suite.run("--in-vm", "-k", "breaks")
    assert status == 1
    assert "vmsandbox.NoTerminal: breakpoint() needs a terminal. Run pytest at a terminal" in output
    status, output = suite.run("--in-vm", "--pdb")
    assert status == 4
    assert "--pdb needs a terminal for tests that run inside a guest" in output
    assert "--vm-keep=failed" in output
    assert len(suite.guests) == 1


ENDS = """
import faulthandler, os, signal, time, pytest

def test_fails(): assert not 41
def test_dies(): os._exit(3)
@pytest.mark.vm(test_timeout=1)
def test_hangs(): time.sleep(1000)
@pytest.mark.xfail(strict=True)
def test_strict(): pass

def too_late(*_):
    raise TimeoutError

@pytest.fixture
def limit():
    for number in (signal.SIGALRM, signal.SIGUSR1):
        signal.signal(number, too_late)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)

def test_alarm(limit):
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    faulthandler.dump_traceback_later(0.5, exit=True)
    assert not 43
def test_signal(limit): assert not os.getpid()
def test_passes(): pass
"""
NOTE = """
import json, os, signal, time
from pytest_vmsandbox.plugin.run import Run

def at_failure(self, item, phase, error, **about):
    if about:  # at the moment of the failure
        (lease,) = item.session.config.pluginmanager.get_plugin("vmsandbox-inside").leases._leases.values()
        alive = lease.session is not None and not lease.session._over
        with open("failures", "a") as file:
            file.write(json.dumps([item.name, phase, error, about["stands"], alive]) + "\\n")
        if item.name.startswith("test_alarm"):
            time.sleep(0.7)
        if item.name.startswith("test_signal"):
            os.kill(int(error.split()[-1]), signal.SIGUSR1)

Run.at_failure = at_failure
"""


def test_what_is_known_at_the_moment_of_each_failure(tmp_path):
    """An interpreter that hangs is still alive then, and no signal interrupts one that stands."""
    suite = Suite(tmp_path)
    suite.write("test_it.py", ENDS)
    with (tmp_path / "host_plugin.py").open("a") as file:
        file.write(NOTE)
    status, output = suite.run("--in-vm")
    assert status == 1, output
    rows = map(json.loads, (suite.path / "failures").read_text().splitlines())
    seen = [(name.partition("[")[0], *row) for name, *row in rows]
    signalled = seen.pop()
    assert (signalled[0], signalled[1], signalled[-1]) == ("test_signal", "call", True)
    assert seen == [
        ("test_fails", "call", "assert not 41", True, True),
        ("test_dies", "call", "the interpreter ended with status 3", False, False),
        ("test_hangs", "call", "the test did not end within 1 s", False, True),
        ("test_strict", "call", "[XPASS(strict)]", False, True),
        ("test_alarm", "call", "assert not 43", True, True),
    ]
    assert "ERROR test_it.py::test_signal" in output
    assert "6 failed, 1 passed, 1 error" in output


ALL = """
from pathlib import Path
import pytest

RAN = Path(__file__).with_name("ran")

@pytest.mark.parametrize("n", [1, 2])
def test_passes(n): RAN.open("a").write("x")
@pytest.mark.xfail
def test_xfails():
    RAN.open("a").write("x")
    assert 0
def test_fails(): assert 0
"""
KEEP = """
from pytest_vmsandbox.plugin.keeping import Keeping

def keep_each(self, item, names, occasion, only=None):
    if "folder" not in occasion.about:
        return  # what is known when the report comes, which is too late
    ran = (item.session.config.rootpath / "ran").read_text()
    outcome = "failed" if occasion.error else "passed"
    with open("kept", "a") as file:
        file.write(f"{item.originalname} {len(ran)} {occasion.phase} {outcome}\\n")

Keeping._keep_each = keep_each
"""


def test_the_guest_of_each_test_is_kept_before_another_one_runs_there(tmp_path):
    suite = Suite(tmp_path)
    suite.write("test_it.py", ALL)
    with (tmp_path / "host_plugin.py").open("a") as file:
        file.write(KEEP)
    status, output = suite.run("--in-vm", "--vm-keep=all")
    assert status == 1, output
    assert (suite.path / "kept").read_text().splitlines() == [
        "test_passes 1 call passed",
        "test_passes 2 call passed",
        "test_xfails 3 call passed",
        "test_fails 3 call failed",
    ]
