"""The tests under real KVM in an emulated host: which steps there are, and which run again."""

import json
import re

import pytest

from nested import run
from nested.run import CHECKOUT, STEPS, Host

TESTS = [word for arguments in STEPS.values() for word in arguments if "::" in word]


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path / "work")


def ended(host, name, status, log="== 3 passed in 1 s =="):
    (host.results / f"{name}.log").write_text(f"first line\n{log}\n")
    (host.results / f"{name}.json").write_text(json.dumps({"status": status, "seconds": 7}))


@pytest.mark.parametrize("test", TESTS)
def test_each_step_names_tests_that_are_there(test):
    file, *names = test.split("::")
    text = (CHECKOUT / file).read_text()
    assert all(re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE) for name in names)


def test_all_but_the_proof_itself_ask_for_kvm():
    assert [name for name, arguments in STEPS.items() if run.KVM not in arguments] == ["auto"]


def test_what_became_of_a_step(host):
    assert not host.passed("power")
    assert host.told("power") == "was not run"
    ended(host, "power", 0)
    assert host.passed("power")
    assert host.told("power") == "passed after 7 s: 3 passed in 1 s"
    ended(host, "power", 1, "1 failed")
    assert not host.passed("power")
    assert host.told("power") == "FAILED (1) after 7 s: 1 failed"


@pytest.mark.parametrize(
    ("more", "expected"), [([], ["auto", "panic"]), (["--again"], ["auto", "power", "panic"])]
)
def test_what_has_passed_does_not_run_again(host, monkeypatch, tmp_path, more, expected):
    """But for the proof, which is made in each boot of the host."""
    ran = []

    def pretend(self, names, *, seconds):
        ran.extend(names)
        for name in names:
            ended(self, name, 0)

    monkeypatch.setattr(Host, "make", lambda _: None)
    monkeypatch.setattr(Host, "run", pretend)
    words = ["--work", str(tmp_path / "work"), "--only", "power", "--only", "panic", *more]
    monkeypatch.setattr("sys.argv", ["run.py", *words])
    ended(host, "power", 0)
    assert run.main() == 0
    assert ran == expected
