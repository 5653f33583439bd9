"""The headers of VHDX images (Hyper-V)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

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
from pytest_vmsandbox.core.spec import KIB, MIB

MAGIC = b"vhdxfile"
_HEADERS, _REGIONS = (64 * KIB, 128 * KIB), (192 * KIB, 256 * KIB)
_TABLE, _HEADER = 64 * KIB, 4 * KIB
_MAX_REGIONS, _MAX_ITEMS, _MAX_REGION = 2047, 2047, 512 * MIB
_BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_IDENTITY = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
_LOGICAL = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
_PHYSICAL = uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556")
_PARENT = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_KNOWN = {_PARAMETERS: 8, _SIZE: 8, _IDENTITY: 16, _LOGICAL: 4, _PHYSICAL: 4}  # and their lengths
_HAS_PARENT, _LEAVE_ALLOCATED = 2, 1


def check(file: SourceFile) -> CheckedDisk:
    """Check the headers of a VHDX image.

    Raises:
        ImageError: the image is damaged, or needs more than its one file.
    """
    _check_log(file)
    tables = [file.at(place, _TABLE) for place in _REGIONS]
    if tables[0] != tables[1]:  # readers differ in which one they take
        raise damaged(file, "two tables of regions that differ")
    regions = _regions(file, tables[0])
    offset, length = regions[_METADATA]
    size, block, logical = _metadata(file, offset, length)
    check_size(file, size)
    if logical not in (SECTOR, 4 * KIB) or size % logical:
        raise damaged(file, f"sectors of {logical} bytes for a disk of {size}")
    if not MIB <= block <= 256 * MIB or block & (block - 1):
        raise damaged(file, f"blocks of {block} bytes")
    if regions[_BAT][1] < -(-size // block) * 8:
        raise damaged(file, "a table of blocks that is too small")
    return CheckedDisk("vhdx", size, file)


def _check_log(file: SourceFile) -> None:
    """Check that the newest header is in order, and that nothing waits in the log."""
    found: list[tuple[int, bytes]] = []
    for place in _HEADERS:
        header = file.at(place, _HEADER)
        if header[:4] == b"head" and _has_checksum(header):
            found.append((int.from_bytes(header[8:16], "little"), header))
    if not found:
        raise damaged(file, "none of its headers has its checksum")
    newest = max(number for number, _ in found)
    for number, header in found:
        if number == newest and any(header[48:64]):
            raise refused(
                file,
                "was not closed properly: changes wait in its log",
                "stop the machine that uses it; open and close it where it was made, or: "
                f"qemu-img check -r all {file.name}",
            )
        if number == newest and header[66:68] != b"\1\0":
            raise damaged(file, "an unknown version")


def _regions(file: SourceFile, table: bytes) -> dict[uuid.UUID, tuple[int, int]]:
    count = int.from_bytes(table[8:12], "little")
    if table[:4] != b"regi" or count > _MAX_REGIONS or not _has_checksum(table):
        raise damaged(file, "its table of regions")
    regions: dict[uuid.UUID, tuple[int, int]] = {}
    for position in range(count):
        entry = table[16 + 32 * position : 48 + 32 * position]
        name = uuid.UUID(bytes_le=entry[:16])
        offset, length = (
            int.from_bytes(entry[16:24], "little"),
            int.from_bytes(entry[24:28], "little"),
        )
        if name not in (_BAT, _METADATA):
            raise flatten(file, "has an unknown region", "vhdx")
        if name in regions or length > _MAX_REGION or offset < MIB:
            raise damaged(file, "its table of regions")
        check_inside(file, "a region", offset, length, unit=MIB)
        regions[name] = offset, length
    if len(regions) != 2:
        raise damaged(file, "a region is missing")
    return regions


def _metadata(file: SourceFile, offset: int, length: int) -> tuple[int, int, int]:
    """Size of the disk, of a block, and of a sector."""
    values: dict[uuid.UUID, bytes] = {}
    for name, where, size in _items(file, offset):
        if name == _PARENT:
            raise flatten(file, "names a parent: it has only the differences to it", "vhdx")
        if name not in _KNOWN:
            raise flatten(file, f"has unknown metadata ({name})", "vhdx")
        if name in values or size != _KNOWN[name] or where < _TABLE or where + size > length:
            raise damaged(file, "its metadata")
        values[name] = file.at(offset + where, size)
    if missing := _KNOWN.keys() - values:
        raise damaged(file, f"{len(missing)} of its metadata are missing")
    block, flags = (int.from_bytes(values[_PARAMETERS][at : at + 4], "little") for at in (0, 4))
    if flags & ~_LEAVE_ALLOCATED:
        raise flatten(file, "has only the differences to another VHDX image", "vhdx")
    size, logical = (int.from_bytes(values[name], "little") for name in (_SIZE, _LOGICAL))
    return size, block, logical


def _items(file: SourceFile, offset: int) -> Iterator[tuple[uuid.UUID, int, int]]:
    magic, _, count = unpacked(file, "<8sHH", offset)
    if magic != b"metadata" or count > _MAX_ITEMS:
        raise damaged(file, "its metadata")
    for position in range(count):
        name, where, size = unpacked(file, "<16sII", offset + 32 + 32 * position)
        yield uuid.UUID(bytes_le=bytes(name)), where, size


def _has_checksum(data: bytes) -> bool:
    stated = int.from_bytes(data[4:8], "little")
    return _crc32c(data[:4] + bytes(4) + data[8:]) == stated


def _crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = _CRC[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _crc_table() -> list[int]:
    table = []
    for number in range(256):
        value = number
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()
