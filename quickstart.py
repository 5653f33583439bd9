#!/usr/bin/env python3
"""Run tests in virtual machines from a checkout, on a machine that has only Python.

The script makes `.venv` in the checkout, and installs this project and tox into it. Then it runs
`.venv/bin/vmsandbox quickstart`, which installs QEMU and the image tools, builds the default image and
runs a small test suite in guests. You can run it again: it changes only what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Sequence  # collections.abc's cannot be subscripted on old Pythons

OLDEST_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
STAMP = VENV / ".vmsandbox-quickstart"
REQUIREMENTS = ["--editable", str(ROOT), "tox>=4.23"]


class Failure(Exception):
    """What went wrong, and the remedy."""

    def __init__(self, brief: str, remedy: str) -> None:
        super().__init__(f"quickstart: {brief}\nRemedy: {remedy}")


def main() -> None:
    """Parse the arguments, make `.venv`, and become `vmsandbox quickstart`."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", maxsplit=1)[1],
        epilog="Other arguments are passed to `.venv/bin/vmsandbox quickstart`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--yes", "-y", action="store_true", help="install missing packages without asking"
    )
    parser.add_argument("--only-install", action="store_true", help="only install missing packages")
    options, _ = parser.parse_known_args()
    try:
        check_machine()
        make_venv(yes=options.yes)
        install_project()
    except Failure as failure:
        sys.exit(str(failure))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.stdout.flush()
    command = str(BIN / "vmsandbox")
    os.execv(command, [command, "quickstart", *sys.argv[1:]])


def check_machine() -> None:
    """Refuse a machine that cannot work, before anything changes."""
    if sys.version_info < OLDEST_PYTHON:
        raise Failure(
            f"this is Python {sys.version.split()[0]}, which is too old",
            "run this script with Python {}.{} or newer".format(*OLDEST_PYTHON),
        )
    if os.name != "posix":
        raise Failure(
            "guests do not run on this system",
            "use Linux: on other systems, the plugin loads and does nothing",
        )
    if not (ROOT / "pyproject.toml").exists():
        raise Failure(
            f"{ROOT} is not a checkout of the project",
            "run the quickstart.py that is in the checkout",
        )


def make_venv(*, yes: bool) -> None:
    """Make `.venv`, or complete an incomplete one. A good one stays as it is."""
    if runs([BIN / "python", "-m", "pip", "--version"]):
        check_venv_python()
        return
    if os.path.lexists(str(BIN / "python")) and not runs([BIN / "python", "--version"]):
        raise Failure(
            f"{VENV} exists, but its Python does not run", "remove that folder and start again"
        )
    if not has_venv_module():
        install_venv_module(yes=yes)
    say(f"Making {VENV}")
    result = subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False)
    if result.returncode:
        raise Failure(f"{VENV} could not be made", "see the error above, and start again")
    check_venv_python()


def check_venv_python() -> None:
    """Refuse a `.venv` that somebody made with an older Python."""
    check = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    if not runs([BIN / "python", "-c", check]):
        raise Failure(f"the Python in {VENV} is too old", "remove that folder and start again")


def has_venv_module() -> bool:
    """Whether this Python can make a venv with pip. Debian's default installation cannot."""
    return runs([sys.executable, "-c", "import venv, ensurepip; ensurepip.version()"])


def install_venv_module(*, yes: bool) -> None:
    """Install Python's module venv with apt-get."""
    version = "{}.{}".format(*sys.version_info)
    package = f"python{version}-venv"
    if sys.executable not in (f"/usr/bin/python{version}", "/usr/bin/python3"):
        raise Failure(
            f"{sys.executable} cannot make virtual environments (no ensurepip)",
            "use a complete Python, for instance your system's own",
        )
    if not shutil.which("apt-get"):
        raise Failure(
            "Python's module venv is missing, and there is no apt-get to install it",
            "install Python's modules venv and ensurepip with your system's package manager, "
            "and start again",
        )
    apt = apt_command()
    install = [*apt, "install", "--yes", "--no-install-recommends", package]
    ask(
        f"{package} is needed to make {VENV}. This command installs it:\n  {' '.join(install)}",
        yes=yes,
    )
    updated = False
    if not runs([*apt, "install", "--simulate", package]):
        update(apt)
        updated = True
    say(f"Installing {package}")
    if succeeds(install):
        return
    if not updated:  # the lists may be older than what the mirror still has
        update(apt)
        if succeeds(install):
            return
    raise Failure(f"apt-get could not install {package}", "see the error above, and start again")


def apt_command() -> list[str]:
    """`apt-get` as root, quiet, without questions."""
    apt = [
        *("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"),
        *("-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=120"),
    ]
    if os.geteuid() == 0:
        return apt
    if not shutil.which("sudo"):
        raise Failure(
            "installing packages needs root, and there is no sudo",
            "start again as root, or install python3-venv as root and start again",
        )
    return ["sudo", *apt]


def update(apt: list[str]) -> None:
    """Update the package lists."""
    say("Updating the package lists")
    if not succeeds([*apt, "update"]):
        raise Failure(
            "apt-get update failed", "see the error above, check the network, and start again"
        )


def succeeds(argv: Sequence[str]) -> bool:
    """Whether a program ends with status 0. Only its standard error is shown."""
    return not subprocess.run(argv, check=False, stdout=subprocess.DEVNULL).returncode


def install_project() -> None:
    """Install the project and tox into `.venv`, unless this state is already installed."""
    state = fingerprint()
    if (
        STAMP.exists()
        and STAMP.read_text(encoding="utf-8") == state
        and (BIN / "vmsandbox").exists()
        and (BIN / "tox").exists()
    ):
        return
    say("Installing the project and tox")
    pip = [str(BIN / "python"), "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "install", "--quiet", *REQUIREMENTS], check=False).returncode:
        raise Failure("pip could not install the project", "see the error above, and start again")
    STAMP.write_text(state, encoding="utf-8")


def fingerprint() -> str:
    """A digest of everything that decides what is installed in `.venv`."""
    python = subprocess.run(
        [str(BIN / "python"), "--version"], check=True, stdout=subprocess.PIPE
    ).stdout
    digest = hashlib.sha256(python)
    digest.update(repr(REQUIREMENTS).encode())
    digest.update((ROOT / "pyproject.toml").read_bytes())
    return digest.hexdigest()


def ask(what: str, *, yes: bool) -> None:
    """Go on only if the person agrees."""
    say(what)
    if yes:
        return
    if not sys.stdin.isatty():
        raise Failure(
            "standard input is no terminal, so nobody can confirm",
            "add --yes, or run that command yourself",
        )
    if input("Run it now? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Failure("nothing was installed", "run that command yourself, and start again")


def runs(argv: Sequence[object]) -> bool:
    """Whether a program can be started and ends with status 0. Its output is dropped."""
    try:
        return not subprocess.run(
            [str(argument) for argument in argv],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ).returncode
    except OSError:
        return False


def say(text: str) -> None:
    """Print what is happening now."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    main()
