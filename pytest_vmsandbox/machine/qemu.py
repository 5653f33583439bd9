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
from pytest_vmsandbox.core.errors import ConfigError, LaunchError

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
        LaunchError: it is missing, does not run, or emulates another architecture.
    """
    its = architecture_of(architecture)
    wanted, chosen_by = program(its), variable(its)
    found = shutil.which(wanted)
    if found is None:
        remedy = f"install it: {programs.emulator_line(its)}"
        if chosen_by:
            remedy = f"set the environment variable {chosen_by} to a QEMU, or unset it"
        elif _is_native(its):
            line = programs.install_line([its.package, "qemu-utils"])
            remedy = f"run 'vmsandbox quickstart', or install it: {line}"
        raise LaunchError(
            f"there is no {wanted} on this machine, which guests of {its.debian} need",
            remedy=remedy,
        )
    status = Path(found).stat()
    qemu = _inspect(found, status.st_mtime_ns, status.st_size, chosen_by)
    target = _target(found, status.st_mtime_ns, status.st_size) if chosen_by else ""
    if target not in {"", its.qemu, its.user}:  # the second one may be a smaller emulator
        raise LaunchError(
            f"{found} emulates {target}, but guests of {its.debian} need qemu-system-{its.qemu}",
            remedy=f"set the environment variable {chosen_by} to that program, or unset it",
        )
    if its.firmware and not _has_data(found, its.firmware):
        raise LaunchError(
            f"{wanted} lacks its firmware {its.firmware}, which guests of {its.debian} need",
            remedy=f"install it: {programs.install_line([its.firmware_package])}",
        )
    return qemu


def qemu_at(path: Path, architecture: str) -> Qemu:
    """The QEMU at a path.

    Raises:
        ConfigError: there is none, or it emulates another architecture.
    """
    its = architecture_of(architecture)
    remedy = f"use the path of a qemu-system-{its.qemu}"
    if (found := shutil.which(path)) is None:
        raise ConfigError(f"{path} is no program", remedy=remedy)
    status = Path(found).stat()
    try:
        qemu = _inspect(found, status.st_mtime_ns, status.st_size)
    except LaunchError as error:
        raise ConfigError(error.brief, details=error.details, remedy=remedy) from error
    if _target(found, status.st_mtime_ns, status.st_size) not in {"", its.qemu}:
        raise ConfigError(f"{path} emulates another architecture than {its.debian}", remedy=remedy)
    return qemu


def _asked(path: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run an emulator that only prints something."""
    return subprocess.run(
        [path, *options],
        capture_output=True,
        timeout=_VERSION_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
    )


def _has_data(path: str, name: str) -> bool:
    """Whether an emulator finds a file among its own data."""
    folders = _asked(path, "-L", "help").stdout.splitlines()
    return any(Path(folder, name).is_file() for folder in folders)


def variable(architecture: Architecture) -> str:
    """The environment variable that chooses the program; empty if none does."""
    names = [f"VMSANDBOX_QEMU_{architecture.debian.upper()}"]
    if _is_native(architecture):
        names.append("VMSANDBOX_QEMU")
    return next((name for name in names if os.environ.get(name)), "")


def program(architecture: Architecture) -> str:
    """The program that emulates an architecture: its name, or the path that a variable has.

    ``VMSANDBOX_QEMU`` counts for guests whose emulator is that of this machine's own architecture. For
    the others, there is a variable for each, such as ``VMSANDBOX_QEMU_ARM64``.
    """
    chosen_by = variable(architecture)
    return os.environ[chosen_by] if chosen_by else f"qemu-system-{architecture.qemu}"


def _is_native(architecture: Architecture) -> bool:
    """Whether the emulator is that of this machine's own architecture."""
    native = ARCHITECTURES.get(native_architecture())
    return native is not None and native.qemu == architecture.qemu


@cache
def _target(path: str, _mtime: int, _size: int) -> str:
    """What a QEMU emulates, as the end of its usual name says it; empty if it does not answer."""
    options = "-machine none -nodefaults -display none -monitor none -serial none -qmp stdio"
    requests = "".join(
        f'{{"execute": "{name}"}}\n' for name in ("qmp_capabilities", "query-target", "quit")
    )
    try:
        done = subprocess.run(
            [path, *options.split()],
            capture_output=True,
            timeout=_VERSION_SECONDS,
            check=False,
            input=requests,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r'"arch": "(\w+)"', done.stdout)
    return match[1] if match else ""


@cache
def _inspect(path: str, _mtime: int, _size: int, chosen_by: str = "") -> Qemu:
    try:
        done = _asked(path, "--version")
        output = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        output = str(error)
    match = re.search(r"QEMU emulator version (\d+(?:\.\d+)*)", output)
    if match is None:
        raise LaunchError(
            f"{path} --version does not print the version of a QEMU",
            details=output,
            remedy=f"set the environment variable {chosen_by} to a QEMU, or unset it"
            if chosen_by
            else "install QEMU again, or set VMSANDBOX_QEMU to a QEMU that works",
        )
    version = tuple(int(part) for part in match[1].split("."))
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # about 12 ms
    return Qemu(path=Path(path), version=version, build=f"{match[1]} {digest}")
