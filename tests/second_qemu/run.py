"""Run a command with a second QEMU, which is unpacked beside the installed one.

    python tests/second_qemu/run.py pytest tests/functional/test_clones.py

The file pinned.toml says which one. It is fetched from the archive of Debian the first time, with
the mirror and the proxy that apt uses on this machine, and kept in a cache. Nothing is installed.

Needs Linux on x86-64, and the tools that the image `debian-13` is built with.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.machine.qemu import Qemu, find_qemu

HERE = Path(__file__).resolve().parent
PINNED = HERE / "pinned.toml"
UNPACK_SECONDS = 600.0


class Failure(Exception):
    """What went wrong, and its remedy, for a person to read."""


@dataclass(frozen=True)
class Pin:
    """Which QEMU is wanted.

    Attributes:
        suite: of Debian, such as ``forky``.
        version: of QEMU, such as ``11.1.3``.
    """

    suite: str
    version: str


def main() -> None:
    """Get the QEMU, say which one it is, and become the command."""
    command = sys.argv[1:]
    if not command:
        sys.exit(__doc__)
    pin = pinned()
    try:
        program = obtain(pin, cache(), unpack)
        os.environ["VMSANDBOX_QEMU"] = str(program)
        print(told(pin, find_qemu("x86_64")), flush=True)
    except (Failure, LaunchError) as error:
        sys.exit(f"second QEMU: {error}")
    os.execvp(command[0], command)


def pinned() -> Pin:
    """What the file says."""
    return Pin(**tomllib.loads(PINNED.read_text()))


def cache() -> Path:
    """The folder in which it is kept.

    Where we are root, guests are run by a user who cannot look into our home.
    """
    own = Path("/var/cache/vmsandbox") if os.geteuid() == 0 else cache_dir()
    return own / "second-qemu"


def obtain(pin: Pin, folder: Path, unpack: Callable[[str, Path], None]) -> Path:
    """The program, which is unpacked if it is not there yet; the one of another pin goes.

    Args:
        unpack: fills a folder with the ``usr`` of a suite.

    Raises:
        Failure: it cannot be had.
    """
    wanted = folder / f"{pin.suite}-{pin.version}"
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not wanted.exists():
            for old in folder.iterdir():  # of another pin, or half of one
                if old.is_dir():
                    shutil.rmtree(old)
            incoming = folder / "incoming"
            incoming.mkdir(mode=0o755)
            unpack(pin.suite, incoming)
            write_program(incoming, wanted)
            incoming.rename(wanted)
    return wanted / "qemu"


def unpack(suite: str, folder: Path) -> None:
    """Fill a folder from the archive.

    Raises:
        Failure: that did not work; why is printed.
    """
    print(f"second QEMU: fetching that of Debian {suite}", flush=True)
    work = folder / "work"
    work.mkdir()
    environment = {
        "VMSANDBOX_OUT": str(folder),
        "VMSANDBOX_WORK": str(work),
        "VMSANDBOX_DEBIAN_ARCHITECTURE": "amd64",
        "SUITE": suite,
    }
    try:
        subprocess.run(
            [HERE / "unpack"],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            timeout=UNPACK_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Failure(
            f"that of Debian {suite} could not be fetched: {error}\n"
            "Remedy: see above; this needs the network, a mirror of Debian with that suite, and the "
            f"image tools ('vmsandbox quickstart' installs them). {PINNED} names the suite"
        ) from error
    shutil.rmtree(work)


def write_program(root: Path, place: Path) -> None:
    """Write a program that starts the QEMU below `root` with its own libraries, from `place`."""
    usr = place / "usr"
    argv = [
        f"{usr}/lib64/ld-linux-x86-64.so.2",
        *("--library-path", f"{usr}/lib/x86_64-linux-gnu"),
        f"{usr}/bin/qemu-system-x86_64",
        *("-L", f"{usr}/share/qemu", "-L", f"{usr}/share/seabios"),
    ]
    program = root / "qemu"
    # The shell sets PWD, and QEMU's environment is nobody's.
    program.write_text(f'#!/bin/sh\nunset PWD\nexec {shlex.join(argv)} "$@"\n')
    program.chmod(0o755)


def told(pin: Pin, found: Qemu) -> str:
    """What is said about the QEMU that tests run on."""
    line = f"second QEMU: {found.release}, {found.path}"
    if found.release == pin.version:
        return line
    return (
        f"{line}\nsecond QEMU: {pin.suite} has {pin.version} no more; "
        f"write {found.release} into {PINNED}"
    )


if __name__ == "__main__":
    main()
