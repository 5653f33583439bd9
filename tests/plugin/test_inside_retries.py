"""A guest that the host or chance takes away: a fresh one is tried, once, and that is told.

The guest is this machine, as in `tests/differential`.
"""

import xml.etree.ElementTree as ET

import pytest

from support.inside import Suite

# On this side: a guest is lost as soon as a file says so.
LOSES = """
import pathlib
import threading
import time

from pytest_vmsandbox.plugin import RUN
from support.vmsandbox_local import end_all

FOLDER = pathlib.Path({folder!r})


class Loses:
    def pytest_vmsandbox_guest_ready(self, config, guest):
        place = config.stash[RUN].factory.folder / guest.name
        if (FOLDER / "lose-at-once").exists():
            self.lose(guest, place)
        else:
            threading.Thread(target=self.watch, args=(guest, place), daemon=True).start()

    def watch(self, guest, place):
        while guest.alive:
            if (place / "lose").exists():
                self.lose(guest, place)
            time.sleep(0.02)

    def lose(self, guest, place):
        guest.transient = {transient}
        guest.lost = f"{{guest.name}}: QEMU ended with signal SIGKILL"
        end_all(f"{{place}}/")
        (FOLDER / "is-lost").touch()


def pytest_configure(config):
    config.pluginmanager.register(Loses())
"""
# In the guest: it is lost here, the first so many times.
LOST_HERE = """
import os
import pathlib
import time

FOLDER = pathlib.Path({folder!r})


def own_guest():
    # Its supervisor was started with a folder in it.
    words = pathlib.Path(f"/proc/{{os.getppid()}}/cmdline").read_text().split(chr(0))
    return pathlib.Path(words[words.index("serve") + 1]).parent


def lost_here(most=1):
    times = FOLDER / "times"
    count = len(times.read_text()) if times.exists() else 0
    if count < most:
        times.write_text("x" * (count + 1))
        (own_guest() / "lose").touch()
        time.sleep(60)


"""


class Lossy(Suite):
    """A suite whose guests are lost where `lost_here` is called."""

    def loses(self, *, transient=True):
        with (self.folder / "host_plugin.py").open("a") as file:
            file.write(LOSES.format(folder=str(self.folder), transient=transient))

    def test(self, source):
        self.write("test_it.py", LOST_HERE.format(folder=str(self.folder)) + source)

    def properties(self, name):
        """What junit's file has of the retries of a test."""
        root = ET.parse(self.folder / "junit.xml")
        (case,) = (case for case in root.iter("testcase") if case.get("name").startswith(name))
        found = [(entry.get("name"), entry.get("value")) for entry in case.iter("property")]
        return [value for name, value in found if name == "vm_retried"]


@pytest.fixture
def suite(tmp_path_factory):
    return Lossy(tmp_path_factory.mktemp("s"))


def run(suite, *args):
    return suite.run("--in-vm", f"--junitxml={suite.folder / 'junit.xml'}", *args)


WHILE_COLLECTING = """
if "VMSANDBOX_GUEST" in os.environ:
    lost_here({most})

def test_one(): pass

def test_two(): pass

def test_three(): pass

def test_four(): pass

def test_five(): pass
"""


def test_while_it_collects(suite):
    suite.loses()
    suite.test(WHILE_COLLECTING.format(most=1))
    status, output = run(suite)
    assert status == 0, output
    assert "5 passed" in output
    assert suite.guests == ["debian-13-1", "debian-13-2"]
    told = (
        "retried in a fresh guest (test_it.py::test_one[debian-13]): debian-13-1: QEMU ended with"
    )
    assert output.count(told) == 1
    assert suite.properties("test_one") == ["debian-13-1: QEMU ended with signal SIGKILL"]
    assert suite.properties("test_two") == []


def test_each_time_while_it_collects(suite):
    """Three tests try two guests each. Then no more are tried, and what happened is told once."""
    suite.loses()
    suite.test(WHILE_COLLECTING.format(most=99))
    status, output = run(suite)
    assert status == 1, output
    assert "5 errors" in output
    assert suite.guests == [f"debian-13-{number}" for number in range(1, 7)]
    again = "test_it.py::test_three[debian-13] failed with the same error. Its report has the full text."
    assert output.count(again) == 2, output
    assert output.count("reproduce: pytest") == 3


def test_before_anything_was_done_in_it(suite):
    suite.loses()
    (suite.folder / "lose-at-once").touch()
    suite.test("def test_one(): pass")
    status, output = run(suite)
    assert status == 1, output
    assert "1 error" in output
    assert output.count("retried in a fresh guest") == 1
    assert suite.guests == ["debian-13-1", "debian-13-2"]


@pytest.mark.parametrize("isolation", ["test", "session"])
def test_while_a_test_runs(suite, isolation):
    suite.loses()
    suite.test(
        "def test_first(): pass\n\n"
        "def test_lost(): lost_here()\n\n"
        "def test_last(record_property): record_property('mine', 1)\n"
    )
    status, output = run(suite, f"--vm-isolation={isolation}")
    assert status == 0, output
    assert "3 passed" in output
    assert output.count("retried in a fresh guest (test_it.py::test_") == 1
    # The guest may be ahead of the reports: then it was lost while the first one's were awaited.
    assert len([*suite.properties("test_first"), *suite.properties("test_lost")]) == 1
    assert suite.properties("test_last") == []


