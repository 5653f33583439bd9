"""What goes to guests runs on the Pythons that guests have, and with the pytest that these have.

This machine plays the guest, with an interpreter of another version.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from uv import find_uv_bin

from pytest_vmsandbox.inside.environment import OLDEST_PYTHON, GuestPython, parse_probe, prepare
from pytest_vmsandbox.inside.install import RUNNER
from pytest_vmsandbox.inside.requirements import Requirements
from support.inside import Suite

VERSIONS = [f"3.{minor}" for minor in range(OLDEST_PYTHON[1], 15) if minor != sys.version_info[1]]
ONLY_THERE = '    return "%d.%d" % sys.version_info[:2]'
TESTS = f"""
import logging
import os
import signal
import sys
import unittest

import pytest

@pytest.fixture(scope="session")
def version():
{ONLY_THERE}

@pytest.fixture
def broken():
    raise OSError("broken")

def test_version(version, record_property):
    record_property("version", version)
    assert os.environ["VMSANDBOX_GUEST"] and version == os.environ["WANTED"]

@pytest.mark.parametrize("value", ["good", "bad"])
def test_value(value, tmp_path, capsys):
    logging.getLogger("its").warning("log of %s", value)
    assert value == "good"

def test_skipped(): pytest.skip("no reason")

@pytest.mark.xfail(reason="known")
def test_xfail(): raise ValueError

def test_broken(broken): pass

class TestOld(unittest.TestCase):
    def test_sub(self): self.assertEqual(1, 1)

def test_dies(): os.kill(os.getpid(), signal.SIGKILL)

def test_next(version): pass

@pytest.mark.vm(isolation="test")
def test_alone(version): pass
"""


def works(python: Path | str) -> bool:
    """Whether it starts: one that only stands in for others may not."""
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def find(version: str) -> str:
    """The path of an interpreter; skips where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    there = [str(it) for it in pyenv.glob(f"versions/{version}.*/bin/python{version}")]
    there += filter(None, [shutil.which(f"python{version}")])
    for python in filter(works, there):
        return python
    pytest.skip(f"there is no Python {version} here")


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def python(version, tmp_path):
    """An environment with the newest pytest for that Python, and what measures coverage."""
    base = find(version)
    uv, env = find_uv_bin(), tmp_path / "env"
    for command in (
        ["venv", "--no-python-downloads", "--python", base, str(env)],
        ["pip", "install", "--python", str(env / "bin" / "python"), "pytest", "coverage"],
    ):
        subprocess.run([uv, *command, "--quiet"], check=True, timeout=120)
    return str(env / "bin" / "python")


@pytest.fixture
def pure(tmp_path, monkeypatch):
    """An environment of this Python with exactly what a guest of s390x gets: no compiled wheel at all."""
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))
    guest = GuestPython(version=sys.version_info[:3], machine="s390x", libc=(2, 36))
    env, wanted = tmp_path / "env", Requirements.of_entries(tmp_path, ["coverage"])
    subprocess.run([find_uv_bin(), "venv", "-q", "--python", sys.executable, str(env)], check=True)
    python = str(env / "bin" / "python")
    with prepare(wanted, guest, offline=False, say=lambda _: None) as made:
        packages = made.folder / "site-packages"
        assert [*packages.rglob("*.so")] == []
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        done = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
        Path(done.stdout.strip(), "guest.pth").write_text(f"{packages}\n", "utf-8")
        yield python


def test_runner_in_pure_python(pure, tmp_path_factory, monkeypatch):
    """Coverage too is measured without compiled code, and without a word about that."""
    run(pure, "{}.{}".format(*sys.version_info), tmp_path_factory, monkeypatch)


def test_runner(python, version, tmp_path_factory, monkeypatch):
    done = subprocess.run(
        [python, "-I", "-S", "-W", "error", "-"],
        input=(RUNNER / "probe.py").read_text(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "{}.{}".format(*parse_probe(done.stdout)[0].version) == version

    run(python, version, tmp_path_factory, monkeypatch)


def run(python, version, tmp_path_factory, monkeypatch):
    """Run the suite with an interpreter, and see that all of it comes back."""
    suite = Suite(tmp_path_factory.mktemp("s"))
    (suite.path / "pytest.ini").write_text(f"[pytest]\nvm_env = WANTED={version}\n")
    suite.write("test_it.py", TESTS)
    monkeypatch.setenv("LOCAL_PYTHON", python)
    status, output = suite.run("--in-vm", "-rA", "--cov=.", "--cov-report=json", "--junitxml=junit")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "2 failed, 5 passed, 1 skipped, 1 xfailed, 1 warning, 1 error in" in output
    assert "AssertionError: assert 'bad' == 'good'" in output
    assert "record_property is incompatible with junit_family" in output
    assert "WARNING  its:test_it.py:24 log of bad" in output
    assert "SKIPPED [1] test_it.py:27: no reason" in output
    assert "the interpreter was killed by SIGKILL" in output
    assert "tracer" not in output
    assert f'<property name="version" value="{version}"' in (suite.path / "junit").read_text()
    assert suite.guests == ["debian-13-1", "debian-13-2"]
    covered = json.loads((suite.path / "coverage.json").read_text())["files"]["test_it.py"]
    assert 1 + TESTS.splitlines().index(ONLY_THERE) in covered["executed_lines"]
