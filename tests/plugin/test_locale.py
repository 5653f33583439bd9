"""A locale that is not UTF-8: our own files are, all the same.

The guest is this machine, as in `tests/differential`.
"""

import pytest

from support.inside import Suite

TEST = """
def test_it():
    assert "«»" == "\\xab\\xbb"
"""


def test_inside(tmp_path_factory, monkeypatch):
    """Python itself tells which file was opened by the locale."""
    variables = {
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONWARNDEFAULTENCODING": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    suite = Suite(tmp_path_factory.mktemp("s"))
    suite.write("test_it.py", TEST)
    status, output = suite.run("--in-vm", "-W", "always::EncodingWarning")
    assert status == pytest.ExitCode.OK, output
    warned = [line for line in output.splitlines() if "EncodingWarning" in line]
    assert [line for line in warned if "pytest_vmsandbox" in line] == []
