"""The headers of VDI images (VirtualBox)."""

from __future__ import annotations

import sys
from array import array

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

SIGNATURE, SIGNATURE_AT = b"\x7f\x10\xda\xbe", 0x40
_LAYOUT = "<IIIII256sIIIIIIIQIIII16s16s16s16s"
_VERSION = 0x00010001
_BLOCK = 1 << 20
_KINDS = (1, 2)  # dynamic, fixed; others are differences to other images
_FREE = 0xFFFFFFFE  # this block number and the next one: nothing is there


def check(file: SourceFile) -> CheckedDisk:
    """Check the header of a VDI image.

    Raises:
        ImageError: the image is damaged, or needs more than its one file.
    """
    header = unpacked(file, _LAYOUT, SIGNATURE_AT)
    version, _, kind = header[1:4]
    map_offset, data_offset = header[6:8]
    sector, _, size, block, extra, blocks, used = header[11:18]
    link, parent = header[20:22]
    if version != _VERSION:
        raise flatten(file, f"is a VDI image of the unknown version 0x{version:x}", "vdi")
    if kind not in _KINDS or any(link) or any(parent):
        raise flatten(file, "has only the differences to another VDI image", "vdi")
    check_size(file, size)
    if (sector, block, extra) != (SECTOR, _BLOCK, 0):
        raise damaged(file, "sectors or blocks of an unknown size")
    if blocks != -(-size // _BLOCK) or used > blocks:
        raise damaged(file, f"{blocks} blocks for a disk of {size} bytes")
    check_inside(file, "the block map", map_offset, blocks * 4, unit=SECTOR)
    check_inside(file, "the data", data_offset, 0, unit=SECTOR)
    if map_offset < SECTOR or data_offset < map_offset + blocks * 4:
        raise damaged(file, "parts that overlap")
    numbers = array("I", file.at(map_offset, blocks * 4))
    if sys.byteorder == "big":
        numbers.byteswap()
    taken = [number for number in numbers if number < _FREE]
    if len(set(taken)) != len(taken) or any(number >= used for number in taken):
        raise damaged(file, "blocks that are used twice or are not there")
    check_inside(file, "a block", data_offset, (max(taken, default=-1) + 1) * _BLOCK)
    return CheckedDisk("vdi", size, file)
