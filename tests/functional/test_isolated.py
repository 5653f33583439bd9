"""Tests that run inside a guest, each in a clone of its own of a session that has collected."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.guests.templates import TemplateStore
from support.environment import without_ours

IMAGE = "debian-13"
PASSED = ["passed"] * 3  # setup, call, teardown
LIBRARY = """\
import os

def where():
    if "VMSANDBOX_GUEST" in os.environ:
        return "guest"
    return "host"
"""
GUEST, HOST = 5, 6  # lines of it
SUITE = """
import os
import random
import signal
import ssl
import time
import uuid
import warnings

import pytest

import library

warnings.warn("told while it is collected")
marks = []


def numbers():
    return {
        "random": random.getrandbits(64),
        "uuid": uuid.uuid4(),
        "os": os.urandom(8).hex(),
        "ssl": ssl.RAND_bytes(8).hex(),
    }


numbers()  # each generator has its seed before the session is saved


@pytest.mark.parametrize("number", range(4))
def test_leaves_marks(number, record_property):
    assert not os.path.exists("/root/mark")
    assert not os.path.exists("/dev/shm/mark")
    assert marks == []
    with open("/root/mark", "w"), open("/dev/shm/mark", "w"):
        marks.append(number)
    for name, value in numbers().items():
        record_property(name, value)
    record_property("guest", os.environ["VMSANDBOX_GUEST"])
    record_property("time", time.time())
    assert library.where() == "guest"


def test_fails():
    print("said before")
    left = 1
    assert left == 2


def test_is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_after_the_kill():
    assert marks == []


def test_panics():
    with open("/proc/sysrq-trigger", "w") as file:
        file.write("c")
    time.sleep(60)


def test_after_the_panic():
    assert marks == []
"""


ONLY_THERE = "test_only_there.py"
GUEST_ONLY = """
import warnings

import numpy
import pytest

warnings.warn("told by the guest alone")
numpy.random.bytes(8)


@pytest.mark.parametrize("number", range(3))
def test_numpy(number, record_property):
    record_property("numpy", numpy.random.bytes(8).hex())
"""


# A plugin of this side alone.
RECORDER = """
import json
import os


def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        told = [report.nodeid, report.outcome, report.longreprtext, report.user_properties]
        with open(os.environ["RECORDED"], "a") as file:
            print(json.dumps(told), file=file)
