"""Finds the QEMU of this machine."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import LaunchError

_VERSION_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Qemu:
    """A QEMU system emulator.

    Attributes:
        path: of the program.
        version: for instance ``(7, 2, 22)``.
        build: identifies this build on any machine: version and digest of the file.
    """

    path: Path
    version: tuple[int, ...]
    build: str

    @property
    def release(self) -> str:
        """The version for people, such as ``7.2.22``."""
        return ".".join(map(str, self.version))


def find_qemu(architecture: str) -> Qemu:
    """The QEMU for guests of an architecture.

    The variable ``VMSANDBOX_QEMU`` can name another program than the one on PATH.

    Raises:
        LaunchError: it is missing, or does not run.
    """
    wanted = os.environ.get("VMSANDBOX_QEMU") or f"qemu-system-{ARCHITECTURES[architecture].qemu}"
    found = shutil.which(wanted)
    if found is None:
        raise LaunchError(
            f"there is no {wanted} on this machine",
            remedy="run 'vmsandbox quickstart', or install it: apt-get install qemu-system-x86 "
            "qemu-utils (Debian, Ubuntu), dnf install qemu-system-x86 (Fedora), "
            "brew install qemu (macOS)",
        )
    status = Path(found).stat()
    return _inspect(found, status.st_mtime_ns, status.st_size)


@cache
def _inspect(path: str, _mtime: int, _size: int) -> Qemu:
    try:
        done = subprocess.run(
            [path, "--version"],
            capture_output=True,
            timeout=_VERSION_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
        )
        output = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        output = str(error)
    match = re.search(r"version (\d+(?:\.\d+)*)", output)
    if match is None:
        raise LaunchError(
            f"{path} --version does not print the version of a QEMU",
            details=output,
            remedy="install QEMU again, or set VMSANDBOX_QEMU to a QEMU that works",
        )
    version = tuple(int(part) for part in match[1].split("."))
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # about 12 ms
    return Qemu(path=Path(path), version=version, build=f"{match[1]} {digest}")
