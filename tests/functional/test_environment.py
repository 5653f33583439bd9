"""What the real uv makes of a guest's requirements, with the real package index. No guests."""

from __future__ import annotations

import importlib.metadata
from contextlib import ExitStack
from pathlib import Path

import pytest

from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import TransferError
from pytest_vmsandbox.inside import environment
from pytest_vmsandbox.inside.environment import GuestPython, prepare
from pytest_vmsandbox.inside.requirements import Requirements

NEW = GuestPython(version=(3, 13, 5), machine="x86_64", libc=(2, 41))
OLD = GuestPython(version=(3, 9, 2), machine="aarch64", libc=(2, 31))


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))
    with ExitStack() as stack:

        def make(requirements, python=NEW, *, offline=False):
            return stack.enter_context(
                prepare(requirements, python, offline=offline, say=lambda _: None)
            )

        yield make


@pytest.mark.parametrize(
    ("machine", "compiled"), [("i686", True), ("riscv64", True), ("s390x", False)]
)
def test_other_architectures(make, tmp_path, machine, compiled):
    """Pure Python works everywhere. Compiled wheels are there where somebody has published them.

    Markers see the guest's machine: the package that is for another one does not exist.
    """
    python = GuestPython(version=(3, 13, 5), machine=machine, libc=(2, 41))
    lines = ["coverage", "no-such-package-anywhere; platform_machine == 'x86_64'"]
    if compiled:
        lines.append("markupsafe")
    packages = make(wanted(tmp_path, *lines), python).folder / "site-packages"
    assert (packages / "_pytest").is_dir()
    assert (packages / "coverage" / "pytracer.py").exists()
    libraries = [file for file in packages.rglob("*.so") if "markupsafe" in file.parts]
    assert len(libraries) == compiled
    kind, order, number = ARCHITECTURES[machine].elf
    for library in libraries:
        head = library.read_bytes()[:20]
        assert (head[4], head[5]) == (kind, order)
        assert int.from_bytes(head[18:20], "little" if order == 1 else "big") == number


def wanted(root: Path, *lines: str, preferred=(), dropped=()) -> Requirements:
    lines = ("pytest>=8.4", *lines)
    return Requirements(root=root, lines=lines, preferred=preferred, dropped=dropped)


def versions(made) -> dict[str, str]:
    found = importlib.metadata.distributions(path=[str(made.folder / "site-packages")])
    return {it.name.lower(): it.version for it in found}


def test_an_old_python_gets_the_backports(make, tmp_path):
    made = make(wanted(tmp_path, preferred=("pytest==9.0.0",)), OLD)
    found = versions(made)
    assert found["pytest"].startswith("8.4.")
    assert {"exceptiongroup", "tomli", "typing_extensions"} <= {*found}
    assert (
        (made.folder / "bin" / "pytest").read_text().startswith("#!/opt/vmsandbox/env/bin/python\n")
    )
    assert not (made.folder / "site-packages" / "bin").exists()
    assert not (made.folder / "site-packages" / ".lock").exists()


def test_preferences_are_kept_where_they_can_be(make, tmp_path):
    """PyYAML 6.0.1 has no wheel for Python 3.13, but 6.0.2 has."""
    preferred = ("iniconfig==2.0.0", "pluggy==1.5.0", "pyyaml==6.0.1")
    found = versions(make(wanted(tmp_path, "pyyaml", "pluggy>=1.6", preferred=preferred)))
    assert found["iniconfig"] == "2.0.0"
    assert found["pluggy"] != "1.5.0"
    assert found["pyyaml"] != "6.0.1"


def test_what_is_dropped_is_not_installed_whoever_needs_it(make, tmp_path):
    found = versions(make(wanted(tmp_path, "hypothesis", dropped=("sortedcontainers",))))
    assert "hypothesis" in found
    assert "sortedcontainers" not in found


def test_this_environment_again(make, tmp_path):
    """What this very test runs in, with plugins that only this side loads."""
    requirements = Requirements.of_host(tmp_path, ["pytest-vmsandbox"], say=lambda _: None)
    found = versions(make(requirements))
    for name in ("hypothesis", "paramiko", "pytest-xdist"):
        assert found[name] == importlib.metadata.version(name)


def test_entries_of_the_setting(make, tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "p"\nversion = "1"\ndependencies = ["six"]\n'
        '[project.optional-dependencies]\nx = ["p[y]"]\ny = ["idna"]\n'
        '[dependency-groups]\nmore = ["toolz"]\ntest = [{ include-group = "more" }]\n'
    )
    (tmp_path / "dev.txt").write_text("-e .\nsortedcontainers\n")
    entries = ["dev.txt", "group:test", "extra:x", "certifi"]
    found = versions(make(Requirements.of_entries(tmp_path, entries, ["p"])))
    assert {"six", "idna", "toolz", "sortedcontainers", "certifi", "pytest"} <= {*found}
    assert "p" not in found


def test_one_that_is_published_as_sources_only_is_built_here(make, tmp_path):
    assert versions(make(wanted(tmp_path, "docopt==0.6.2")))["docopt"] == "0.6.2"


def test_offline(make, tmp_path, monkeypatch):
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "empty"))
    with pytest.raises(TransferError, match="offline") as caught:
        make(wanted(tmp_path), offline=True)
    assert "pytest" in caught.value.details


def test_the_second_time_uv_is_not_needed(make, tmp_path, monkeypatch):
    requirements = wanted(tmp_path)
    made = make(requirements)
    monkeypatch.setattr(environment, "Uv", None)
    assert make(requirements) == made