def test_each_time_while_a_test_runs(suite):
    """The test stays an error, and the others run."""
    suite.loses()
    suite.test("def test_lost(): lost_here(99)\n\ndef test_next(): pass\n")
    status, output = run(suite)
    assert status == 1, output
    assert "1 passed, 1 error" in output
    assert output.count("retried in a fresh guest") == 1
    assert len(suite.guests) == 3  # two that it has lost, and that of the next one


def test_xdists_workers_tell_it_too(suite):
    suite.loses()
    suite.test("def test_lost(): lost_here()\n\ndef test_next(): pass\n")
    status, output = run(suite, "-n", "2")
    assert status == 0, output
    assert "2 passed" in output
    assert output.count("retried in a fresh guest (test_it.py::test_lost[debian-13])") == 1
    assert len(suite.properties("test_lost")) == 1


NOT_RETRIED = {
    "while it collects": (WHILE_COLLECTING.format(most=99), "5 errors"),
    "while a test runs": (
        "def test_lost(): lost_here(99)\n\ndef test_next(): pass\n",
        "1 passed, 1 error",
    ),
}


@pytest.mark.parametrize(("source", "outcome"), NOT_RETRIED.values(), ids=NOT_RETRIED)
def test_a_guest_that_is_itself_at_fault(suite, source, outcome):
    """A panic, for instance, comes again."""
    suite.loses(transient=False)
    suite.test(source)
    status, output = run(suite, "-x" if "collect" not in outcome else "-q")
    assert status == 1, output
    assert "retried" not in output


def test_a_session_that_cannot_start_again_in_its_guest_gets_a_fresh_one(suite):
    """A test has ruined the guest, and ended its interpreter."""
    suite.test(
        "if 'VMSANDBOX_GUEST' in os.environ and (FOLDER / os.environ['VMSANDBOX_GUEST']).exists():\n"
        "    os._exit(3)\n\n"
        "def test_ruins():\n"
        "    (FOLDER / os.environ['VMSANDBOX_GUEST']).touch()\n"
        "    os._exit(4)\n\n"
        "def test_next(): pass\n\n"
        "def test_last(): pass\n"
    )
    status, output = run(suite)
    assert status == 1, output
    assert "1 failed, 2 passed" in output
    assert suite.guests == ["debian-13-1", "debian-13-2"]


def test_a_session_that_cannot_start_is_told_once_in_full(suite):
    suite.test(
        "if 'VMSANDBOX_GUEST' in os.environ:\n    print('this is why', flush=True)\n    os._exit(3)\n"
        "def test_one(): pass\n\ndef test_two(): pass\n\ndef test_three(): pass\n"
    )
    status, output = run(suite, "-s")
    assert status == 1, output
    assert "3 errors" in output
    assert output.count("could not collect the tests") == 3
    assert output.count("reproduce: pytest") == 1
    assert output.count("failed with the same error") == 2


def test_a_loss_that_does_not_come_again_is_no_green_run(suite):
    """Whichever test did it, it did not do it when it ran alone."""
    suite.loses(transient=False)
    suite.test(
        "def test_first(): pass\n\ndef test_lost(): lost_here()\n\n"
        "def test_last(): pass\n\ndef test_really_last(): pass\n"
    )
    status, output = run(suite)
    assert status == 1, output
    assert "4 passed" in output
    assert "QEMU ended with signal SIGKILL" in output
    assert "retried" not in output


def test_a_test_that_has_failed_does_not_run_again(suite):
    suite.loses()
    suite.test(
        "import pytest\n\n@pytest.fixture\ndef late():\n    yield\n    lost_here()\n\n"
        "def test_fails(late, record_testsuite_property):\n"
        "    record_testsuite_property('once', 1)\n"
        "    assert not FOLDER\n\n"
        "def test_next(): pass\n"
    )
    status, output = run(suite, "--maxfail=5")
    assert status == 1, output
    assert "1 failed, 1 passed, 1 error" in output
    assert (suite.folder / "junit.xml").read_text().count('name="once"') == 1


@pytest.mark.parametrize("next_test", ["def test_next(): pass\n", ""], ids=["between", "last"])
def test_a_guest_that_dies_while_no_test_runs_in_it(suite, next_test):
    suite.loses(transient=False)
    suite.test(
        "import pytest\n\n"
        "def test_first(): (FOLDER / 'place').write_text(str(own_guest()))\n\n"
        "@pytest.mark.in_vm(False)\n"
        "def test_here():\n"
        "    pathlib.Path((FOLDER / 'place').read_text(), 'lose').touch()\n"
        "    while not (FOLDER / 'is-lost').exists():\n"
        "        time.sleep(0.01)\n\n" + next_test
    )
    status, output = run(suite, "--maxfail=5")
    assert status == 1, output
    assert f"{2 + bool(next_test)} passed" in output
    assert output.count("QEMU ended with signal SIGKILL") == 1
