"""Plugins of others, and what each has to show inside a guest: the rows of docs/plugins.md.

A row has a file of tests in one of the projects under ``suites``. The plugins of a project are installed
in an environment of its own, and its tests run twice: by plain pytest, and inside a guest. Of a row, the
outcomes of its file are compared, and what the plugin itself has written.
"""

from __future__ import annotations

import difflib
import fcntl
import html
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import uv

import pytest_vmsandbox
from support.environment import without_ours
from support.fidelity import Reader

IMAGE = "debian-13"
SUITES = Path(__file__).with_name("suites")
WORKS, DIFFERS, REFUSED = "works", "works, but", "refused"


@dataclass(frozen=True)
class Project:
    """A project whose tests use plugins that get along.

    Attributes:
        packages: what is installed for it besides those plugins.
        environment: variables for both runs.
        is_repository: whether it is one of git, in which ``test_old.py`` is committed.
        is_ordered: whether the order of its tests is no chance.
    """

    packages: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    is_repository: bool = False
    is_ordered: bool = True


@dataclass(frozen=True)
class Row:
    """A plugin.

    Attributes:
        plugin: the distribution.
        project: whose tests show it.
        tests: the file of tests.
        args: what pytest is told for it.
        verdict: what the documentation says: `WORKS`, `DIFFERS` or `REFUSED`.
        remark: what it says besides.
        output: what the plugin has written into a project's folder, as values that JSON has.
        compared: of each test, its ``text`` in junit's file, or its ``outcome`` only.
        refusal: what a run says that is refused.
    """

    plugin: str
    project: str
    tests: str
    args: tuple[str, ...] = ()
    verdict: str = WORKS
    remark: str = ""
    output: Callable[[Path], object] | None = None
    compared: str = "text"
    refusal: str = ""


# -- what plugins write ---------------------------------------------------------------------------


def _coverage(folder: Path) -> object:
    files = json.loads((folder / "out/cov.json").read_text())["files"]
    return {name: (data["executed_lines"], data["missing_lines"]) for name, data in files.items()}


def _html(folder: Path) -> object:
    page = (folder / "out/report.html").read_text("utf-8")
    (blob,) = re.findall(r'data-jsonblob="([^"]*)"', page)
    tests = json.loads(html.unescape(blob))["tests"]
    return {
        name: [(row["result"], row["extras"]) for row in rows]
        for name, rows in tests.items()
        if name.startswith(("test_html.py", "test_metadata.py"))
    }


def _metadata(folder: Path) -> object:
    page = (folder / "out/report.html").read_text("utf-8")
    (blob,) = re.findall(r'data-jsonblob="([^"]*)"', page)
    found = json.loads(html.unescape(blob))["environment"]
    return {name: found[name] for name in ("given", "added")}


def _json_report(folder: Path) -> object:
    report = json.loads((folder / "out/report.json").read_text())
    tests = []
    for test in report["tests"]:
        phases = {}
        for phase in ("setup", "call", "teardown"):
            told = test.get(phase, {})
            phases[phase] = {name: told.get(name) for name in ("outcome", "stdout", "crash")}
            phases[phase]["log"] = [record["msg"] for record in told.get("log", ())]
        if test["nodeid"].startswith("test_json_report.py"):
            tests.append([test["nodeid"], test["outcome"], test.get("metadata"), phases])
    return [tests, report["summary"]]


def _cucumber(folder: Path) -> object:
    return _without(json.loads((folder / "out/cucumber.json").read_text()), "duration")


def _benchmarks(folder: Path) -> object:
    found = json.loads((folder / "out/benchmark.json").read_text())
    names = ("name", "fullname", "group", "params", "extra_info")
    # Of `pedantic`, the numbers are given; of others, they depend on the machine.
    pedantic = [
        (each["stats"]["rounds"], each["stats"]["iterations"])
        for each in found["benchmarks"]
        if "sizes" in each["name"]
    ]
    return [
        [{name: each[name] for name in names} for each in found["benchmarks"]],
        pedantic,
        sorted(found["machine_info"]),
    ]


def _log(folder: Path) -> object:
    lines = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    return [
        [
            *(line["nodeid"], line["when"], line["outcome"]),
            [it for it in line["sections"] if it[0] != "vmsandbox"],
            [it for it in line["user_properties"] if it[0] not in ("vm", "vm_artifacts")],
        ]
        for line in lines
        if line["$report_type"] == "TestReport" and line["nodeid"].startswith("test_reportlog")
    ]


