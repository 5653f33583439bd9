"""Coverage of what runs inside guests, in the reports of pytest-cov on this side.

The guest is this machine, as in `tests/differential`, with a copy of the project.
"""

import json

import pytest

from support.inside import Suite

LIBRARY = """\
import os

def where():
    if "VMSANDBOX_GUEST" in os.environ:
        return "guest"
    return "host"

def late():
    return 1

def child():
    return 2

def never():
    return 3
"""
GUEST, HOST, LATE, CHILD, NEVER = 5, 6, 9, 12, 15
TESTS = """
import os
import signal
import subprocess
import sys

import pytest

import library

@pytest.fixture(scope="session")
def session():
    yield
    library.late()

@pytest.mark.in_vm
def test_there(session): assert library.where() == "guest"

@pytest.mark.in_vm
def test_starts():
    subprocess.run([sys.executable, "-c", "import library; library.child()"], check=True)

def test_here(): assert library.where() == "host"
"""


class Measured(Suite):
    """A suite that is run with coverage."""

    def __init__(self, folder):
        super().__init__(folder)
        self.write("library.py", LIBRARY)
        self.write("test_it.py", TESTS)

    def lines(self, *args, cov="--cov=.", status=0):
        """The lines of the library that were run, by pytest-cov's report."""
        ended, output = self.run(cov, "--cov-report=json", *args)
        assert ended == status, output
        self.output = output
        self.report = json.loads((self.path / "coverage.json").read_text())
        assert [it.name for it in self.path.glob(".coverage*") if "rc" not in it.name] == [
            ".coverage"
        ]
        return set(self.report["files"]["library.py"]["executed_lines"]) & {
            GUEST, HOST, LATE, CHILD, NEVER,
        }  # fmt: skip


@pytest.fixture
def suite(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOCAL_COPY", "1")
    return Measured(tmp_path_factory.mktemp("s"))


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("-n", "2"),
        ("--cov-branch",),
        ("--vm-isolation=test",),
        ("--vm-isolation=module",),
        ("--cov-append",),
    ],
    ids=" ".join,
)
def test_lines_of_both_sides(suite, args):
    """Those of fixtures that are torn down at the very end, too."""
    assert suite.lines(*args) == {GUEST, HOST, LATE}
    assert list(suite.report["files"]) == ["library.py", "test_it.py"]


@pytest.mark.parametrize("cov", ["--cov", "--cov=library"])
def test_sources(suite, cov):
    assert suite.lines(cov=cov) == {GUEST, HOST, LATE}
    assert ("test_it.py" in suite.report["files"]) == (cov == "--cov")


def test_branches_of_both_sides(suite):
    assert suite.lines("--cov-branch") == {GUEST, HOST, LATE}
    branches = suite.report["files"]["library.py"]
    assert branches["missing_branches"] == []
    assert sorted(branches["executed_branches"]) == [[4, 5], [4, 6]]


def test_a_guest_is_told_the_configuration(suite):
    """Processes that tests start are measured where this side would do that."""
    suite.write(".coveragerc", "[run]\nomit = test_*\nrelative_files = true\npatch = subprocess\n")
    assert suite.lines() == {GUEST, HOST, LATE, CHILD}
    assert list(suite.report["files"]) == ["library.py"]


def test_nothing_of_it_ran_in_the_guest(suite):
    suite.write("test_it.py", "import pytest\n\n@pytest.mark.in_vm\ndef test_it(): pass\n")
    status, output = suite.run("--cov=no_such_package", "--cov-report=")
    assert status == 0, output
    assert "vmsandbox: at the end" not in output


def test_no_coverage(suite):
    """Nothing is measured where nobody asks for it."""
    suite.write("test_it.py", "import coverage\n\ndef test_it():\n    "
                "assert coverage.Coverage.current() is None\n")  # fmt: skip
    status, output = suite.run("--in-vm", "--cov=.", "--no-cov")
    assert status == 0, output


def test_what_is_lost_is_told(suite):
    suite.write(
        "test_more.py",
        "import os\n\nimport pytest\n\n@pytest.mark.in_vm\ndef test_dies(): os._exit(3)\n",
    )
    assert suite.lines("test_more.py", "test_it.py", status=1) == {GUEST, HOST, LATE}
    assert (
        suite.output.count("vmsandbox: coverage of tests inside debian-13-1 is not complete") == 1
    )
