"""Measurements with a pytest that we start on suites that we write."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pytest_vmsandbox.cli import pytest_environment
from pytest_vmsandbox.cli.benchmark.guests import CannotMeasureError, Result, Setup, median
from pytest_vmsandbox.core.settings import CLONES_VARIABLE
from pytest_vmsandbox.inside.install import Payload, install

TOOK = "VMSANDBOX_BENCH_TOOK"  # the file that a suite writes its time to
_RUN_SECONDS = 3600.0
_TAIL = 2000  # characters of what pytest said
_EMPTY_TESTS, _PAIRS = 500, 3
_ISOLATED_TESTS = 10

CONFTEST = f"""\
import os
import time

TIMES = []


def pytest_runtest_logfinish():
    TIMES.append(time.perf_counter())


def pytest_unconfigure(config):
    if "{TOOK}" in os.environ and TIMES:
        with open(os.environ["{TOOK}"], "w") as file:
            print(TIMES[-1] - TIMES[0], file=file)
"""
_FIRST_TEST = f"""\
import os
import time


def test_first(vm):
    with open(os.environ["{TOOK}"], "w") as file:
        print(time.monotonic(), file=file)
"""


class Pairs:
    """Two things measured in turn, so a load on the machine affects both.

    Args:
        number: of pairs.
        first, second: functions that measure once.

    Attributes:
        first, second: the median of each.
        ratio: the median of first divided by second, over all pairs.
        differences: first minus second, in each pair.
    """

    def __init__(
        self, number: int, first: Callable[[], float], second: Callable[[], float]
    ) -> None:
        pairs = [(first(), second()) for _ in range(number)]
        self.first = statistics.median(a for a, _ in pairs)
        self.second = statistics.median(b for _, b in pairs)
        self.ratio = statistics.median(a / b for a, b in pairs)
        self.differences = [a - b for a, b in pairs]


# -- the plugin's own cost -------------------------------------------------------------------------


def idle_cost(setup: Setup) -> Result:
    """Time that the plugin adds to a suite that does not use it."""
    folder = _folder(setup, "idle")
    return median(idle_pairs(folder, setup.at_most(20)).differences)


def idle_pairs(folder: Path, number: int) -> Pairs:
    """Milliseconds of pytest on an empty suite with the plugin, and without it."""
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (folder / "test_nothing.py").write_text("def test_nothing():\n    pass\n", encoding="utf-8")
    without = ("-p", "no:vmsandbox")
    _run_empty(folder)  # compiles byte code and warms caches
    _run_empty(folder, *without)
    return Pairs(number, lambda: _run_empty(folder), lambda: _run_empty(folder, *without))


def _run_empty(folder: Path, *more: str) -> float:
    began = time.perf_counter()
    _pytest(folder, pytest_environment.without_options(), *more)
    return (time.perf_counter() - began) * 1000


# -- guests ----------------------------------------------------------------------------------------


def second_run(setup: Setup) -> Result:
    """Start pytest with existing templates, until its first test has its guest."""
    folder = _folder(setup, "second")
    (folder / "test_first.py").write_text(_FIRST_TEST, encoding="utf-8")
    samples = []
    for _ in range(setup.at_most(5) + 1):
        began = time.monotonic()
        samples.append(_run_with_plugin(setup, folder) - began)
    return median(samples[1:], digits=2)  # the first run may have to build a template


# -- inside guests ---------------------------------------------------------------------------------


def in_guest_overhead(setup: Setup) -> Result:
    """Time that a test inside a guest takes longer than with plain pytest there."""
    pairs = inside_pairs(setup, number=setup.at_most(_PAIRS), tests=_EMPTY_TESTS)
    return median(pairs.differences, digits=2)


def inside_pairs(setup: Setup, *, number: int, tests: int) -> Pairs:
    """Milliseconds of an empty test inside a guest, and with plain pytest there.

    We measure from the end of the first test, which boots a guest, to the end of the last one.
    """
    folder = write_empty_tests(setup, "inside", tests)
    return Pairs(
        number,
        lambda: _run_with_plugin(setup, folder, "--in-vm") / (tests - 1) * 1000,
        lambda: _seconds_plain(setup, folder) / (tests - 1) * 1000,
    )


def in_guest_isolated(setup: Setup) -> Result:
    """A test inside a guest of its own (isolation="test"), without the first of the run."""
    counted = setup.at_most(_ISOLATED_TESTS)
    folder = write_empty_tests(setup, "isolated", counted + 1)
    seconds = _run_with_plugin(setup, folder, "--in-vm", "--vm-isolation=test") / counted
    return Result(value=round(seconds, 3), samples=counted)


def write_empty_tests(setup: Setup, name: str, number: int) -> Path:
    """A suite for guests that measures how long its tests take.

    Raises:
        CannotMeasureError: guests cannot run it.
    """
    if not setup.python:
        raise CannotMeasureError(f"the image {setup.image} has no Python for tests inside")
    folder = _folder(setup, name)
    (folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    tests = (f"def test_{index}():\n    pass\n\n\n" for index in range(number))
    (folder / "test_empty.py").write_text("".join(tests), encoding="utf-8")
    return folder


def _seconds_plain(setup: Setup, folder: Path) -> float:
    """Seconds that plain pytest in a guest takes for the tests of a suite."""
    took = "/tmp/took"  # noqa: S108  # in the guest
    with setup.factory("armed") as factory, factory.boot(setup.image, **setup.hardware) as guest:
        installed = install(guest, Payload.of(folder, say=lambda _: None))
        argv = [installed.place.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        guest.run(argv, cwd=installed.tree, env={TOOK: took}, timeout=_RUN_SECONDS)
        return float(guest.read_text(took))


# -- pytest ----------------------------------------------------------------------------------------


def _folder(setup: Setup, name: str) -> Path:
    folder = setup.folder / name / "suite"
    folder.mkdir(parents=True)
    _write_ini(setup, folder)
    return folder


def _write_ini(setup: Setup, folder: Path) -> None:
    """Write an ini file that makes the same guests as without pytest."""
    lines = ["[pytest]", f"vm_accel = {setup.settings.accelerator}"]
    lines += [f"vm_boot_timeout = {setup.settings.boot_timeout}"]
    lines += [f"vm_{name} = {value}" for name, value in setup.hardware.items()]
    if setup.settings.image_path:
        paths = (str(path.absolute()) for path in setup.settings.image_path)
        lines += ["vm_image_path =", *(f"    {path}" for path in paths)]
    (folder / "pytest.ini").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run_with_plugin(setup: Setup, folder: Path, *more: str) -> float:
    """Run a suite with the plugin. Returns the seconds that the suite has measured."""
    took = folder.parent / "took"
    took.unlink(missing_ok=True)
    variables = {**pytest_environment.pytest_variables(), TOOK: str(took)}
    variables.pop(CLONES_VARIABLE, None)  # the default of pytest
    _pytest(folder, variables, "-p", pytest_environment.PLUGIN, f"--vm={setup.image}", *more)
    if not took.exists():
        raise CannotMeasureError("pytest ended, but the suite has not written its time")
    return float(took.read_text(encoding="utf-8"))


def _pytest(folder: Path, variables: Mapping[str, str], *more: str) -> None:
    argv = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(f"--rootdir={folder}", "-c", str(folder / "pytest.ini"), *more),
    ]
    try:
        done = subprocess.run(
            argv,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            errors="replace",
            timeout=_RUN_SECONDS,
            check=False,
            encoding="utf-8",
        )
    except subprocess.TimeoutExpired as error:
        raise CannotMeasureError(f"pytest did not end within {_RUN_SECONDS:g} s") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-_TAIL:]
        raise CannotMeasureError(f"pytest ended with status {done.returncode}: {said}")
