"""Finds UEFI firmware on this machine, and what a disk offers to firmware.

QEMU's packages describe the firmware that they install (QEMU's docs/interop/firmware.json). Where such a
description is missing, we look at the usual places of distributions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import platformdirs

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.architecture import ARCHITECTURES, architecture_of
from pytest_vmsandbox.core.errors import LaunchError

_DESCRIPTORS = ("/usr/share/qemu/firmware", "/usr/local/share/qemu/firmware", "/etc/qemu/firmware")
# Where code and variables are, without and with Secure Boot's keys: package of Debian → elsewhere, too.
_USUAL_PLACES: dict[str, dict[bool, tuple[tuple[str, str], ...]]] = {
    "ovmf": {
        False: (
            (
                "/usr/share/OVMF/OVMF_CODE_4M.fd",
                "/usr/share/OVMF/OVMF_VARS_4M.fd",
            ),  # Debian, Ubuntu
            ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
            ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),  # Fedora
            ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),  # Arch
            ("/usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "/usr/share/edk2-ovmf/x64/OVMF_VARS.fd"),
            (
                "/usr/share/qemu/ovmf-x86_64-code.bin",
                "/usr/share/qemu/ovmf-x86_64-vars.bin",
            ),  # openSUSE
            (
                "/usr/share/qemu/edk2-x86_64-code.fd",
                "/usr/share/qemu/edk2-i386-vars.fd",
            ),  # QEMU's own
        ),
        True: (
            ("/usr/share/OVMF/OVMF_CODE_4M.ms.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
            ("/usr/share/OVMF/OVMF_CODE.secboot.fd", "/usr/share/OVMF/OVMF_VARS.ms.fd"),
            (
                "/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd",
                "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd",
            ),
            (
                "/usr/share/qemu/ovmf-x86_64-smm-ms-code.bin",
                "/usr/share/qemu/ovmf-x86_64-smm-ms-vars.bin",
            ),
        ),
    },
    "qemu-efi-aarch64": {
        False: (
            (
                "/usr/share/AAVMF/AAVMF_CODE.no-secboot.fd",
                "/usr/share/AAVMF/AAVMF_VARS.fd",
            ),  # Debian
            ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
            (
                "/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw",
                "/usr/share/edk2/aarch64/vars-template-pflash.raw",
            ),  # Fedora
            (
                "/usr/share/edk2/aarch64/QEMU_CODE.fd",
                "/usr/share/edk2/aarch64/QEMU_VARS.fd",
            ),  # Arch
            (
                "/usr/share/qemu/edk2-aarch64-code.fd",
                "/usr/share/qemu/edk2-arm-vars.fd",
            ),  # QEMU's own
        ),
    },
}
_FORMATS = ("raw", "qcow2")
_SECTOR = 512
_GPT_HEADER = struct.Struct(
    "<8x64xQII"
)  # of the part that we read: where the entries are, and how many
_ESP = bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b")  # the type of an EFI system partition
_ESP_IN_MBR = 0xEF
_MOST_ENTRIES = 1024


@dataclass(frozen=True, kw_only=True)
class Uefi:
    """UEFI firmware of this machine.

    Attributes:
        code: the file with its program.
        variables: the file with the variables of a new machine.
        format: of both files, ``raw`` or ``qcow2``.
        secure_boot: whether it has Secure Boot. Then the machine needs SMM.
        digest: SHA-256, in hex, of both files.
    """

    code: Path
    variables: Path
    format: str
    secure_boot: bool
    digest: str


def find_uefi(architecture: str, *, secure_boot: bool) -> Uefi:
    """The UEFI firmware for guests of an architecture.

    Args:
        secure_boot: whether it has Secure Boot with the usual keys in it, or is without.

    Raises:
        LaunchError: it is missing, or cannot be read.
    """
    its = architecture_of(architecture)
    kind = "UEFI firmware with Secure Boot" if secure_boot else "UEFI firmware"
    if not its.uefi_board or (secure_boot and not its.secure_boot):
        raise LaunchError(
            f"guests of {its.debian} cannot be booted by {kind}",
            remedy="use an image with a kernel that QEMU boots (firmware = 'kernel')",
        )
    found = _described(architecture, secure_boot=secure_boot) or _usual(
        its.uefi_package, secure_boot=secure_boot
    )
    if found is None:
        raise LaunchError(
            f"there is no {kind} for guests of {its.debian} on this machine",
            remedy=f"install it: {programs.install_line([its.uefi_package])}",
        )
    code, variables, kind = found
    try:
        status = (code.stat(), variables.stat())
        changes = tuple((file.st_mtime_ns, file.st_size) for file in status)
        digest = _digest(code, variables, changes)
    except OSError as error:
        raise LaunchError(
            f"the UEFI firmware {error.filename or code} cannot be read: {error.strerror}",
            remedy="install its package again, or make the file readable",
        ) from error
    return Uefi(code=code, variables=variables, format=kind, secure_boot=secure_boot, digest=digest)


@cache
def _digest(code: Path, variables: Path, _changes: object) -> str:
    total = hashlib.sha256()
    for file in (code, variables):
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _usual(package: str, *, secure_boot: bool) -> tuple[Path, Path, str] | None:
    for code, variables in _USUAL_PLACES[package].get(secure_boot, ()):
        if Path(code).is_file() and Path(variables).is_file():
            return Path(code), Path(variables), "raw"
    return None


def _described(architecture: str, *, secure_boot: bool) -> tuple[Path, Path, str] | None:
    for file in description_files():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found = matching(content, architecture, secure_boot=secure_boot)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # empty ones hide others of the same name
        if found and found[0].is_file() and found[1].is_file():
            return found
    return None


def description_files() -> list[Path]:
    """The descriptions of firmware, in the order in which programs should take them.

    A file hides those of the same name in the folders before.
    """
    own = platformdirs.user_config_path("qemu", appauthor=False) / "firmware"
    files: dict[str, Path] = {}
    for folder in (*_DESCRIPTORS, own):
        files |= {file.name: file for file in Path(folder).glob("*.json")}
    return [files[name] for name in sorted(files)]


def matching(
    content: Any, architecture: str, *, secure_boot: bool
) -> tuple[Path, Path, str] | None:
    """Code, variables and their format, if a description is of the firmware that we want.

    Without Secure Boot we want none that needs SMM, because such a machine is slower.
    """
    features, mapping = content["features"], content["mapping"]
    machines = [
        machine
        for target in content["targets"]
        if target["architecture"] == architecture
        for machine in target["machines"]
    ]
    wanted = {"secure-boot", "enrolled-keys"}
    if "uefi" not in content["interface-types"] or mapping["device"] != "flash":
        return None
    if (
        mapping.get("mode", "split") != "split"
        or ARCHITECTURES[architecture].uefi_board not in machines
    ):
        return None
    if not (
        wanted <= set(features) if secure_boot else not {*wanted, "requires-smm"} & set(features)
    ):
        return None
    code, variables = mapping["executable"], mapping["nvram-template"]
    if code["format"] not in _FORMATS or code["format"] != variables["format"]:
        return None
    return Path(code["filename"]), Path(variables["filename"]), code["format"]


@dataclass(frozen=True, kw_only=True)
class Flash:
    """The open files of a guest's UEFI firmware.

    Attributes:
        code: its program, read-only.
        variables: a copy without a name, which the guest writes.
    """

    code: IO[bytes]
    variables: IO[bytes]

    @classmethod
    @contextmanager
    def open(cls, uefi: Uefi, folder: Path) -> Iterator[Flash]:
        """The firmware of a new machine. What the guest writes to it is removed at the end.

        Args:
            folder: for the copy of its variables.

        Raises:
            LaunchError: it cannot be read or copied.
        """
        with ExitStack() as stack:
            try:
                code = stack.enter_context(uefi.code.open("rb"))
                # Unbuffered: else closing it would fail once more where the disk is full.
                variables = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
                with uefi.variables.open("rb") as new:
                    shutil.copyfileobj(new, variables)
            except OSError as error:
                raise LaunchError(
                    f"the UEFI firmware cannot be copied into {folder}: {error.strerror}",
                    remedy="make room there, or set the environment variable "
                    f"{paths.CACHE} to another folder",
                ) from error
            yield cls(code=code, variables=variables)


# -- what a disk offers -----------------------------------------------------------------------------


def boot_loaders(disk: Path) -> frozenset[str]:
    """The kinds of firmware that find something to boot on a raw disk: ``uefi``, ``bios``.

    UEFI needs an EFI system partition, BIOS a program in the first sector. Whether these are of any use,
    only a boot shows.

    Raises:
        OSError: the disk cannot be read.
    """
    found = set()
    with disk.open("rb") as file:
        first = file.read(_SECTOR)
        if len(first) < _SECTOR or first[510:] != b"\x55\xaa":
            return frozenset()
        if any(first[:440]):
            found.add("bios")
        if any(first[446 + 16 * number + 4] == _ESP_IN_MBR for number in range(4)) or _has_esp(
            file
        ):
            found.add("uefi")
    return frozenset(found)


def _has_esp(file: IO[bytes]) -> bool:
    """Whether a disk with a GPT has an EFI system partition."""
    header = file.read(_SECTOR)
    if header[:8] != b"EFI PART":
        return False
    start, count, size = _GPT_HEADER.unpack_from(header)
    if count > _MOST_ENTRIES or not 128 <= size <= _SECTOR:
        return False
    file.seek(start * _SECTOR)
    table = file.read(count * size)
    return any(table[at : at + 16] == _ESP for at in range(0, len(table), size))
