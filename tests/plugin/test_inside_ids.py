"""Which test of the guest is meant by one of this side, where parameters differ between the two.

The guest is this machine, as in `tests/differential`; what differs is made to, by the variable that
only a guest has.
"""

import pytest

from support.inside import Suite


@pytest.fixture
def suite(tmp_path_factory):
    return Suite(tmp_path_factory.mktemp("s"))


def source(here, there, *, names=None):
    """A file with a parametrized test that tells which parameter it has."""
    return f"""
import os

import pytest

HERE, THERE = {here!r}, {there!r}
VALUES = THERE if "VMSANDBOX_GUEST" in os.environ else HERE

@pytest.mark.parametrize("value", VALUES, ids={names or "str"})
def test_it(value, request, record_property):
    print(f"<{{value}}>")
"""


DIFFER = "vmsandbox: test_it.py::test_it[{}] is called test_it.py::test_it[{}] in debian-13"


def ran(output):
    """The parameters of the tests that ran, in order; each has printed its own."""
    return [line[1:-1] for line in output.splitlines() if line.startswith("<")]


def test_the_id_counts_where_the_order_differs(suite):
    suite.write("test_it.py", source(["a", "b", "c"], ["c", "a", "b"]))
    status, output = suite.run("--in-vm", "-rP")
    assert status == 0, output
    assert ran(output) == ["a", "b", "c"]
    assert "the ids of its parameters differ" not in output


def test_the_index_counts_where_the_ids_differ(suite):
    """As they do for values whose text is another one in each version of Python."""
    names = "lambda it: it + ('-there' if VALUES is THERE else '-here')"
    suite.write("test_it.py", source(["a", "b"], ["a", "b"], names=names))
    status, output = suite.run("--in-vm", "-rP")
    assert status == 0, output
    assert ran(output) == ["a", "b"]
    for value in ("a", "b"):
        assert output.count(DIFFER.format(f"{value}-here", f"{value}-there")) == 1


def test_ids_and_indices_side_by_side(suite):
    """One is known by its id although it has another index; that index is another one's."""
    suite.write("test_it.py", source(["a", "b1"], ["b2", "a"]))
    status, output = suite.run("--in-vm", "-rP")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert ran(output) == ["a"]
    assert "has not collected test_it.py::test_it[b1]" in output
    assert "the ids of its parameters differ" not in output


def test_the_index_counts_within_one_function_only(suite):
    gone = "\nif VALUES is THERE:\n    del test_it\n"
    suite.write("test_a.py", source(["a", "b"], ["a ", "b "]) + gone)
    suite.write("test_b.py", source(["x", "y"], ["x ", "y "]))
    status, output = suite.run("--in-vm", "-rP")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert ran(output) == ["x ", "y "]
    assert "has not collected test_a.py::test_it[a]" in output


def test_a_file_that_two_collectors_fail_on_is_collected_once(suite):
    """With --doctest-modules, pytest collects a file as tests and as doctests."""
    suite.write(
        "test_it.py",
        "import os\n\nimport pytest\n\n"
        "if 'VMSANDBOX_GUEST' not in os.environ:\n"
        "    pytest.skip('not here', allow_module_level=True)\n\n"
        'def one():\n    """\n    >>> one()\n    1\n    """\n    return 1\n\n'
        "def test_it(): pass\n",
    )
    status, output = suite.run("--in-vm", "--doctest-modules", "-v")
    assert status == 0, output
    assert "2 passed" in output