def _allure(folder: Path) -> object:
    found = []
    for file in (folder / "out/allure").glob("*-result.json"):
        result = json.loads(file.read_text())
        labels = {it["name"]: it["value"] for it in result["labels"]}
        if labels["suite"] == "test_allure":
            attachments = [
                (folder / "out/allure" / it["source"]).read_text()
                for step in result["steps"]
                for it in step.get("attachments", ())
            ]
            told = [labels.get(name) for name in ("feature", "severity", "framework")]
            steps = [(step["name"], step["status"]) for step in result["steps"]]
            found.append([result["name"], result["status"], told, steps, attachments])
    return sorted(found)


def _files(*globs: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        files = sorted(file for glob in globs for file in folder.glob(glob) if file.is_file())
        return {str(file.relative_to(folder)): file.read_text() for file in files}

    return read


def _cassettes(folder: Path) -> object:
    found = _files("cassettes/**/*.yaml")(folder)
    varying = r"(?<=Date:\n      - ).*|(?<=Python/)[\d.]+"
    return {name: re.sub(varying, "…", text) for name, text in found.items()}  # type: ignore[attr-defined]


def _examples(folder: Path) -> object:
    """Whether hypothesis remembers what failed; it names examples by the function's place."""
    return [it.name for it in (folder / ".hypothesis").glob("examples") if any(it.glob("*/*"))]


def _annotations(folder: Path) -> object:
    return [line for line in _screen(folder) if line.startswith("test_annotate")]


def _at_once(folder: Path) -> object:
    """Where the failure is shown: before the next test, and not again."""
    return [line for line in _screen(folder) if "told at once" in line or "FAILURES" in line]


def _sugar(folder: Path) -> object:
    return [
        re.sub(r"\d+% |█+|▋|[▏▎▍▌▋▊▉]", "", it) for it in _screen(folder) if "✓" in it or "✗" in it
    ]


def _retried(folder: Path) -> object:
    """How many attempts the summary counts."""
    return re.findall(r"\d+ retried", _screen(folder)[-1])


def _order(folder: Path) -> object:
    root = ET.parse(folder / "junit.xml")
    return [case.get("name") for case in root.iter("testcase")]


def _screen(folder: Path) -> list[str]:
    return (folder / "screen").read_text("utf-8").splitlines()


def _without(value: object, name: str) -> object:
    if isinstance(value, dict):
        return {key: _without(it, name) for key, it in value.items() if key != name}
    return [_without(it, name) for it in value] if isinstance(value, list) else value


# -- the table ------------------------------------------------------------------------------------

PROJECTS = {
    "together": Project(),
    "others": Project(environment={"GITHUB_ACTIONS": "true"}),
    "xdist": Project(is_ordered=False),
    "randomly": Project(is_ordered=False),
    "random_order": Project(),
    "terminal": Project(),
    "picked": Project(is_repository=True),
    "testmon": Project(),
    "django": Project(packages=("django",)),
    "flaky": Project(),
    "retry": Project(),
}

ROWS = [
    Row(
        "allure-pytest",
        "together",
        "test_allure.py",
        args=("--alluredir=out/allure",),
        output=_allure,
    ),
    Row("anyio", "together", "test_anyio.py"),
    Row(
        "flaky",
        "flaky",
        "test_flaky.py",
        verdict=DIFFERS,
        remark="its report of failed attempts stays in the guest",
    ),
    Row("hypothesis", "together", "test_hypothesis.py", output=_examples),
    Row("pytest-asyncio", "together", "test_asyncio.py"),
    Row(
        "pytest-bdd",
        "together",
        "test_bdd.py",
        args=("--cucumberjson=out/cucumber.json",),
        output=_cucumber,
    ),
    Row(
        "pytest-benchmark",
        "together",
        "test_benchmark.py",
        args=("--benchmark-json=out/benchmark.json", "--benchmark-max-time=0.01"),
        output=_benchmarks,
    ),
    Row("pytest-check", "together", "test_check.py"),
    Row(
        "pytest-cov",
        "together",
        "test_cov.py",
        args=("--cov=calc", "--cov-report=json:out/cov.json"),
        output=_coverage,
    ),
    Row("pytest-dependency", "together", "test_dependency.py"),
    Row("pytest-django", "django", "test_django.py"),
    Row("pytest-dotenv", "others", "test_dotenv.py"),
    Row("pytest-env", "together", "test_env.py"),
    Row("pytest-freezer", "together", "test_freezer.py"),
    Row(
        "pytest-github-actions-annotate-failures",
        "others",
        "test_annotate_failures.py",
        output=_annotations,
    ),
    Row(
        "pytest-html",
        "together",
        "test_html.py",
        args=("--html=out/report.html", "--self-contained-html"),
        output=_html,
    ),
    Row("pytest-httpserver", "together", "test_httpserver.py"),
    Row(
        "pytest-instafail", "terminal", "test_instafail.py", args=("--instafail",), output=_at_once
    ),
    Row(
        "pytest-json-report",
        "together",
        "test_json_report.py",
        args=("--json-report", "--json-report-file=out/report.json"),
        output=_json_report,
    ),
    Row("pytest-lazy-fixtures", "together", "test_lazy_fixtures.py"),
    Row(
        "pytest-metadata",
        "together",
        "test_metadata.py",
        args=("--metadata", "given", "there"),
        output=_metadata,
    ),
    Row("pytest-mock", "together", "test_mock.py"),
    Row("pytest-order", "together", "test_order.py", output=_order),
    Row("pytest-picked", "picked", "test_picked.py", args=("--picked",), output=_order),
    Row(
        "pytest-random-order",
        "random_order",
        "test_random_order.py",
        args=("--random-order", "--random-order-seed=4"),
        output=_order,
    ),
    Row(
        "pytest-randomly",
        "randomly",
        "test_randomly.py",
        args=("--randomly-seed=3",),
        verdict=DIFFERS,
        remark="a seed gives another order than without guests, since test ids contain the image. Random values in "
        "tests are the same",
    ),
    Row(
        "pytest-recording",
        "together",
        "test_recording.py",
        args=("--record-mode=once",),
        output=_cassettes,
    ),
    Row(
        "pytest-regressions",
        "together",
        "test_regressions.py",
        args=("--regen-all",),
        output=_files("test_regressions/*"),
    ),
    Row("pytest-repeat", "together", "test_repeat.py"),
    Row(
        "pytest-reportlog",
        "together",
        "test_reportlog.py",
        args=("--report-log=out/log.jsonl",),
        output=_log,
    ),
    Row(
        "pytest-rerunfailures",
        "together",
        "test_rerunfailures.py",
        verdict=DIFFERS,
        remark="the JUnit file leaves out subtests of failed attempts. A test that crashes its interpreter, or "
        "exceeds a time limit, does not run again",
    ),
    Row(
        "pytest-retry",
        "retry",
        "test_retry.py",
        verdict=DIFFERS,
        remark="its report of failed attempts stays in the guest",
        output=_retried,
    ),
    Row(
        "pytest-snapshot",
        "others",
        "test_snapshot.py",
        args=("--snapshot-update",),
        output=_files("snapshots/**/*", "kept/**/*"),
    ),
    Row("pytest-socket", "together", "test_socket.py"),
    Row("pytest-sugar", "terminal", "test_sugar.py", args=("--force-sugar",), output=_sugar),
    Row(
        "pytest-testmon",
        "testmon",
        "test_testmon.py",
        args=("--testmon",),
        verdict=REFUSED,
        remark="it cannot see what tests inside depend on. Use `--testmon-nocollect`, or do not use `--testmon`",
        refusal="testmon cannot see what tests inside a guest depend on",
    ),
    Row(
        "pytest-timeout",
        "others",
        "test_timeout.py",
        verdict=DIFFERS,
        remark="a test that takes too long fails with a message of pytest-vmsandbox. Its interpreter ends, so "
        "module and session fixtures are set up again",
        compared="outcome",
    ),
    Row(
        "pytest-xdist",
        "xdist",
        "test_xdist.py",
        args=("-n2",),
    ),
    Row(
        "syrupy",
        "together",
        "test_syrupy.py",
        args=("--snapshot-update",),
        output=_files("__snapshots__/*"),
        verdict=DIFFERS,
        remark="its summary line stays in the guest, and it does not look for unused snapshots. To remove those, "
        "run `--snapshot-update` without `--in-vm`",
    ),
]


def table() -> list[str]:
    """The table as docs/plugins.md has it, line by line."""
    lines = ["| plugin | inside a guest |", "| --- | --- |"]
    for row in ROWS:
        told = f"**{row.verdict}**: {row.remark}" if row.remark else row.verdict
        lines.append(f"| {row.plugin} | {told} |")
    return lines


# -- running them ---------------------------------------------------------------------------------


class Lab:
    """Environments, and runs of projects in them.

    Several processes may share the folder: what one has made, the others use.

    Args:
        folder: for all of it; a path that is not long.
        rows: only their plugins are installed, and only their tests run.
    """

    def __init__(self, folder: Path, rows: Sequence[Row] = ROWS) -> None:
        self.folder, self.rows = folder, rows

    def run(self, name: str, side: str, *args: str, **environment: str) -> Path:
        """Run a project's tests; once, whoever asks.

        Args:
            name: of the project.
            side: what the run is called.
            args: of pytest, besides those of the rows.

        Returns:
            The project's folder, with ``screen``, ``status`` and ``junit.xml`` in it.
        """
        place = self.folder / name / side / "suite"
        return self._once(place, lambda: self._run(name, place, args, environment))

    def _run(
        self, name: str, place: Path, args: tuple[str, ...], environment: dict[str, str]
    ) -> None:
        project, python = PROJECTS[name], self.environment(name) / "bin/python"
        others = {row.tests for row in ROWS} - {row.tests for row in self._rows(name)}
        shutil.copytree(SUITES / name, place, ignore=shutil.ignore_patterns("__pycache__", *others))
        if project.is_repository:
            _commit(place, "pytest.ini", "test_old.py")
        kept = {
            name: value
            for name, value in without_ours("PYTHON", "GIT", "__TOX").items()
            if name not in ("CI", "GITHUB_ACTIONS")
        }
        done = subprocess.run(
            [python, "-m", "pytest", "-o", "junit_logging=all", "--junitxml=junit.xml", *args,
             *(arg for row in self._rows(name) for arg in row.args)],
            cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500, check=False,
            env={**kept, "LC_ALL": "C.UTF-8", "COLUMNS": "300", **project.environment, **environment},
        )  # fmt: skip
        (place / "screen").write_bytes(done.stdout)
        (place / "status").write_text(str(done.returncode))

    def environment(self, name: str) -> Path:
        """The environment of a project: its plugins, and this plugin as it is here."""
        place = self.folder / name / "env"
        return self._once(place, lambda: self._install(name, place))

    def _install(self, name: str, place: Path) -> None:
        ours = metadata.distribution("pytest-vmsandbox")
        wanted = [*(row.plugin for row in self._rows(name)), *PROJECTS[name].packages]
        wanted += [*(ours.requires or ()), f"pytest=={metadata.version('pytest')}"]
        program = uv.find_uv_bin()
        subprocess.run([program, "venv", "-q", "-p", sys.executable, place], check=True)
        subprocess.run(
            [program, "pip", "install", "-q", "-p", place / "bin/python", *wanted], check=True
        )
        (site,) = place.glob("lib/python*/site-packages")
        for source in (
            Path(pytest_vmsandbox.__file__).parent,
            Path(str(ours.locate_file(_info(ours)))),
        ):
            (site / source.name).symlink_to(source)

    def _rows(self, name: str) -> list[Row]:
        return [row for row in self.rows if row.project == name]

    def _once(self, place: Path, make: Callable[[], None]) -> Path:
        place.parent.mkdir(parents=True, exist_ok=True)
        done = place.with_name(f"{place.name}.done")
        with place.with_name(f"{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make()
                done.touch()
        return place


def _info(distribution: metadata.Distribution) -> str:
    """The name of a distribution's folder of metadata."""
    (name,) = {it.parts[0] for it in distribution.files or () if it.name == "METADATA"}
    return name


def _commit(folder: Path, *files: str) -> None:
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["add", *files], ["commit", "-q", "-m", "Begin"]):
        subprocess.run([*git, *command], cwd=folder, check=True)


# -- comparing them -------------------------------------------------------------------------------


# Dates, ports, and which worker of xdist it was; versions of Python.
_VARYING = re.compile(
    r"(?<=\[)\d\d/\w{3}/\d{4} [\d:]{8}(?=\])|(?<=localhost:)\d+|(?<=port=)\d+|\bgw\d\b"
    r"|(?<=lib/python)3\.\d+"
)


def shown(row: Row, folder: Path) -> dict[str, list[str]]:
    """What a run has shown of a row: the outcomes of its tests, and the plugin's own output; lines."""
    environment = folder.parents[1] / "env"
    reader = Reader(
        IMAGE,
        {str(folder): "<suite>", f"{environment}/": "<env>/", "/opt/vmsandbox/env/": "<env>/"},
    )
    module = row.tests.removesuffix(".py")
    cases = [
        _outcome(reader, case) if row.compared == "outcome" else reader.element(case)
        for case in ET.parse(folder / "junit.xml").iter("testcase")
        if (case.get("classname") or "").partition(".")[0] == module
    ]
    if not PROJECTS[row.project].is_ordered:
        cases.sort()
    output = None if row.output is None else row.output(folder)
    text = json.dumps(output, ensure_ascii=False, sort_keys=True, indent=1)
    return {
        "cases": [_VARYING.sub("…", line) for case in cases for line in case.splitlines()],
        "output": _VARYING.sub("…", reader.text(text)).splitlines(),
    }


def differences(inside: dict[str, list[str]], plain: dict[str, list[str]]) -> list[str]:
    """What differs between two runs, in words; empty if nothing does."""
    return [
        line
        for name, lines in plain.items()
        for line in difflib.unified_diff(
            lines, inside[name], f"plain {name}", f"inside {name}", lineterm=""
        )
    ]


def _outcome(reader: Reader, case: ET.Element) -> str:
    tags = [it.tag for it in case if it.tag in {"failure", "error", "skipped"}]
    return f"{reader.text(case.get('name') or '')}: {' '.join(tags) or 'passed'}"
