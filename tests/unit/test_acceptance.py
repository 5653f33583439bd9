"""What the comparison with real projects' suites is made of."""

import pytest

from acceptance.projects import PROJECTS, Trial, compare, drawn, outcomes

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_it" name="test_a[debian-13]"/>
<testcase classname="tests.test_it" name="test_b[debian-13-1]"><failure message="no">x</failure></testcase>
<testcase classname="tests.test_it" name="test_c"><skipped type="pytest.skip" message="why"/></testcase>
</testsuite></testsuites>"""
FOUND = {
    "tests.test_it::test_a": ["passed"],
    "tests.test_it::test_b[1]": ["failed"],
    "tests.test_it::test_c": ["skipped: why"],
}


@pytest.fixture
def trial(tmp_path):
    return Trial(PROJECTS[0], tmp_path, "", "debian-13", "1GiB")


def test_what_runs_is_drawn_once_and_for_all():
    names = [str(number) for number in range(1000)]
    some = drawn(names, 60)
    assert some == drawn(names, 60)
    assert len(set(some)) == 60
    assert some == sorted(some, key=int)
    assert some != names[:60]
    assert drawn(names, 1000) == drawn(names, 2000) == names


def test_outcomes_are_those_of_the_tests_without_their_image(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert outcomes(tmp_path / "junit.xml", "debian-13") == FOUND
    assert outcomes(tmp_path / "none.xml", "debian-13") == {}


def test_differences():
    other = {**FOUND, "tests.test_it::test_c": ["skipped: because"], "more": ["passed"]}
    assert compare(FOUND, FOUND, ()) == []
    assert compare(FOUND, other, ["test_c"]) == ["more: inside ['missing'], plain ['passed']"]
    assert len(compare(FOUND, other, ())) == 2
    assert compare({}, {}, ()) == ["no test passed with plain pytest in the guest"]


def test_what_was_done_is_kept(trial, tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"calls": len(calls)}

    assert trial._once("it", work) == trial._once("it", work) == {"calls": 1}
    (tmp_path / "it.json").unlink()
    assert trial._once("it", work) == {"calls": 2}


def test_what_has_failed_is_not_kept(trial):
    def fails():
        raise KeyError("it")

    with pytest.raises(KeyError, match="it"):
        trial._once("it", fails)
    assert trial._once("it", lambda: "done") == "done"


def test_the_projects_are_many_and_differ():
    assert len({project.name for project in PROJECTS}) == len(PROJECTS) >= 10
