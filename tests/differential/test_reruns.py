"""pytest-rerunfailures: tests run again inside guests as they do in plain pytest.

The guest is this machine.
"""

import os

import pytest

from support.fidelity import Line
from support.sides import Sides

# `attempt` counts in a file: with a guest for each attempt, no two of them share a process.
SUITE = """
import os
import pathlib

import pytest


def attempt(name):
    guest = os.environ.get("VMSANDBOX_GUEST")
    file = pathlib.Path(os.environ["TMPDIR"], "inside" if guest else "plain", name)
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        print(guest, file=lines)
    return len(file.read_text().splitlines())


@pytest.fixture
def unlucky():
    yield
    assert attempt("teardown") > 1


@pytest.fixture
def late():
    assert attempt("setup") > 2


def test_passes(): pass

def test_third_time(): assert attempt("third") == 3

def test_never(): assert not attempt("never")

def test_setup(late): pass

def test_teardown(unlucky): pass

@pytest.mark.xfail
def test_expected(): assert attempt("expected") > 1

@pytest.mark.skip
def test_skipped(): pass

@pytest.mark.flaky(reruns=3, only_rerun=["OSError"])
def test_of_another_kind(): assert attempt("another") > 1

@pytest.mark.flaky(reruns=3, only_rerun=["AssertionError"])
def test_of_this_kind(): assert attempt("this") > 3

@pytest.mark.flaky(reruns=3, condition="os.sep == '?'")
def test_condition(): assert attempt("condition") > 1

@pytest.mark.flaky(reruns=1, reruns_delay=0.01)
def test_with_a_delay(): assert attempt("delay") > 1
"""


def sides_of(folder, text=SUITE):
    return Sides.of(folder, {"pytest.ini": "[pytest]\n", "test_it.py": text})


@pytest.mark.parametrize(
    "line",
    [
        "--reruns=2 -v -rR",
        "--reruns=1 -rR --fail-on-flaky --deselect=test_it.py::test_never",
        "-rR",
        "--reruns=2 -rR -n 2",
    ],
)
def test_as_in_plain_pytest(tmp_path_factory, line):
    sides = sides_of(tmp_path_factory.mktemp("s"))
    assert sides.differences(Line.of(line, ordered="-n 2" not in line)) == []


def test_a_guest_for_each_attempt(tmp_path_factory):
    sides = sides_of(tmp_path_factory.mktemp("s"))
    # Few tests: each attempt costs the start of a pytest, nearly half a second of a processor.
    line = Line.of("--reruns=2 -rR -k 'third or never or setup or teardown'")
    plain, inside = sides.plain(line), sides.run("inside", line, "-p", "vmsandbox_local",
                                                 "--in-vm", "--vm-isolation=test")  # fmt: skip
    seen = sides.reader.read(inside)
    assert (seen.status, seen.cases, seen.screen[-1]) == (
        plain.status,
        plain.cases,
        plain.screen[-1],
    )
    for name in os.listdir(sides.folder / "plain"):
        guests = (sides.folder / "inside" / name).read_text().split()
        assert len(guests) == len((sides.folder / "plain" / name).read_text().split())
        assert len(guests) == len(set(guests)), f"{name}: {guests}"


@pytest.mark.skipif(pytest.version_tuple < (9, 0), reason="it has no subtests")
def test_subtests_count_once(tmp_path_factory):
    """Those of an attempt that failed are forgotten; in plain pytest, junit's file still has them."""
    head, _, _ = SUITE.partition("@pytest.fixture")
    text = f"""{head}
def test_subtests(subtests):
    number = attempt("subtests")
    for word in "abc":
        with subtests.test(word):
            assert word != "b" or number > 1
"""
    sides = sides_of(tmp_path_factory.mktemp("s"), text)
    line = Line.of("--reruns=2")
    plain, inside = sides.plain(line), sides.inside(line)
    assert (inside.status, inside.screen[-1]) == (plain.status, plain.screen[-1])
    assert "1 passed, 1 rerun in" in inside.screen[-1]
