"""Tests inside guests beside other plugins, which have to do with how a test is run.

The guest is this machine, as in `test_fidelity`.
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
    assert "it did not end within 1 s, and its interpreter was killed" in output
    assert 'test_it.py", line 7 in hang\n' in output
    assert suite.guests == ["debian-13.1"]
