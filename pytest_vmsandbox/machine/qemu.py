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

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.core.architecture import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    native_architecture,
)
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

    Raises:
        LaunchError: it is missing, or does not run.
    """
    its = architecture_of(architecture)
    wanted = program(its)
    found = shutil.which(wanted)
    if found is None:
        remedy = f"install it: {programs.emulator_line(its)}"
        if _is_native(its):
            line = programs.install_line([its.package, "qemu-utils"])
            remedy = f"run 'vmsandbox quickstart', or install it: {line}"
        raise LaunchError(
            f"there is no {wanted} on this machine, which guests of {its.debian} need",
            remedy=remedy,
        )
    status = Path(found).stat()
    qemu = _inspect(found, status.st_mtime_ns, status.st_size)
    if its.firmware and not _has_data(found, its.firmware):
        raise LaunchError(
            f"{wanted} lacks its firmware {its.firmware}, which guests of {its.debian} need",
            remedy=f"install it: {programs.install_line([its.firmware_package])}",
        )
    return qemu


def _has_data(path: str, name: str) -> bool:
    """Whether an emulator finds a file among its own data."""
    done = subprocess.run(
        [path, "-L", "help"],
        capture_output=True,
        timeout=_VERSION_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
    )
    return any(Path(folder, name).is_file() for folder in done.stdout.splitlines())


def program(architecture: Architecture) -> str:
    """The program that emulates an architecture: its name, or the path that a variable has.

    ``VMSANDBOX_QEMU`` counts for guests whose emulator is that of this machine's own architecture. For
    the others, there is a variable for each, such as ``VMSANDBOX_QEMU_ARM64``.
    """
    own = os.environ.get(f"VMSANDBOX_QEMU_{architecture.debian.upper()}")
    common = os.environ.get("VMSANDBOX_QEMU") if _is_native(architecture) else None
    return own or common or f"qemu-system-{architecture.qemu}"


def _is_native(architecture: Architecture) -> bool:
    """Whether the emulator is that of this machine's own architecture."""
    native = ARCHITECTURES.get(native_architecture())
    return native is not None and native.qemu == architecture.qemu


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
