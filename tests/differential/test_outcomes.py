"""Tests that run inside a guest are reported as plain pytest reports them there.

The guest is this machine: the same programs, the same files, nothing in between but the wire.
"""

import pytest

from support.fidelity import Line
from support.sides import INSIDE, PLAIN, Sides

# Each group is run in order, on caches of its own.
GROUPS = {
    "all of it": ["--durations=5 --durations-min=100"],
    "verbose": [
        "-vv -l --tb=short --runslow --level=3 --level 4 test_asserts.py test_marks.py test_subtests.py"
    ],
    "line": ["--tb=line -q --no-header -p no:logging test_logging.py test_marks.py test_output.py"],
    "native": ["--tb=native --runxfail test_asserts.py test_marks.py"],
    "options": [
        "-W error -o flavour=mint -o strictly=true -o 'places=a sub' -rfE test_logging.py test_marks.py"
    ],
    "doctests": ["--doctest-modules documented.py test_text.txt test_unittest.py"],
    "first failure": ["-x", "--maxfail=2 -v"],
    "chosen": [
        "-k 'test_per or Order' -m 'not slow' --runslow",
        "test_params.py::TestAClass sub 'test_params.py::test_texts[IMAGE-]' test_marks.py::test_xpass",
    ],
    "failed ones": ["test_fixtures.py", "--lf test_fixtures.py", "--ff -v test_fixtures.py"],
    "stepwise": ["--sw test_marks.py", "--sw test_marks.py"],
}
# Here order is chance, or another one by design.
LOOSE = {
    "live": ["-s test_output.py -k 'both_streams or phases or subprocess'"],
    # Without fixtures that are shared: it is chance which worker has them.
    "parallel": ["-n 2 test_marks.py test_subtests.py test_params.py::TestAClass"],
    # Plain pytest captures the letters that it shows for them.
    "subtests of unittest": [
        "-rfE -o junit_logging=no apart/test_unittest_subtests.py",
        "-rfE -o junit_logging=no -p no:subtests apart/test_unittest_subtests.py",
    ],
}


@pytest.fixture
def sides(tmp_path_factory):
    return Sides.with_every_outcome(tmp_path_factory.mktemp("f"))


@pytest.mark.parametrize("group", GROUPS)
def test_the_same_as_plain_pytest(sides, group):
    for text in GROUPS[group]:
        assert sides.differences(Line.of(text)) == []


@pytest.mark.parametrize("group", LOOSE)
def test_the_same_but_for_the_order(sides, group):
    for text in LOOSE[group]:
        assert sides.differences(Line.of(text, ordered=False)) == []


def test_options_of_the_environment(sides):
    line = Line.of("test_marks.py", PYTEST_ADDOPTS="--runslow -vv --tb=short --level 7")
    assert sides.differences(line) == []


def test_files_that_are_skipped_as_a_whole(sides):
    """The guest is asked about them: each is a test that is skipped, for the same reason."""
    line = Line.of("apart/test_importorskip.py apart/test_skips_module.py")
    inside = sides.run("inside", line, *INSIDE)
    plain = sides.run("plain", line, *PLAIN)
    told = [
        sorted(it for it in sides.reader.read(said).screen if it.startswith("SKIPPED"))
        for said in (inside, plain)
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 2


def test_a_file_that_cannot_be_imported(sides):
    (sides.suite / "test_broken.py").write_text("import no_such_module_anywhere\n")
    line = Line.of("--continue-on-collection-errors test_broken.py test_text.txt")
    inside, plain = (
        sides.run("inside", line, *INSIDE),
        sides.run("plain", line, *PLAIN),
    )
    assert inside.status == plain.status == 1
    for said in (inside, plain):
        assert "No module named 'no_such_module_anywhere'" in said.screen
        assert "1 failed, 1 error" in said.screen


def test_a_source_that_is_no_utf_8(sides):
    text = "# coding: latin-1\ndef test_a():\n    text = 'ü'\n    print(text)\n    assert text == 'ä'\n"
    (sides.suite / "test_latin.py").write_bytes(text.encode("latin-1"))
    assert sides.differences(Line.of("test_latin.py -l")) == []
