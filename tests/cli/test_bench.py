"""`vmsandbox bench`: what it says, and what it does with what cannot be measured; no guest is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from pytest_vmsandbox import cli
from pytest_vmsandbox.cli import bench, examine
from pytest_vmsandbox.cli.benchmark import guests, suites
from pytest_vmsandbox.cli.benchmark.guests import CannotMeasureError, Result, Setup
from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.templates import NoTemplateError


class TestResults:
    def test_the_keys_are_those_that_programs_rely_on(self):
        assert tuple(bench.MEASUREMENTS) == (
            "cold_boot_s", "clone_on_demand_ms", "armed_noop_ms", "armed_run_ms", "guests_per_s",
            "cpu_ms_per_guest", "pss_mib_per_clone", "leased_at_once", "running_at_once",
            "push_mib_s", "snapshot_save_ms", "keep_ms", "enter_ms", "second_run_s",
            "in_guest_overhead_ms", "in_guest_isolated_s", "idle_cost_ms",
        )  # fmt: skip

    def test_the_99th_percentile_is_a_sample(self):
        figure = guests.percentiles([float(number) for number in range(200, 0, -1)])
        assert figure.value == {"p50": 100.5, "p99": 198.0}
        assert (figure.samples, figure.reason, figure.details) == (200, "", {"max": 200.0})

    def test_there_is_none_of_few_samples(self):
        figure = guests.percentiles([1.0, 2.0, 9.0])
        assert figure.value == {"p50": 2.0, "p99": None}
        assert figure.reason == "p99 needs 100 samples or more"

    def test_ratios_are_those_of_times(self):
        figures = {
            "cold_boot_s": Result(value=40.0),
            "armed_run_ms": Result(value={"p50": 16.0, "p99": None}),
            "second_run_s": Result(value=2.0),
            "cpu_ms_per_guest": Result(value=1000.0),
            "guests_per_s": Result(value=4.0),
            "push_mib_s": Result(value=4.0),
            "pss_mib_per_clone": Result(value=30.0),
            "leased_at_once": Result(value=60),
            "in_guest_isolated_s": Result(value=None),
            "in_guest_overhead_ms": Result(value=-0.1),  # noise: plain pytest was slower
        }
        assert bench.ratios(figures) == {
            "cold_boot_s": 1.0,
            "armed_run_ms": {"p50": 2500, "p99": None},
            "second_run_s": 20.0,
            "cpu_ms_per_guest": 40.0,
            "in_guest_overhead_ms": None,
        }

    def test_pairs_are_measured_in_turn(self):
        turns = iter([5.0, 1.0, 4.0, 2.0, 9.0, 3.0])
        pairs = suites.Pairs(3, lambda: next(turns), lambda: next(turns))
        assert (pairs.first, pairs.second, pairs.ratio) == (5.0, 2.0, 3.0)
        assert pairs.differences == [4.0, 2.0, 6.0]

    def test_there_are_none_without_a_cold_boot(self):
        assert bench.ratios({"second_run_s": Result(value=2.0)}) == {}
        figures = {"cold_boot_s": Result(value=None), "second_run_s": Result(value=2.0)}
        assert bench.ratios(figures) == {}


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Run the command in this process, with results that are made up."""
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VMSANDBOX_RUNTIME", str(tmp_path / "run"))
    where = {"machine": examine.describe(), "qemu": "9.9", "accelerator": "tcg"}
    monkeypatch.setattr(bench, "_environment", lambda *_: where)
    made_up: dict[str, Any] = dict.fromkeys(
        bench.MEASUREMENTS, lambda _: Result(value=2.0, samples=3)
    )
    made_up["armed_run_ms"] = lambda _: guests.percentiles([10.0] * 150)
    made_up["leased_at_once"] = refuse(LaunchError("no room", details="none at all"))
    not_installed = CannotMeasureError("not\ninstalled")
    not_installed.why_booted = "system"
    made_up["idle_cost_ms"] = refuse(not_installed)
    measurements = {
        key: wraps(real)(lambda setup, key=key: made_up[key](setup))
        for key, real in bench.MEASUREMENTS.items()
    }
    monkeypatch.setattr(bench, "MEASUREMENTS", measurements)
    told: dict[str, Any] = (
        {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    )
    return lambda *arguments: CliRunner(**told).invoke(cli.application, ["bench", *arguments])


def refuse(error):
    def measure(_):
        raise error

    return measure


def test_json_has_all_figures(invoke):
    result = invoke("tiny", "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content["schema"] == 1
    assert set(bench.MEASUREMENTS) <= set(content)
    assert content["armed_run_ms"] == {"p50": 10.0, "p99": 10.0}
    assert content["samples"]["armed_run_ms"] == 150
    assert content["ratios"]["armed_run_ms"] == {"p50": 200, "p99": 200}
    assert (content["leased_at_once"], content["idle_cost_ms"]) == (None, None)
    assert content["reasons"] == {"leased_at_once": "no room", "idle_cost_ms": "not installed"}
    assert content["details"]["idle_cost_ms"] == {"why_booted": "system"}
    assert {"image", "machine", "qemu", "accelerator"} <= set(content)
    assert {"system", "processor", "processors", "memory_bytes"} <= set(content["machine"])


def test_only_some_and_the_cold_boot_that_a_time_is_compared_with(invoke):
    content = json.loads(invoke("--json", "--only", "second_run_s").stdout)
    assert set(bench.MEASUREMENTS) & set(content) == {"second_run_s", "cold_boot_s"}
    content = json.loads(invoke("--json", "--only", "push_mib_s").stdout)
    assert set(bench.MEASUREMENTS) & set(content) == {"push_mib_s"}


@pytest.mark.parametrize(
    ("only", "status"),
    [(["push_mib_s"], 0), (["leased_at_once"], 1), (["push_mib_s", "idle_cost_ms"], 1)],
)
def test_one_that_was_asked_for_and_cannot_be_measured(invoke, only, status):
    arguments = [word for key in only for word in ("--only", key)]
    result = invoke("--json", *arguments)
    assert result.exit_code == status
    assert set(only) <= set(json.loads(result.stdout))
    assert invoke(*arguments).exit_code == status


def test_for_people(invoke):
    result = invoke("tiny")
    lines = {line.split()[0]: line.split(None, 1)[1] for line in result.stdout.splitlines()}
    assert lines["tiny,"].startswith("512MiB; QEMU 9.9, tcg; ")
    assert lines["armed_run_ms"] == "p50 10  p99 10  1 : 200 / 1 : 200  150 samples"
    assert lines["leased_at_once"].split() == ["-", "no", "room"]
    assert lines["idle_cost_ms"].split() == ["-", "not", "installed"]
    assert "\x1b" not in result.output


def test_help_says_what_the_figures_are(invoke):
    output = " ".join(invoke("--help").stdout.split())
    assert "pss_mib_per_clone memory of an armed clone" in output


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nothing"], 2, "there is no image 'nothing'"),
        (["--only", "fun"], 2, "'fun'"),
        (["--count", "0"], 2, "--count"),
        (["tiny", "--memory", "lots"], 2, "memory='lots'"),
        (["tiny"], 69, "vmsandbox images build tiny"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage(tmp_path, arguments, status, said):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest_vmsandbox", "bench", *arguments],
        env={**os.environ, "VMSANDBOX_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


# -- measuring -------------------------------------------------------------------------------------


class FakeGuest:
    pid = os.getpid()
    processor_seconds = 0.25

    def __init__(self, origin):
        self.origin = origin
        self.done = []

    @property
    def engine(self):
        return self

    def run(self, argv, **options):
        self.done.append(argv)

    def popen(self, argv):
        self.done.append(argv)

    def ping(self):
        self.done.append("ping")


class FakeFactory:
    """Its guests come to be as they are told; the last way goes on for ever."""

    def __init__(self, *origins, room=1000):
        self.origins = list(origins)
        self.room = room
        self.guests = []
        self.expected = 0
        self.waited = 0
        self.refusal = None

    def hardware(self, image, arguments):
        return Hardware().changed(arguments)

    def why_booted(self, image):
        return self.refusal

    def expect(self, image, hardware, count):
        self.expected += count

    def await_armed(self, timeout):
        self.waited += 1
        return True

    @contextmanager
    def boot(self, image, **hardware):
        if not self.room:
            raise LaunchError("there is no room")
        self.room -= 1
        origin = self.origins.pop(0) if len(self.origins) > 1 else self.origins[0]
        self.guests.append(FakeGuest(origin))
        yield self.guests[-1]
        self.room += 1


@pytest.fixture
def site(tmp_path):
    def make(factory, **options):
        made: Any = Setup(image="x", settings=Settings(), hardware={}, folder=tmp_path, **options)

        @contextmanager
        def open_factory(clones):
            made.asked = clones
            yield factory

        made.factory = open_factory
        return made

    return make


def test_armed_is_measured_with_armed_guests_only(site):
    factory = FakeFactory("cloned", "armed", "cloned", "armed")
    figure = guests.armed_run(site(factory, count=5))
    assert figure.samples == 5
    assert figure.details["not_armed"] == 1
    assert factory.expected == 6
    assert factory.waited == 6  # it was full before each
    assert [guest.done for guest in factory.guests if guest.engine.origin == "armed"] == [
        [["true"]]
    ] * 5


def test_armed_where_guests_are_booted(site):
    with pytest.raises(CannotMeasureError, match="guests are booted here, not armed or cloned"):
        guests.armed_noop(site(FakeFactory("booted"), count=5))


@pytest.mark.parametrize(
    ("refusal", "word"),
    [
        (NoTemplateError("this is FreeBSD", reason="system"), "system"),
        (LaunchError("this is FreeBSD"), "LaunchError"),
    ],
)
def test_why_guests_are_booted(site, refusal, word):
    factory = FakeFactory("booted")
    factory.refusal = refusal
    setup = site(factory, count=5)
    told = "guests are booted here, not cloned: this is FreeBSD"
    with pytest.raises(CannotMeasureError, match=told) as raised:
        guests.clone_on_demand(setup)
    assert raised.value.why_booted == word


def test_armed_where_nothing_is_armed(site):
    with pytest.raises(CannotMeasureError, match="guests are cloned here, not armed"):
        guests.armed_noop(site(FakeFactory("cloned"), count=5))


def test_a_cold_boot_that_is_only_compared_with_is_measured_once(site):
    assert guests.cold_boot(site(FakeFactory("booted"), only_for_ratios=True)).samples == 1
    assert guests.cold_boot(site(FakeFactory("booted"))).samples == 3
    made = site(FakeFactory("booted"), count=2)
    assert guests.cold_boot(made).samples == 2
    assert made.asked == "never"


def test_two_figures_of_one_measurement(site):
    factory = FakeFactory("armed")
    made = site(factory, count=6)
    assert guests.guests_per_s(made).samples == 6
    figure = guests.cpu_per_guest(made)
    assert figure.samples == 6
    assert figure.value == pytest.approx(250, rel=0.2)
    assert len(factory.guests) == 10
    assert factory.waited == 0  # the pool was never waited for


def test_memory_is_that_of_the_processes(site):
    figure = guests.pss_per_clone(site(FakeFactory("armed"), count=3))
    assert figure.samples == 3
    assert figure.value == pytest.approx(guests.memory_of(os.getpid())["Pss"] / 2**20, rel=0.5)


def test_memory_of_a_process_that_is_not_there():
    with pytest.raises(CannotMeasureError, match="does not report Pss"):
        guests.memory_of(2**30)


@pytest.mark.parametrize(("room", "most", "value"), [(7, 60, 7), (60, 5, 5)])
def test_as_many_as_there_is_room_for(site, room, most, value):
    made = site(FakeFactory("cloned", room=room), most=most)
    figure = guests.leased_at_once(made)
    assert (figure.value, figure.samples) == (value, value)
    limit = "there is no room" if room < most else "no more than 5 were tried (--most)"
    assert figure.details["limit"] == limit


def test_no_room_at_all(site):
    with pytest.raises(LaunchError, match="no room"):
        guests.leased_at_once(site(FakeFactory("cloned", room=0)))


def test_guests_that_were_booted_do_not_count(site):
    figure = guests.leased_at_once(site(FakeFactory("cloned", "cloned", "booted")))
    assert figure.value == 2
    assert "booted" in str(figure.details["limit"])


def test_guests_that_answer_late_do_not_count(site, monkeypatch):
    answers = iter([0.1, 0.1, 2.5, 0.2, 3.0, 0.2])
    monkeypatch.setattr(guests, "_answer", lambda _: next(answers))
    factory = FakeFactory("cloned")
    figure = guests.running_at_once(site(factory, most=4))
    assert (figure.value, figure.samples) == (2, 3)
    assert figure.details["limit"] == "the last one took 2.5 s to answer"
    assert figure.details["slowest_answer_ms"] == 3000
    assert [guest.done for guest in factory.guests] == [[guests._BUSY]] * 3 + [[]]


# -- pytest ----------------------------------------------------------------------------------------


def test_an_image_without_python(site):
    made = site(FakeFactory("armed"), python=False)
    for measure in (suites.in_guest_overhead, suites.in_guest_isolated):
        with pytest.raises(CannotMeasureError, match="the image x has no Python"):
            measure(made)


def test_idle_cost(site):
    figure = suites.idle_cost(site(FakeFactory("armed"), count=1))
    assert figure.samples == 1
    assert isinstance(figure.value, float)


def test_a_pytest_that_fails_says_why(site, tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_x.py").write_text("def test_x():\n    assert 'cause' == ''\n")
    with pytest.raises(CannotMeasureError, match=r"(?s)pytest ended with status 1: .*cause"):
        suites._pytest(tmp_path, dict(os.environ), "-p", "no:vmsandbox")


def test_pytest_has_the_same_guests(tmp_path):
    made = Setup(
        image="x",
        settings=Settings(accelerator="tcg", boot_timeout=5.0, image_path=(tmp_path / "images",)),
        hardware={"memory": "1GiB", "cpus": "2"},
        folder=tmp_path,
    )
    suites._write_ini(made, tmp_path)
    assert (tmp_path / "pytest.ini").read_text().splitlines() == [
        "[pytest]", "vm_accel = tcg", "vm_boot_timeout = 5.0", "vm_memory = 1GiB", "vm_cpus = 2",
        "vm_image_path =", f"    {tmp_path / 'images'}",
    ]  # fmt: skip


def test_a_suite_tells_how_long_its_tests_take(site, tmp_path, monkeypatch):
    """The generated files, by plain pytest."""
    made = site(FakeFactory("armed"))
    folder = suites.write_empty_tests(made, "x", 3)
    (folder / "pytest.ini").write_text("[pytest]\n")
    took = tmp_path / "took"
    suites._pytest(folder, {**os.environ, suites.TOOK: str(took)}, "-p", "no:vmsandbox")
    assert 0 < float(took.read_text()) < 60


def test_a_pytest_that_gets_guests_as_by_itself(site, tmp_path, monkeypatch):
    seen = SimpleNamespace()

    def run(folder, variables, *more):
        seen.variables, seen.more = variables, more

    monkeypatch.setattr(suites, "_pytest", run)
    monkeypatch.setenv("VMSANDBOX_CLONES", "never")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with pytest.raises(CannotMeasureError, match="has not written its time"):
        suites._run_with_plugin(site(FakeFactory("armed")), tmp_path / "suite", "--in-vm")
    assert seen.more[-2:] == ("--vm=x", "--in-vm")
    names = set(seen.variables)
    assert not names & {"VMSANDBOX_CLONES", "PYTEST_ADDOPTS", "PYTHONDONTWRITEBYTECODE"}
