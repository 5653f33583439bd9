"""The headers of VHD images (Virtual PC, Hyper-V, Azure), which QEMU calls vpc."""

from __future__ import annotations

from pytest_vmsandbox.catalogue.importing.checked import (
    SECTOR,
    CheckedDisk,
    check_inside,
    check_size,
    damaged,
    flatten,
    unpacked,
)
from pytest_vmsandbox.catalogue.importing.source import SourceFile

COOKIE, _DYNAMIC_COOKIE = b"conectix", b"cxsparse"
_FIXED, _DYNAMIC = 2, 3
_FOOTER = ">8sIIQI4sI4sQQHBBII16sB"
_HEADER = ">8sQQIIII16sI4s512s192s"
_CHECKSUM_AT, _HEADER_CHECKSUM_AT = 64, 36
# Makers whose size is the number of bytes. For others, QEMU takes cylinders × heads × sectors.
_BY_SIZE = (b"win ", b"qem2", b"d2v ", b"tap\0", b"vs  ", b"CTXS", b"wa\0\0")
_MAX_GEOMETRY = 65535 * 16 * 255


def has_footer(file: SourceFile) -> bool:
    """Whether a file ends as a VHD does. A fixed one has nothing else."""
    return file.size >= SECTOR and file.at(file.size - SECTOR, 8) == COOKIE


def check(file: SourceFile) -> CheckedDisk:
    """Check the header and the footer of a VHD image.

    Raises:
        ImageError: the image is damaged, or needs more than its one file.
    """
    at_start = file.head(8) == COOKIE
    where = 0 if at_start else file.size - SECTOR
    footer = file.at(where, SECTOR)
    values = unpacked(file, _FOOTER, where)
    version, data_offset, maker = values[2], values[3], values[5]
    current, cylinders, heads, sectors, kind = *values[9:13], values[13]
    if values[0] != COOKIE:
        raise damaged(file, "it has no footer")
    if version != 0x00010000:
        raise flatten(file, f"is a VHD image of the unknown version 0x{version:x}", "vpc")
    _check_sum(file, footer, _CHECKSUM_AT)
    if kind not in (_FIXED, _DYNAMIC):
        raise flatten(file, "has only the differences to another VHD image", "vpc")
    if (kind == _FIXED) == at_start:
        raise damaged(file, "its header and its kind do not match")
    geometry = cylinders * heads * sectors
    by_size = maker in _BY_SIZE or geometry == _MAX_GEOMETRY or not geometry
    current = check_size(file, current // SECTOR * SECTOR)
    size = current if by_size else max(current, check_size(file, geometry * SECTOR))
    if kind == _FIXED:
        check_inside(file, "the disk", 0, current + SECTOR)
    else:
        _check_dynamic(file, data_offset, size)
    return CheckedDisk("vpc", size, file)


def _check_dynamic(file: SourceFile, offset: int, size: int) -> None:
    check_inside(file, "the dynamic header", offset, 1024, unit=SECTOR)
    header = file.at(offset, 1024)
    cookie, _, table, version, entries, block, _ = unpacked(file, ">8sQQIIII", offset)
    if cookie != _DYNAMIC_COOKIE or version != 0x00010000:
        raise damaged(file, "an unknown dynamic header")
    _check_sum(file, header, _HEADER_CHECKSUM_AT)
    if any(header[40:56]) or any(header[64:768]):  # the parent's id; its name, and where it is
        raise flatten(file, "names a parent: it has only the differences to it", "vpc")
    if block < SECTOR or block & (block - 1) or block > 1 << 28:
        raise damaged(file, f"blocks of {block} bytes")
    if not -(-size // block) <= entries <= (1 << 32) // 4:
        raise damaged(file, f"a table of {entries} blocks for a disk of {size} bytes")
    check_inside(file, "the block table", table, entries * 4, unit=SECTOR)


def _check_sum(file: SourceFile, header: bytes, at: int) -> None:
    stated = int.from_bytes(header[at : at + 4], "big")
    if ~(sum(header) - sum(header[at : at + 4])) & 0xFFFFFFFF != stated:
        raise damaged(file, "its header does not have its checksum")
