"""VMDK images (VMware): sparse ones, and descriptors with the files that they name.

What a descriptor says never reaches QEMU if the disk has several files: we read it, and write our own with the
few facts that count. A sparse image has its descriptor inside. That one is read by QEMU, so it must have the
form that we know, at the place where QEMU looks.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from pytest_vmsandbox.catalogue.importing.checked import (
    SECTOR,
    CheckedDisk,
    check_inside,
    check_size,
    damaged,
    flatten,
    refused,
    unpacked,
)
from pytest_vmsandbox.catalogue.importing.source import SourceFile

MAGIC, TEXT = b"KDMV", b"# Disk DescriptorFile"
MAX_TEXT = 64 * 1024  # bytes of a descriptor
_HEADER = "<4sIIqqqqIqqqB4sH"
_MAX_VERSION = 3
_ENTRIES = 512  # of a grain table
_AT_END = -1  # the grain directory is named by the footer
_FOOTER, _FOOTER_TYPE = 3 * SECTOR, 3
_DESCRIPTOR_AT = 1  # sector
_MAX_EXTENTS = 1024
_CID_DIGITS = 8
_NO_PARENT = 0xFFFFFFFF
_ONE_FILE = ("monolithicSparse", "streamOptimized")
_SEVERAL = ("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfs")
_KINDS = {"SPARSE": "SPARSE", "FLAT": "FLAT", "VMFS": "FLAT"}  # ours ← theirs
_KEYS = ("version", "encoding", "CID", "parentCID", "isNativeSnapshot", "createType")
_SETTING = re.compile(r'([A-Za-z][\w.]*)[ \t]*=[ \t]*(?:"([^"]*)"|([^"\s]*))')
_EXTENT = re.compile(
    r'(RW|RDONLY|NOACCESS)[ \t]+(\d{1,12})[ \t]+([A-Z]+)(?:[ \t]+"([^"]*)"(?:[ \t]+(\d{1,12}))?)?'
)
_PLAIN = re.compile(r"[^/\\\x00-\x1f\x7f:]{1,255}")


@dataclass(frozen=True)
class _Extent:
    """A part of a disk: its sectors, its kind, its file, and where it begins there (in sectors)."""

    sectors: int
    kind: str
    name: str
    offset: int


@dataclass(frozen=True)
class _Descriptor:
    kind: str
    extents: tuple[_Extent, ...]


def is_plain(name: str) -> bool:
    """Whether a name is that of a file, without any path."""
    return _PLAIN.fullmatch(name) is not None and name.strip(". ") != "" and name.isprintable()


def check(file: SourceFile, others: Mapping[str, SourceFile]) -> CheckedDisk:
    """Check a VMDK image.

    Args:
        others: further files by their names. A descriptor can name these and no others.

    Raises:
        ImageError: the image is damaged, or needs files that were not given.
    """
    if file.head(4) == MAGIC:
        return CheckedDisk("vmdk", _check_sparse(file), file)
    if not file.head(len(TEXT)).startswith(TEXT):
        raise flatten(file, "is no VMDK image of a known kind", "vmdk")
    return _check_several(file, others)


# -- one file ---------------------------------------------------------------------------------------


def _check_sparse(file: SourceFile) -> int:
    """Check a sparse image with its descriptor inside. Returns the bytes of the disk."""
    sectors, descriptor_at, descriptor_sectors = _check_header(file)
    if descriptor_at != _DESCRIPTOR_AT or descriptor_sectors < 1:
        raise damaged(file, "its descriptor is not where it can be")
    length = descriptor_sectors * SECTOR
    if length > MAX_TEXT:
        raise damaged(file, f"a descriptor of {length} bytes")
    whole_text = file.at(SECTOR, length)
    if b"\0" not in whole_text:
        raise damaged(file, "text behind the end of its descriptor")
    descriptor = _descriptor(file, _to_its_end(file, whole_text))
    if descriptor.kind not in _ONE_FILE:
        raise flatten(file, f"is a VMDK image of the kind {descriptor.kind!r}", "vmdk")
    whole = [_Extent(sectors, "SPARSE", extent.name, 0) for extent in descriptor.extents[:1]]
    if list(descriptor.extents) != whole:
        raise flatten(file, "names other files for its data", "vmdk")
    return sectors * SECTOR


def _check_header(file: SourceFile) -> tuple[int, int, int]:
    """Check the header of a sparse file. Returns its sectors, and where its descriptor is."""
    header = unpacked(file, _HEADER)
    version, flags, sectors, grain = header[1:5]
    descriptor_at, descriptor_sectors, entries, spare, directory = header[5:10]
    compression = header[13]
    if not 1 <= version <= _MAX_VERSION:
        raise flatten(file, f"is a VMDK image of the unknown version {version}", "vmdk")
    if sectors <= 0:
        raise flatten(file, "has only a descriptor behind the header of a sparse disk", "vmdk")
    check_size(file, sectors * SECTOR)
    if not 8 <= grain <= 2048 or grain & (grain - 1) or entries != _ENTRIES or compression > 1:
        raise damaged(file, "grains of an unknown size or compression")
    if descriptor_at < 0 or descriptor_sectors < 0:
        raise damaged(file, "its descriptor lies outside of the file")
    check_inside(file, "its descriptor", descriptor_at * SECTOR, descriptor_sectors * SECTOR)
    if directory == _AT_END:
        spare, directory = _check_footer(file)
    count = -(-sectors // (grain * _ENTRIES))
    _check_directory(file, directory, count)
    if flags & 2:
        _check_directory(file, spare, count)
    return sectors, descriptor_at, descriptor_sectors


def _check_footer(file: SourceFile) -> tuple[int, int]:
    """Check that the footer repeats the header. Returns the places of the grain directories."""
    at = file.size - _FOOTER
    _, size, kind = unpacked(file, "<QII", at)
    footer, header = unpacked(file, _HEADER, at + SECTOR), unpacked(file, _HEADER)
    if (size, kind) != (0, _FOOTER_TYPE) or any(file.at(at + 2 * SECTOR, 16)):
        raise damaged(file, "its footer is missing")
    if (footer[:8], footer[13]) != (header[:8], header[13]) or footer[9] == _AT_END:
        raise damaged(file, "a footer that differs from its header")
    return footer[8], footer[9]


def _check_directory(file: SourceFile, sector: int, count: int) -> None:
    check_inside(file, "the grain directory", sector * SECTOR, count * 4)
    table = array("I", file.at(sector * SECTOR, count * 4))
    if sys.byteorder == "big":
        table.byteswap()
    places = [place for place in table if place]
    for place in places:
        check_inside(file, "a grain table", place * SECTOR, _ENTRIES * 4)
    if sector == 0 or len(set(places)) != len(places):
        raise damaged(file, "a grain table that is used twice")


# -- several files ----------------------------------------------------------------------------------


def _check_several(file: SourceFile, others: Mapping[str, SourceFile]) -> CheckedDisk:
    if file.size > MAX_TEXT:
        raise damaged(file, f"a descriptor of {file.size} bytes")
    descriptor = _descriptor(file, _to_its_end(file, file.at(0, file.size)))
    if descriptor.kind not in _SEVERAL:
        raise flatten(file, f"is a VMDK image of the kind {descriptor.kind!r}", "vmdk")
    names = list(dict.fromkeys(extent.name for extent in descriptor.extents))
    if missing := [name for name in names if name not in others or others[name] is file]:
        raise refused(
            file,
            f"is the description of a disk whose data are in other files: {', '.join(names)}",
            f"give all of them in one command; missing: {', '.join(missing)}",
        )
    ours = {name: f"part-{number:04}" for number, name in enumerate(names)}
    lines = []
    for extent in descriptor.extents:
        part = others[extent.name]
        if extent.kind == "SPARSE":
            if part.head(4) != MAGIC or _check_header(part)[0] != extent.sectors:
                raise damaged(part, f"it is not the part that {file.name} describes")
            place = ""
        else:
            check_inside(part, "the disk", extent.offset * SECTOR, extent.sectors * SECTOR)
            place = f" {extent.offset}"
        lines.append(f'RW {extent.sectors} {extent.kind} "{ours[extent.name]}"{place}')
    head = ["version=1", "CID=fffffffe", "parentCID=ffffffff", 'createType="twoGbMaxExtentSparse"']
    text = "\n".join((TEXT.decode(), *head, "# Extent description", *lines, ""))
    size = check_size(file, sum(extent.sectors for extent in descriptor.extents) * SECTOR)
    parts = tuple((ours[name], others[name]) for name in names)
    return CheckedDisk("vmdk", size, file, parts, text)


# -- the text ---------------------------------------------------------------------------------------


def _to_its_end(file: SourceFile, data: bytes) -> bytes:
    """The text of a descriptor, without what is behind its end.

    qemu-img writes a new CID there, without leading zeros. If it is shorter than the former one, the end of
    the former text stays behind the new end.

    Raises:
        ImageError: there is other text behind its end.
    """
    text, _, rest = data.partition(b"\0")
    rest = rest.strip(b"\0")
    if len(rest) >= _CID_DIGITS or not text.endswith(rest):
        raise damaged(file, "text behind the end of its descriptor")
    return text


def _descriptor(file: SourceFile, text: bytes) -> _Descriptor:
    """What a descriptor says. It has nothing that we do not know.

    Raises:
        ImageError: it names a parent or a path, or has other lines.
    """
    if b"parentFileNameHint" in text:  # QEMU looks for this word anywhere, even in a comment
        raise flatten(file, "names a parent: it has only the differences to it", "vmdk")
    if not text.startswith(TEXT):
        raise damaged(file, "its descriptor has another beginning")
    settings: dict[str, str] = {}
    extents: list[_Extent] = []
    for raw in text.split(b"\n"):
        line = _line(file, raw)
        if not line or line.startswith("#"):
            continue
        if found := _EXTENT.fullmatch(line):
            extents.append(_extent(file, found))
        elif found := _SETTING.fullmatch(line):
            _add(file, settings, found[1], found[2] or found[3] or "")
        else:
            raise damaged(file, f"its descriptor has an unknown line {line[:80]!r}")
    _check_settings(file, text, settings)
    if not 1 <= len(extents) <= _MAX_EXTENTS:
        raise damaged(file, f"{len(extents)} extents")
    return _Descriptor(settings["createType"], tuple(extents))


def _line(file: SourceFile, raw: bytes) -> str:
    try:
        line = raw.removesuffix(b"\r").decode("utf-8").strip(" \t")
    except UnicodeDecodeError:
        line = "\0"
    if not line.replace("\t", " ").isprintable():
        raise damaged(file, "its descriptor has characters that cannot be printed")
    return line


def _add(file: SourceFile, settings: dict[str, str], key: str, value: str) -> None:
    if key not in _KEYS and not key.startswith("ddb."):
        raise damaged(file, f"its descriptor has an unknown key {key[:80]!r}")
    if key in settings:
        raise damaged(file, f"its descriptor has the key {key[:80]!r} twice")
    settings[key] = value


def _check_settings(file: SourceFile, text: bytes, settings: Mapping[str, str]) -> None:
    for key in ("parentCID", "createType"):
        if key not in settings or text.count(key.encode()) != 1:  # QEMU finds it in a comment, too
            raise damaged(file, f"its descriptor must have the key {key} once")
    try:
        parent = int(settings["parentCID"], 16)
    except ValueError:
        parent = 0
    if parent != _NO_PARENT:
        raise flatten(file, "names a parent: it has only the differences to it", "vmdk")
    if settings.get("version", "1") not in ("1", "2", "3", "4"):
        raise damaged(file, "a descriptor of an unknown version")


def _extent(file: SourceFile, found: re.Match[str]) -> _Extent:
    access, sectors, kind, name, offset = found.groups()
    if kind not in _KINDS or access == "NOACCESS" or name is None:
        raise flatten(file, f"has an extent of the kind {access} {kind}", "vmdk")
    if not is_plain(name):
        raise refused(
            file,
            f"names an extent with a path: {name[:80]!r}",
            "an extent must be a file beside it, named without a path; where the disk was made, write it "
            f"into one new file: qemu-img convert -O vmdk {file.name} NEW",
        )
    if int(sectors) == 0:
        raise damaged(file, "an extent of 0 sectors")
    return _Extent(int(sectors), _KINDS[kind], name, int(offset or 0))
