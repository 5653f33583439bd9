"""Which format a file has, and whether its header is harmless. Nothing else reads it before."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pytest_vmsandbox.catalogue.importing import qcow2, vdi, vhdx, vmdk, vpc
from pytest_vmsandbox.catalogue.importing.checked import (
    SECTOR,
    CheckedDisk,
    check_size,
    refused,
)
from pytest_vmsandbox.catalogue.importing.source import SourceFile

RAW = "raw"
_CHECKS: dict[str, Callable[[SourceFile], CheckedDisk]] = {
    "qcow2": qcow2.check,
    "vdi": vdi.check,
    "vhdx": vhdx.check,
    "vpc": vpc.check,
}
FORMATS = (RAW, "vmdk", *_CHECKS)
_BEGINNINGS = (  # where, what, format
    (0, qcow2.MAGIC, "qcow2"),
    (0, vmdk.MAGIC, "vmdk"),
    (0, vmdk.TEXT, "vmdk"),
    (0, vhdx.MAGIC, "vhdx"),
    (0, vpc.COOKIE, "vpc"),
    (vdi.SIGNATURE_AT, vdi.SIGNATURE, "vdi"),
)
_OTHERS = (  # likewise: what is not imported
    (0, b"QED\0", "a QED image"),
    (0, b"COWD", "a VMDK image of ESX 3"),
    (0, b"WithoutFreeSpace", "a Parallels image"),
    (0, b"WithouFreSpacExt", "a Parallels image"),
    (0, b"Bochs Virtual HD Image", "a Bochs image"),
    (0, b"LUKS\xba\xbe", "encrypted (LUKS)"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"!<arch>\n", "an ar archive"),
    (0, b"<", "a page or XML, and no disk"),
)
_PARTITIONS, _EXT = (510, b"\x55\xaa"), (1080, b"\x53\xef")
_ISO = (32769, b"CD001")


def begins_as(head: bytes) -> str:
    """The format that a file begins as; empty if it is none that `check` knows.

    Args:
        head: its first 4 KiB.
    """
    for at, what, name in _BEGINNINGS:
        if head[at : at + len(what)] == what:
            return name
    return ""


def detect(file: SourceFile) -> str:
    """The format of a disk image, by its first bytes.

    Raises:
        ImageError: it is none that is imported, or cannot be told.
    """
    head = file.head(_ISO[0] + 5)

    def has(at: int, what: bytes) -> bool:
        return head[at : at + len(what)] == what

    if name := begins_as(head):
        return name
    for at, what, kind in _OTHERS:
        if has(at, what):
            raise refused(
                file,
                f"is {kind}",
                f"unpack or convert it first (qemu-img convert -O qcow2 {file.name} NEW). If it is a raw "
                "disk nevertheless, name the format: --format=raw",
            )
    if has(*_ISO):
        raise refused(
            file,
            "is a CD image, and no disk",
            "install the system on a disk, and import the disk. To take the CD as a disk, name the format: "
            "--format=raw",
        )
    if vpc.has_footer(file):
        return "vpc"
    if has(*_PARTITIONS) or has(*_EXT):
        return RAW
    raise refused(
        file,
        "has no known beginning, and neither partitions nor a file system of Linux",
        f"if you know its format, name it: --format={' | '.join(FORMATS)}",
    )


def check(
    file: SourceFile, name: str, others: Mapping[str, SourceFile] | None = None
) -> CheckedDisk:
    """Check the header of a disk image.

    Args:
        name: its format, one of `FORMATS`.
        others: further files by their names, for a split VMDK.

    Raises:
        ImageError: the file has another format, is damaged, or needs what was not given.
    """
    if name == "vmdk":
        return vmdk.check(file, others or {})
    if name == RAW:
        return CheckedDisk(RAW, check_size(file, -(-file.size // SECTOR) * SECTOR), file)
    begins = [kind for at, what, kind in _BEGINNINGS if file.head(at + len(what))[at:] == what]
    if name != "vpc" and name not in begins:
        other = f"it begins as {begins[0]}" if begins else "it begins as none"
        raise refused(file, f"is no {name} image: {other}", "name the right format, or none")
    return _CHECKS[name](file)
