"""Build the wheel (by way of the sdist), look into it, and use it far from the checkout.

Needs the package `build`; everything happens in a temporary folder. The helpers for guests are built for a
release only, so others stand in for them here. With `--release DIST` the wheel in that folder is looked at:
it must have the real ones.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "pytest_vmsandbox"

NOT_COPIED = shutil.ignore_patterns(".git", ".tox", ".venv", ".*_cache", "__pycache__", "dist")
PROGRAM = """
import sys
from pathlib import Path
from pytest_vmsandbox.catalogue.helpers import helper_program
print(helper_program(sys.argv[1], Path("cache")))
"""

INERT_SUITE = """
import sys

def test_plain(pytestconfig):
    assert pytestconfig.pluginmanager.has_plugin("vmsandbox")

def test_nothing_heavy_is_imported():
    assert not {"paramiko", "qemu.qmp"} & set(sys.modules)
"""


def main() -> None:
    """Run all checks; the first that fails ends the program with status 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--release", type=lambda name: Path(name).resolve(), metavar="DIST")
    dist = parser.parse_args().release
    with tempfile.TemporaryDirectory(prefix="vmsandbox-wheel-") as name:
        folder = Path(name)
        checkout = ROOT if dist else with_helpers(folder / "checkout")
        if not dist:
            dist = folder / "dist"
            run([sys.executable, "-m", "build", "--outdir", dist, checkout], cwd=folder, quiet=True)
        wheel = max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime)
        check_contents(wheel, checkout)
        check_installed(wheel, folder)
    print(f"{wheel.name} is complete, and the plugin loads from it")


def with_helpers(checkout: Path) -> Path:
    """A copy of the checkout in which something stands in for the helpers."""
    shutil.copytree(ROOT, checkout, ignore=NOT_COPIED)
    helpers = checkout / PACKAGE / "helpers"
    shutil.rmtree(helpers, ignore_errors=True)
    helpers.mkdir()
    sums = checkout / "images" / "helper" / "SHA256SUMS"
    names = [line.split()[1] for line in sums.read_text(encoding="utf-8").splitlines()]
    for name in names[1:]:
        (helpers / name).write_text(f"stands in for {name}\n", encoding="utf-8")
        (helpers / name).chmod(0o755)
    files = [sums.with_name(names[0]), *(helpers / name for name in names[1:])]
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    sums.write_text("".join(lines), encoding="utf-8")
    return checkout


def check_contents(wheel: Path, checkout: Path) -> None:
    """What must be inside is inside, and nothing else is."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    expected = {f"{PACKAGE}/{path}" for path in sources(checkout / PACKAGE)}
    expected |= {f"{PACKAGE}/images/{path}" for path in sources(checkout / "images")}
    found = {name for name in inside if ".dist-info/" not in name}
    if missing := expected - found:
        sys.exit(f"missing in {wheel.name}: {sorted(missing)}")
    if surplus := found - expected:
        sys.exit(f"should not be in {wheel.name}: {sorted(surplus)}")
    for ending in ("/licenses/LICENSE", "/entry_points.txt"):
        if not any(name.endswith(ending) for name in inside):
            sys.exit(f"missing in {wheel.name}: *{ending}")


def sources(folder: Path) -> list[str]:
    """The files below `folder`, without what Python leaves behind."""
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]


def check_installed(wheel: Path, folder: Path) -> None:
    """The plugin is loaded and inert, and the command starts."""
    run([sys.executable, "-m", "venv", folder / "venv"], cwd=folder)
    bin_dir = folder / "venv" / "bin"
    pip = [bin_dir / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, wheel], cwd=folder)
    suite = folder / "suite"
    suite.mkdir()
    (suite / "test_inert.py").write_text(INERT_SUITE, encoding="utf-8")
    run([bin_dir / "pytest", "--quiet", "-W", "error", suite], cwd=suite, quiet=True)
    if "--vm-list" not in run([bin_dir / "pytest", "--help"], cwd=suite, quiet=True):
        sys.exit("pytest --help does not know --vm-list")
    check_helpers(bin_dir / "python", suite)
    names = {path.parent.name for path in (ROOT / "images").glob("*/image.toml")}
    listed = run([bin_dir / "vmsandbox", "images", "list"], cwd=suite, quiet=True)
    if missing := {name for name in names if name not in listed}:
        sys.exit(f"vmsandbox images list does not name {sorted(missing)}:\n{listed}")


def check_helpers(python: Path, folder: Path) -> None:
    """The installed package takes its own helpers, and they may be run."""
    sums = ROOT / "images" / "helper" / "SHA256SUMS"
    for line in sums.read_text(encoding="utf-8").splitlines()[1:]:
        name = line.split()[1]
        found = Path(run([python, "-c", PROGRAM, name], cwd=folder, quiet=True).strip())
        if found.parts[-3:] != (PACKAGE, "helpers", name) or not os.access(found, os.X_OK):
            sys.exit(f"the helper for {name} is not the installed one: {found}")


def run(argv: list[object], *, cwd: Path, quiet: bool = False) -> str:
    """Run a program that must end well; its output, which is shown if it does not."""
    result = subprocess.run(
        [str(argument) for argument in argv],
        cwd=cwd,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        encoding="utf-8",
    )
    if result.returncode:
        sys.exit(f"{result.stdout or ''}\nfailed: {' '.join(map(str, argv))}")
    return result.stdout or ""


if __name__ == "__main__":
    main()
