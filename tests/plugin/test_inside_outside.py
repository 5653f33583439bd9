"""Folders outside of the rootdir that tests inside guests import from.

The guest is this machine, as in `tests/differential`, with a copy of the project.
"""

import pytest

from support.inside import Suite

TESTS = """
from pathlib import Path

import common

def test_import(): assert common.WHERE == Path(common.__file__).parent
def test_data(): assert (Path(__file__).parent / "../shared/data.txt").read_text() == "data"
def test_message(): assert str(Path(common.__file__).resolve()) == 1
"""
LATE = "def test_late(): import common\n"


@pytest.fixture
def suite(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOCAL_COPY", "1")
    suite = Suite(tmp_path_factory.mktemp("s"))
    shared = suite.folder / "shared"
    shared.mkdir()
    (shared / "common.py").write_text("from pathlib import Path\nWHERE = Path(__file__).parent\n")
    (shared / "data.txt").write_text("data")
    suite.write("test_it.py", TESTS)
    suite.write("test_late.py", LATE)
    return suite


def ini(suite, more=""):
    (suite.path / "pytest.ini").write_text(f"[pytest]\npythonpath = ../shared\n{more}")


@pytest.mark.parametrize("in_conftest", [False, True])
def test_an_error_names_the_folder_and_the_remedy(suite, in_conftest):
    ini(suite)
    if in_conftest:
        suite.write("conftest.py", "import common\n")
    status, output = suite.run("--in-vm")
    assert status == 1
    assert "passed" not in output
    assert "No module named 'common'" in output
    assert f"on this machine, common is in {suite.folder}/shared. That folder" in output
    assert "`vm_push = ../shared`" in output


def test_such_a_folder_goes_to_a_guest(suite):
    """It lies there as it lies here, and is called so in messages."""
    ini(suite, "vm_push = ../shared\n")
    status, output = suite.run("--in-vm")
    assert status == 1, output
    assert "1 failed, 3 passed" in output
    assert f"AssertionError: assert '{suite.folder}/shared/common.py' == 1" in output
    told = f"vm_push sends 2 files of {suite.folder}/shared, outside of the rootdir, to guests"
    assert output.count(told) == 1


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("..", "contains the rootdir"),
        ("../nothere", "is outside of the rootdir, and is not a folder"),
        ("../shared/data.txt", "is outside of the rootdir, and is not a folder"),
    ],
)
def test_what_is_refused(suite, entry, why):
    ini(suite, f"vm_push = {entry}\n")
    status, output = suite.run("--in-vm", "test_late.py")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert not suite.guests
    assert f"vm_push: '{entry}' {why}" in output


def test_a_module_that_is_only_installed_here(suite):
    suite.write(
        "test_late.py", "def test_late(): raise ImportError(\"No module named 'pluggy.x'\")\n"
    )
    status, output = suite.run("--in-vm", "test_late.py")
    assert status == 1
    assert "pluggy is installed by pluggy, but it is not installed in the guest" in output