"""


class Run:
    """A run of pytest in a folder.

    What it writes lies beside that: in it, it would be another project each time.
    """

    def __init__(self, folder, *args):
        recorded, covered = folder.parent / "recorded", folder.parent / "coverage.json"
        recorded.unlink(missing_ok=True)
        known = templates()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-ra", "-p", "no:cacheprovider",
             f"--vm={IMAGE}", "--in-vm", "--vm-isolation=test",
             "--cov=library", f"--cov-report=json:{covered}", *args],
            env={**without_ours(), "PYTEST_PLUGINS": "recorder", "PYTHONPATH": str(folder.parent),
                 "RECORDED": str(recorded)},
            cwd=folder, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        self.new_templates = templates() - known
        self.status, self.output = done.returncode, done.stdout + done.stderr
        self.cases, self.told = {}, {}
        for line in recorded.read_text().splitlines():
            nodeid, outcome, text, told = json.loads(line)
            name = nodeid.partition("::")[2]
            name = name.replace(f"[{IMAGE}]", "").replace(f"[{IMAGE}-", "[")
            self.cases.setdefault(name, []).append((outcome, text))
            self.told[name] = dict(told)
        report = json.loads(covered.read_text())
        self.lines = set(report["files"]["library.py"]["executed_lines"])

    def outcome(self, name):
        return [outcome for outcome, _ in self.cases[name]]

    def text(self, name):
        return "\n".join(text for _, text in self.cases[name])

    def values(self, test, name):
        """What each of the runs of a test has recorded under a name."""
        return [told[name] for case, told in self.told.items() if case.startswith(f"{test}[")]


def templates():
    """The keys of the templates in which a session has collected this suite.

    Tests that run at the same time make others.
    """
    return {
        template.key
        for template in TemplateStore(cache_dir()).all()
        if ONLY_THERE in json.dumps(template.facts)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isolated") / "suite"
    folder.mkdir()
    (folder.parent / "recorder.py").write_text(RECORDER)
    # Later ones need cmpxchg16b, which guests are not offered by QEMU before 8.0, emulated.
    (folder / "pytest.ini").write_text("[pytest]\nvm_requirements = numpy<2.4\n")
    (folder / "library.py").write_text(LIBRARY)
    (folder / "test_it.py").write_text(SUITE)
    (folder / ONLY_THERE).write_text(GUEST_ONLY)
    made: set[str] = set()
    yield folder, made
    store = TemplateStore(cache_dir())
    for template in store.all():
        if template.key in made:  # nobody finds it again
            store.throw_away(template.key, template)


@pytest.fixture(scope="module")
def run(folder):
    """Runs the suite."""
    path, made = folder

    def once(*args):
        found = Run(path, *args)
        made.update(found.new_templates)
        return found

    return once


@pytest.fixture(scope="module")
def first(run):
    """The run that seals a session that has collected."""
    return run()


@pytest.fixture(scope="module")
def second(first, run):
    return run()


def test_a_template_is_made_once(first, second):
    told = "(a test session that has collected). This is done once"
    assert first.output.count(told) == 1, first.output
    assert first.new_templates
    assert "preparing" not in second.output
    assert second.new_templates == set()


@pytest.mark.parametrize("which", ["first", "second"])
def test_every_test_has_its_report(request, which):
    found = request.getfixturevalue(which)
    assert found.status == 1
    failed = {name for name in found.cases if found.outcome(name) != PASSED}
    assert failed == {"test_fails", "test_is_killed", "test_panics"}, found.output
    assert len(found.cases) == 4 + 5 + 3


def test_no_mark_is_seen_by_another_test(first):
    for number in range(4):  # each looks for those of the others
        assert first.outcome(f"test_leaves_marks[{number}]") == PASSED, first.output
    assert len(set(first.values("test_leaves_marks", "guest"))) == 4


@pytest.mark.parametrize(
    ("test", "generator"),
    [*(("test_leaves_marks", it) for it in ("random", "uuid", "os", "ssl")),
     ("test_numpy", "numpy")],
)  # fmt: skip
def test_generators_differ(first, second, test, generator):
    """Also those that had their seed before: between clones, and between runs."""
    found = first.values(test, generator) + second.values(test, generator)
    assert len(found) >= 6
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("which", ["first", "second"])
def test_warnings_of_the_collection_are_told(request, which):
    output = request.getfixturevalue(which).output
    assert output.count("UserWarning: told while it is collected") == 1
    assert output.count("UserWarning: told by the guest alone") == 1


def test_a_failure_is_reported_as_usual(first):
    text = first.text("test_fails")
    assert ">       assert left == 2\nE       assert 1 == 2\n\ntest_it.py:" in text
    assert "- Captured stdout call -" in first.output
    assert "\nsaid before\n" in first.output


@pytest.mark.parametrize(
    ("name", "cause"),
    [("test_is_killed", "the interpreter was killed by SIGKILL"),
     ("test_panics", "kernel panic: sysrq triggered crash")],
)  # fmt: skip
def test_a_loss_is_reported_and_the_rest_goes_on(first, name, cause):
    assert cause in first.text(name)
    after = {"test_is_killed": "test_after_the_kill", "test_panics": "test_after_the_panic"}[name]
    assert first.outcome(after) == PASSED


def test_coverage_comes_from_guests(first):
    assert GUEST in first.lines
    assert HOST not in first.lines


def test_workers(first, run):
    """They find the template that a run without workers made, and boot nothing."""
    found = run("-n", "2", "-k", "marks or after or numpy")
    assert found.status == 0, found.output
    assert len(found.cases) == 4 + 2 + 3
    assert found.new_templates == set()
    assert set(found.values("test_leaves_marks", "random")).isdisjoint(
        first.values("test_leaves_marks", "random")
    )
    assert len(set(found.values("test_leaves_marks", "random"))) == 4
    assert GUEST in found.lines
