"""Archives with a machine in them: OVA, boxes of Vagrant, and a plain tar with the files of one VMDK.

They are read as a stream. Disks and the few texts that describe them are taken; the rest is skipped: a
Vagrantfile is a program, and never read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_vmsandbox.catalogue.importing import headers, ovf, tar, vmdk
from pytest_vmsandbox.catalogue.importing.checked import refused
from pytest_vmsandbox.catalogue.importing.compression import Limits, unpacked
from pytest_vmsandbox.catalogue.importing.convert import write_sparsely
from pytest_vmsandbox.catalogue.importing.source import SourceFile, opened
from pytest_vmsandbox.core.architecture import by_any_name
from pytest_vmsandbox.core.errors import ImageError

_DISKS = (".vmdk", ".img", ".qcow2", ".raw", ".vdi", ".vhd", ".vhdx")
_TEXTS = (".ovf", ".mf", ".vmx", "metadata.json")
_MAX_TEXT, _MAX_TEXTS = 4 << 20, 16
_VIRTUALBOX, _LIBVIRT, _VMWARE = "virtualbox", ("libvirt", "qemu"), "vmware"


@dataclass
class Archive:
    """What was taken out of an archive.

    Attributes:
        disks: the files of disks, by their names in the archive; None while we only look.
        texts: the content of what describes them, by name.
    """

    disks: dict[str, Path | None] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """The disk of an archive that a machine boots from.

    Attributes:
        name: of its file in the archive.
        format: of that file, if the archive says it; otherwise empty.
        firmware: ``uefi`` or ``bios``, if the archive says it; otherwise empty.
        architecture: likewise, such as ``x86_64``.
        provider: of a box: the hypervisor that it is for.
        left_out: the names of further disks.
    """

    name: str
    format: str = ""
    firmware: str = ""
    architecture: str = ""
    provider: str = ""
    left_out: tuple[str, ...] = ()


def is_archive(file: SourceFile, limits: Limits | None = None) -> bool:
    """Whether a file is a tar archive, also a compressed one."""
    head = b""
    for piece in unpacked(file, limits or Limits()):
        head += piece
        if len(head) >= tar.BLOCK:
            break
    return tar.is_tar(head)


def read(file: SourceFile, folder: Path | None, limits: Limits | None = None) -> Archive:
    """Take the disks and texts out of an archive.

    Args:
        folder: where to put the disks, by names of ours; None to leave them in the archive.
        limits: how much may come out.

    Raises:
        ImageError: it is damaged, too large, or has members that are not plain.
    """
    archive = Archive()
    for member in tar.members(file, unpacked(file, limits or Limits())):
        lower = member.name.lower()
        if lower.endswith(_DISKS):
            target = None if folder is None else folder / f"member-{len(archive.disks):04}"
            archive.disks[member.name] = target
            if target is not None:
                write_sparsely(member.data, target)
        elif lower.endswith(_TEXTS):
            if member.size > _MAX_TEXT or len(archive.texts) >= _MAX_TEXTS:
                raise refused(
                    file,
                    f"has more or larger descriptions than a machine needs: {member.name}",
                    "unpack it, and import the disk that is in it",
                )
            archive.texts[member.name] = b"".join(member.data)
    return archive


# -- which disk -------------------------------------------------------------------------------------


def kind_of(archive: Archive) -> str:
    """What an archive is: ``box``, ``ova``, or ``vmdk``."""
    if "metadata.json" in archive.texts or _named(archive, ".vmx"):
        return "box"
    return "ova" if _named(archive, ".ovf") else "vmdk"


def choose(file: SourceFile, archive: Archive, kind: str) -> Chosen:
    """The disk that the machine in an archive boots from.

    Args:
        kind: ``ova``, ``box``, or ``vmdk`` for a tar with the files of one disk.

    Raises:
        ImageError: the archive is not of that kind, or does not have its disk.
    """
    found = _KINDS[kind](file, archive)
    for name in (found.name, *found.left_out):
        if not vmdk.is_plain(name):
            raise refused(
                file,
                f"names a disk with a path or a strange name: {name[:80]!r}",
                "unpack it, and import the disk that is in it",
            )
    if found.name not in archive.disks:
        raise refused(
            file,
            f"does not have the disk {found.name!r} that its description names",
            "make or fetch the archive again",
        )
    return found


def _ova(file: SourceFile, archive: Archive) -> Chosen:
    chosen = _of_machine(file, _only(file, archive, ".ovf"), ovf.read_ovf)
    _check_manifest(file, archive, chosen.name, all_listed=True)
    return chosen


def _box(file: SourceFile, archive: Archive) -> Chosen:
    metadata = _metadata(file, archive)
    provider = metadata.get("provider") or ""
    architecture = by_any_name(str(metadata.get("architecture")))
    if provider in _LIBVIRT:
        chosen = _libvirt(file, metadata)
    elif provider == _VIRTUALBOX or (not provider and _named(archive, ".ovf")):
        provider = _VIRTUALBOX
        chosen = _of_machine(file, _only(file, archive, ".ovf"), ovf.read_ovf)
        # It may be that of the OVA that the box was made of, and not know the name of the .ovf.
        _check_manifest(file, archive, chosen.name, all_listed=False)
    elif str(provider).startswith(_VMWARE) or (not provider and _named(archive, ".vmx")):
        provider = _VMWARE
        chosen = _of_machine(file, _only(file, archive, ".vmx"), ovf.read_vmx)
    else:
        raise refused(
            file,
            f"is a box for {str(provider)[:40]!r}" if provider else "is no box of a known kind",
            "take a box for libvirt, virtualbox or vmware; or unpack it, and import the disk in it",
        )
    return Chosen(
        chosen.name,
        chosen.format,
        chosen.firmware,
        architecture,
        str(provider),
        chosen.left_out,
    )


def _metadata(file: SourceFile, archive: Archive) -> dict[str, Any]:
    try:
        metadata = json.loads(archive.texts.get("metadata.json", b"{}"))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise refused(file, "has a metadata.json that cannot be read", "make or fetch it again")
    return metadata


def _libvirt(file: SourceFile, metadata: dict[str, Any]) -> Chosen:
    name, image_format, others = "box.img", metadata.get("format") or "", list[str]()
    disks = metadata.get("disks")
    if isinstance(disks, list) and disks and all(isinstance(disk, dict) for disk in disks):
        for number, disk in enumerate(disks, 1):
            if not isinstance(disk.get("path"), str) or not disk["path"]:
                raise refused(
                    file,
                    f"has a metadata.json that gives disk {number} no path",
                    "unpack it, and import the disk that is in it",
                )
        name, *others = (disk["path"] for disk in disks)
        image_format = disks[0].get("format") or image_format
    if image_format not in ("", *headers.FORMATS):
        raise refused(file, "has a disk of an unknown format", "unpack it, and convert the disk")
    return Chosen(name, str(image_format), left_out=tuple(others))


def _tar_of_vmdk(file: SourceFile, archive: Archive) -> Chosen:
    found = []
    for name, path in archive.disks.items():
        if path is None:
            raise ValueError("the disks are still in the archive")
        with opened(path, name) as disk:
            if disk.head(len(vmdk.TEXT)) == vmdk.TEXT:
                found.append(name)
    if len(found) != 1:
        raise refused(
            file,
            f"has {len(found)} descriptors of VMDK disks instead of one",
            "pack the descriptor of one disk and the files that it names",
        )
    return Chosen(found[0], "vmdk")


_KINDS: dict[str, Callable[[SourceFile, Archive], Chosen]] = {
    "ova": _ova,
    "box": _box,
    "vmdk": _tar_of_vmdk,
}
KINDS = tuple(_KINDS)


def _named(archive: Archive, ending: str) -> list[str]:
    return [name for name in archive.texts if name.lower().endswith(ending)]


def _only(file: SourceFile, archive: Archive, ending: str) -> bytes:
    names = _named(archive, ending)
    if len(names) != 1:
        raise refused(
            file,
            f"has {len(names)} files {ending} instead of one",
            "check that it is what you think: tar -tf lists what is in it",
        )
    return archive.texts[names[0]]


def _of_machine(file: SourceFile, text: bytes, reader: Callable[[bytes], ovf.Machine]) -> Chosen:
    try:
        machine = reader(text)
    except ImageError as error:
        raise refused(file, f"cannot be imported: {error.brief}", error.remedy) from error
    if not machine.disks:
        raise refused(file, "describes a machine without a disk", "import another archive")
    name, *others = machine.disks
    return Chosen(name, firmware=machine.firmware, left_out=tuple(others))


def _check_manifest(file: SourceFile, archive: Archive, disk: str, *, all_listed: bool) -> None:
    """Check the digests of what is used, if there is a manifest.

    Args:
        all_listed: whether the manifest must list all that is used.
    """
    names = _named(archive, ".mf")
    if not names:
        return
    stated = ovf.read_manifest(_only(file, archive, ".mf"))
    for name in (*_named(archive, ".ovf"), disk):
        if name not in stated:
            if all_listed:
                raise refused(
                    file,
                    f"has a manifest that does not list {name}",
                    "make or fetch the archive again",
                )
            continue
        kind, digest = stated[name]
        if (found := _digest_of(archive, name, kind)) and found != digest:
            raise refused(
                file,
                f"is damaged: {name} does not have the digest of its manifest",
                "make or fetch the archive again",
            )


def _digest_of(archive: Archive, name: str, kind: str) -> str:
    """The digest of a text or a disk; empty for a disk that is still in the archive."""
    if name in archive.texts:
        return hashlib.new(kind, archive.texts[name], usedforsecurity=False).hexdigest()
    path = archive.disks.get(name)
    if path is None:
        return ""
    with opened(path, name) as disk:
        return disk.digest(kind)


@contextmanager
def opened_disks(archive: Archive) -> Iterator[dict[str, SourceFile]]:
    """The disks that were taken out of an archive, by their names in it."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(opened(path, name))
            for name, path in archive.disks.items()
            if path is not None
        }


def pack(files: list[SourceFile], target: Path) -> None:
    """Write the files of one disk into a plain tar archive, in the same way each time."""
    write_sparsely(_packed(files), target)


def _packed(files: list[SourceFile]) -> Iterator[bytes]:
    for file in files:
        name = file.name.encode()
        if len(name) > 100 or not vmdk.is_plain(file.name):
            raise refused(file, "has a name that is too long or strange", "rename it")
        header = bytearray(tar.BLOCK)
        header[: len(name)] = name
        header[100:108], header[156:157] = b"0000600\0", b"0"
        header[108:116] = header[116:124] = b"0000000\0"
        header[124:136] = b"\x80" + file.size.to_bytes(11, "big")
        header[136:148] = b"00000000000\0"
        header[tar.MAGIC_AT : tar.MAGIC_AT + 8] = b"ustar\x0000"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        yield bytes(header)
        yield from file.chunks()
        yield bytes(-file.size % tar.BLOCK)
    yield bytes(2 * tar.BLOCK)
