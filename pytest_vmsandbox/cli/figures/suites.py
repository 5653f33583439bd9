"""The figures that are measured with a pytest of their own, on suites that are made for it."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_vmsandbox.cli import pytest_runs
from pytest_vmsandbox.cli.figures.guests import Site
from pytest_vmsandbox.cli.figures.values import CannotMeasureError, Figure, median
from pytest_vmsandbox.core.settings import CLONES_VARIABLE
from pytest_vmsandbox.guests.guest import Guest
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


# -- the plugin's own cost -------------------------------------------------------------------------


def idle_cost(site: Site) -> Figure:
    """The plugin in a suite that does not use it."""
    if not pytest_runs.is_installed():
        raise CannotMeasureError("the plugin is not installed: pytest does not load it by itself")
    folder = _folder(site, "idle")
    return median([(a - b) * 1000 for a, b in idle_pairs(folder, site.at_most(20))])


def idle_pairs(folder: Path, number: int) -> list[tuple[float, float]]:
    """Seconds of pytest on an empty suite with the plugin, and without it, in pairs."""
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (folder / "test_nothing.py").write_text("def test_nothing():\n    pass\n", encoding="utf-8")
    without = ("-p", "no:vmsandbox")
    _run_empty(folder)  # byte code is compiled, caches are warm
    _run_empty(folder, *without)
    return [(_run_empty(folder), _run_empty(folder, *without)) for _ in range(number)]


def _run_empty(folder: Path, *more: str) -> float:
    began = time.perf_counter()
    _pytest(folder, _compiling(pytest_runs.without_options()), *more)
    return time.perf_counter() - began


# -- guests ----------------------------------------------------------------------------------------


def second_run(site: Site) -> Figure:
    """From the start of pytest until its first test has its guest, where templates are there."""
    folder = _folder(site, "second")
    _write_ini(site, folder)
    (folder / "test_first.py").write_text(_FIRST_TEST, encoding="utf-8")
    samples = []
    for counted in range(site.at_most(5) + 1):
        took = folder.parent / "took"
        began = time.monotonic()
        _run_with_plugin(site, folder, took)
        if counted:  # the first one may have to seal a guest
            samples.append(float(took.read_text(encoding="utf-8")) - began)
    return median(samples, digits=2)


# -- inside guests ---------------------------------------------------------------------------------


def in_guest_overhead(site: Site) -> Figure:
    """A test inside a guest, against one by plain pytest in the same kind of guest."""
    pairs = inside_pairs(site, number=site.at_most(_PAIRS), tests=_EMPTY_TESTS)
    figure = median([inside - plain for inside, plain in pairs], digits=2)
    return Figure(
        value=figure.value,
        samples=figure.samples,
        details={
            "tests": _EMPTY_TESTS,
            "inside_ms": round(statistics.median(inside for inside, _ in pairs), 2),
            "plain_ms": round(statistics.median(plain for _, plain in pairs), 2),
        },
    )


def inside_pairs(site: Site, *, number: int, tests: int) -> list[tuple[float, float]]:
    """Milliseconds of an empty test inside a guest, and by plain pytest there, in pairs.

    From the end of the first test, which boots a guest, to the end of the last one.
    """
    _require_python(site)
    folder = _folder(site, "inside")
    write_empty_tests(site, folder, tests)
    pairs = []
    for _ in range(number):
        inside = _seconds_inside(site, folder)
        with site.factory("armed") as factory, factory.boot(site.image, **site.hardware) as guest:
            plain = seconds_plain(folder, guest)
        pairs.append((inside / (tests - 1) * 1000, plain / (tests - 1) * 1000))
    return pairs


def in_guest_isolated(site: Site) -> Figure:
    """A test inside a guest of its own, the first one of the run not counted."""
    _require_python(site)
    folder = _folder(site, "isolated")
    tests = max(2, site.at_most(_ISOLATED_TESTS) + 1)
    write_empty_tests(site, folder, tests)
    seconds = _seconds_inside(site, folder, "--vm-isolation=test") / (tests - 1)
    return Figure(value=round(seconds, 3), samples=tests - 1)


def write_empty_tests(site: Site, folder: Path, number: int) -> None:
    """A suite that tells how long its tests take."""
    _write_ini(site, folder)
    (folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    tests = (f"def test_{index}():\n    pass\n\n\n" for index in range(number))
    (folder / "test_empty.py").write_text("".join(tests), encoding="utf-8")


def seconds_plain(folder: Path, guest: Guest) -> float:
    """Seconds that plain pytest in a guest takes for the tests of a suite."""
    installed = install(guest, Payload.of(folder, say=lambda _: None))
    argv = [installed.place.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    took = "/tmp/took"  # noqa: S108  # in the guest
    guest.run(argv, cwd=installed.tree, env={TOOK: took}, timeout=_RUN_SECONDS)
    return float(guest.read_text(took))


def _seconds_inside(site: Site, folder: Path, *more: str) -> float:
    took = folder.parent / "took"
    _run_with_plugin(site, folder, took, "--in-vm", *more)
    return float(took.read_text(encoding="utf-8"))


def _require_python(site: Site) -> None:
    if not site.python:
        raise CannotMeasureError(f"the image {site.image} has no Python")


# -- pytest ----------------------------------------------------------------------------------------


def _folder(site: Site, name: str) -> Path:
    folder = site.folder / name / "suite"
    folder.mkdir(parents=True)
    return folder


def _write_ini(site: Site, folder: Path) -> None:
    """The same guests as those that are measured without pytest."""
    lines = ["[pytest]", f"vm_accel = {site.settings.accelerator}"]
    lines += [f"vm_boot_timeout = {site.settings.boot_timeout}"]
    lines += [f"vm_{name} = {value}" for name, value in site.hardware.items()]
    if site.settings.image_path:
        paths = (str(path.absolute()) for path in site.settings.image_path)
        lines += ["vm_image_path =", *(f"    {path}" for path in paths)]
    (folder / "pytest.ini").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run_with_plugin(site: Site, folder: Path, took: Path, *more: str) -> None:
    variables, plugin = pytest_runs.environment()
    variables = _compiling(variables)
    variables.pop(CLONES_VARIABLE, None)  # clones as pytest has them by itself
    took.unlink(missing_ok=True)
    _pytest(folder, {**variables, TOOK: str(took)}, "-p", plugin, f"--vm={site.image}", *more)
    if not took.exists():
        raise CannotMeasureError("the suite has not said how long it took")


def _compiling(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _pytest(folder: Path, variables: Mapping[str, str], *more: str) -> None:
    argv: Sequence[str] = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(f"--rootdir={folder}", "-c", str(folder / "pytest.ini"), *more),
    ]
    try:
        done = subprocess.run(
            argv,
            cwd=folder,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_RUN_SECONDS,
            check=False,
            encoding="utf-8",
        )
    except subprocess.TimeoutExpired as error:
        raise CannotMeasureError(f"pytest was not done after {_RUN_SECONDS:g} s") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-_TAIL:]
        raise CannotMeasureError(f"pytest ended with status {done.returncode}: {said}")
