"""What is left of guests in which tests have failed, and what is told of them.

The guest is this machine, as in `tests/differential`.
"""

import pytest

from support.inside import Suite
from support.junit import properties


@pytest.fixture
def suite(tmp_path_factory):
    suite = Suite(tmp_path_factory.mktemp("s"))
    with (suite.folder / "host_plugin.py").open("a") as file:
        file.write(
            "def pytest_vmsandbox_guest_stopping(config, guest, failed):\n"
            f"    with open({str(suite.folder / 'stopped')!r}, 'a') as file:\n"
            "        print(guest.name, failed, file=file)\n"
        )
    return suite


def run(suite, *args):
    return suite.run("--in-vm", f"--vm-artifacts={suite.folder / 'kept'}", *args)


def kept(suite):
    """The artifacts, relative to their folder."""
    folder = suite.folder / "kept"
    return sorted(str(it.relative_to(folder)) for it in folder.rglob("*") if it.is_file())


def stopped(suite):
    return (suite.folder / "stopped").read_text().splitlines()


FILES = ("console.log", "processes.txt", "screenshot.png")
TESTS = """
def test_good(): pass

def test_bad(): assert False

def test_worse(): assert False
"""


@pytest.mark.parametrize("isolation", ["session", "module"])
def test_each_test_that_fails_has_what_its_guest_has_said(suite, isolation):
    suite.write("test_one.py", TESTS)
    suite.write("test_two.py", "def test_good(): pass\n")
    status, output = run(suite, f"--vm-isolation={isolation}")
    assert status == 1, output
    assert kept(suite) == [
        f"test_one.py-test_{test}-debian-13/debian-13-1/{file}"
        for test in ("bad", "worse")
        for file in FILES
    ]
    log = suite.folder / "kept/test_one.py-test_worse-debian-13/debian-13-1/console.log"
    assert log.read_text() == "debian-13-1 boots"
    assert output.count(f"artifacts: {log.parents[1]}\n") == 1
    clean = ["debian-13-2 False"] if isolation == "module" else []
    assert stopped(suite) == ["debian-13-1 True", *clean]


def test_a_guest_of_its_own(suite):
    suite.write("test_one.py", TESTS)
    status, output = run(suite, "--vm-isolation=test")
    assert status == 1, output
    assert kept(suite) == [
        f"test_one.py-test_{test}-debian-13/debian-13-{number}/{file}"
        for number, test in enumerate(("bad", "worse"), 2)
        for file in FILES
    ]
    assert stopped(suite) == ["debian-13-1 False", "debian-13-2 True", "debian-13-3 True"]


def test_a_guest_that_is_lost_has_failed(suite):
    suite.write(
        "test_one.py",
        "import os\nimport signal\n\n"
        "def test_lost():\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    status, output = run(suite)
    assert status == 1, output
    assert {line.split()[1] for line in stopped(suite)} == {"True"}


def test_a_test_that_only_guests_know_is_reproduced_by_its_file(suite):
    """Its own name is no argument for pytest here."""
    only_there = "import os\nif 'PYTHONPATH' in os.environ: raise ImportError\n"
    suite.write("test_one.py", f"{only_there}def test_lost(): os._exit(3)\n")
    status, output = run(suite)
    assert status == 1, output
    assert "reproduce: pytest test_one.py --in-vm\n" in output


ENDS_WHERE_IT_IS_COLLECTED = """
import os
import signal

if "VMSANDBOX_GUEST" in os.environ:
    {}

def test_lost(): pass

def test_next(): pass
"""


@pytest.mark.parametrize(
    "how",
    ["os.kill(os.getppid(), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)"],
    ids=["guest", "interpreter"],
)
def test_an_error_while_it_collects_says_how_to_see_it_again(suite, how):
    suite.write("test_one.py", ENDS_WHERE_IT_IS_COLLECTED.format(how))
    status, output = run(suite)
    assert status == 1, output
    assert "2 errors" in output
    folder = suite.folder / "kept/test_one.py-test_lost-debian-13"
    assert f"artifacts: {folder}\n" in output
    assert "reproduce: pytest 'test_one.py::test_lost[debian-13]' --in-vm\n" in output
    assert (folder / "debian-13-1/console.log").exists()


def test_junit_has_the_guest_of_every_case_and_the_artifacts_of_those_that_failed(suite):
    suite.write("test_one.py", TESTS)
    junit = suite.folder / "junit.xml"
    run(suite, f"--junitxml={junit}")
    assert properties(junit) == {
        "test_good[debian-13]": {"vm": "debian-13"},
        **{
            f"test_{name}[debian-13]": {
                "vm": "debian-13",
                "vm_artifacts": str(suite.folder / f"kept/test_one.py-test_{name}-debian-13"),
            }
            for name in ("bad", "worse")
        },
    }
