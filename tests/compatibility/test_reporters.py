"""Plugins that report: what they write of tests inside is what they write of the same tests here.

The guest is this machine, as in `tests/differential`. Other tests do without these plugins.
"""

import json
import re

import pytest

from support.inside import Suite


@pytest.fixture
def suite(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOCAL_COPY", "1")  # or what plugins write in the guest is here, too
    return Suite(tmp_path_factory.mktemp("s"))


def both(suite, read, *args, status=0):
    """What `read` finds after a plain run, and after one inside."""
    found = []
    for inside in ((), ("--in-vm",)):
        got, output = suite.run(*args, *inside)
        assert got == status, output
        found.append(read(output))
        assert "vmsandbox: the hook" not in output
    return found


def alike(value):
    """A value without what differs from run to run."""
    if isinstance(value, dict):
        return {
            name: alike(it)
            for name, it in value.items()
            if name not in {"duration", "user_properties", "keywords", "created", "msecs",
                            "relativeCreated", "thread", "process", "taskName", "start", "stop",
                            "uuid", "historyId", "parameters", "labels", "source"}
        }  # fmt: skip
    if isinstance(value, list):
        return [alike(it) for it in value]
    return re.sub(r"\[debian-13\]| at 0x\w+", "", value) if isinstance(value, str) else value


def test_json_report(suite):
    suite.write(
        "conftest.py",
        "def pytest_json_runtest_metadata(item, call): return {call.when: [item.name, 1]}\n",
    )
    suite.write(
        "test_it.py",
        """
import logging
import sys

def test_a(json_metadata):
    json_metadata["mine"] = {"a": [1, None]}
    print("said")
    print("told", file=sys.stderr)
    logging.warning("careful %s", 3)

def test_b(): assert 0
""",
    )

    def read(_):
        report = json.loads((suite.path / ".report.json").read_text())
        return alike([report["tests"], report["summary"]])

    here, there = both(suite, read, "--json-report", status=1)
    assert here == there
    test = there[0][0]
    assert test["call"]["stdout"] == "said\n"
    assert test["call"]["log"][0]["msg"] == "careful 3"
    assert test["metadata"]["mine"] == {"a": [1, None]}


def test_html(suite):
    suite.write(
        "conftest.py",
        """
import pytest
import pytest_html

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.description = f"about {call.when}"
    if call.when == "call":
        report.extras = [pytest_html.extras.url("https://example.org", name="a link")]
    return report

def pytest_html_results_table_header(cells): cells.insert(1, "<th>Description</th>")

def pytest_html_results_table_row(report, cells): cells.insert(1, f"<td>{report.description}</td>")
""",
    )
    suite.write(
        "test_it.py",
        """
import pytest_html

def test_a(extras, metadata):
    extras.append(pytest_html.extras.text("some text"))
    extras.append(pytest_html.extras.json({"a": metadata["Python"]}))

def test_b(): pass
""",
    )

    def read(_):
        text = (suite.path / "the.html").read_text()
        written = {it.read_text() for it in (suite.path / "assets").glob("*.[jt]*")}
        return [len(re.findall(word, text)) for word in ("about call", "a link")], written

    here, there = both(suite, read, "--html=the.html")
    assert here == there
    assert min(there[0]) >= 2
    assert "some text" in there[1]


FEATURE = """
Feature: Blog
    @slow
    Scenario: Publishing
        Given an author
        When it is published
    Scenario: Failing
        Given an author
        When it fails
        Then nothing
"""


def test_bdd(suite):
    suite.write("blog.feature", FEATURE)
    suite.write("pytest.ini", "[pytest]\nmarkers =\n    slow\n")
    suite.write(
        "test_it.py",
        """
from pytest_bdd import given, scenarios, then, when

scenarios("blog.feature")

@given("an author")
def author(): pass

@when("it is published")
def published(): pass

@when("it fails")
def fails(): raise ValueError("no")

@then("nothing")
def nothing(): pass
""",
    )

    def read(output):
        features = json.loads((suite.path / "blog.json").read_text())
        for step in (it for scenario in features[0]["elements"] for it in scenario["steps"]):
            step["result"].pop("error_message", None)
        shown = output.count("Given an author"), output.count("Then nothing")
        return alike(features), shown

    args = ["--cucumberjson=blog.json", "--gherkin-terminal-reporter", "-vv"]
    here, there = both(suite, read, *args, status=1)
    assert here == there
    assert len(there[0][0]["elements"]) == 2
    assert there[1] == (2, 1)


def test_benchmark(suite):
    suite.write(
        "test_it.py",
        """
import pytest

@pytest.mark.benchmark(group="one")
def test_a(benchmark):
    benchmark.extra_info["mine"] = [1, "a"]
    benchmark.pedantic(sum, args=([1, 2],), rounds=4, iterations=3)

@pytest.mark.parametrize("n", [1])
def test_b(benchmark, n): assert benchmark(lambda: n) == 1

def test_fails(benchmark):
    benchmark.pedantic(int, args=("a",))
""",
    )

    def read(output):
        report = json.loads((suite.path / "the.json").read_text())
        rows = []
        for one in report["benchmarks"]:
            stats = one.pop("stats")
            name = one.pop("fullname").replace("debian-13-", "").replace("[debian-13]", "")
            one.pop("name")
            count = stats["rounds"] if name.endswith("test_a") else None
            rows.append([name, one, stats["iterations"] > 0, count, len(stats["data"]) > 0])
        header = re.findall(r"-- benchmark.*?: (\d+) tests?", output)
        return sorted(rows, key=str), header, sorted(report["machine_info"])

    args = ["--benchmark-json=the.json", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2"]
    here, there = both(suite, read, *args, status=1)
    assert here == there
    assert there[0][0][3] == 4
    status, output = suite.run(*args, "--in-vm", "-n1")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "-- benchmark" not in output, "xdist disables them"


def test_allure(suite):
    suite.write(
        "test_it.py",
        """
import allure
import pytest

@pytest.fixture(scope="session")
def shared():
    yield

@allure.title("Its title")
def test_a(shared):
    with allure.step("a step"):
        allure.attach("text", "a name")
    print("said")

def test_b(): assert 0

def test_c(): raise ValueError
""",
    )
    folder = suite.path / "results"

    def read(_):
        files = sorted(folder.iterdir())
        results = [json.loads(it.read_text()) for it in files if it.name.endswith("result.json")]
        texts = sorted(it.read_text() for it in files if "-attachment" in it.name)
        kinds = sorted(it.name.partition("-")[0] and it.name[36:] for it in files)
        images = {row["value"] for it in results for row in it.get("parameters", ())}
        for it in files:
            it.unlink()
        return sorted(map(alike, results), key=lambda it: it["name"]), texts, kinds, images

    here, there = both(suite, read, "--alluredir=results", status=1)
    assert here[:3] == there[:3]
    assert there[3] == {"debian-13"}
    assert [it["status"] for it in there[0]] == ["passed", "failed", "broken"]


def test_testmon_is_refused(suite):
    """It would take a test inside for one that depends on nothing, and leave it out from then on."""
    suite.write("test_it.py", "def test_a(): pass\n")
    args = ["--in-vm", "-p", "cacheprovider"]  # testmon needs its options
    status, output = suite.run(*args, "--testmon")
    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert "Remedy: add --testmon-nocollect" in output
    status, output = suite.run(*args, "--testmon-nocollect")
    assert status == 0, output


def test_picked_selects_here(suite):
    """No guest has git."""
    suite.write("git", "#!/bin/sh\n[ -z \"$VMSANDBOX_GUEST\" ] || exit 1\necho '?? test_b.py'\n")
    (suite.path / "git").chmod(0o755)
    suite.write("test_a.py", "def test_a(): pass\n")
    suite.write("test_b.py", "def test_b(): pass\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(suite.path), prepend=":")
        status, output = suite.run("--in-vm", "--picked", "-v")
    assert status == 0, output
    assert "test_b.py::test_b[debian-13] PASSED" in output
    assert "1 passed in" in output
