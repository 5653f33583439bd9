"""The headers of qcow2 images."""

from __future__ import annotations

import sys
from array import array

from pytest_vmsandbox.catalogue.importing.checked import (
    CheckedDisk,
    check_inside,
    check_size,
    damaged,
    flatten,
    refused,
    unpacked,
)
from pytest_vmsandbox.catalogue.importing.source import SourceFile

MAGIC = b"QFI\xfb"
_V2 = ">4sIQIIQIIQQIIQ"
_V2_LENGTH, _V3_LENGTH = 72, 104
_DIRTY, _CORRUPT, _EXTERNAL, _COMPRESSION, _EXTENDED = 1, 2, 4, 8, 16
_END, _BACKING, _NAMES, _BITMAPS, _ENCRYPTION, _DATA_FILE = (
    *(0, 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441),
)
_OFFSET = 0x00FF_FFFF_FFFF_FE00  # the bits of an L1 entry that are an offset


def check(file: SourceFile) -> CheckedDisk:
    """Check the header of a qcow2 image.

    Raises:
        ImageError: the image is damaged, or needs more than its one file.
    """
    header = unpacked(file, _V2)
    (_, version, backing_offset, backing_size, cluster_bits, size) = header[:6]
    (encryption, l1_entries, l1_offset, refcount_offset, refcount_clusters) = header[6:11]
    snapshots = header[11]
    if version not in (2, 3):
        raise flatten(file, f"is a qcow2 image of the unknown version {version}", "qcow2")
    if backing_offset or backing_size:
        raise flatten(file, "needs a backing file", "qcow2")
    if encryption:
        raise flatten(file, "is encrypted", "qcow2")
    if snapshots:
        raise flatten(file, "has snapshots inside", "qcow2")
    if not 9 <= cluster_bits <= 21:
        raise damaged(file, f"clusters of 2^{cluster_bits} bytes")
    cluster = 1 << cluster_bits
    check_size(file, size)
    _check_features(file, version, cluster)
    check_inside(file, "the refcount table", refcount_offset, 0, unit=cluster)
    check_inside(file, "the refcount table", refcount_offset, refcount_clusters * cluster)
    _check_l1(file, size, cluster, l1_offset, l1_entries)
    return CheckedDisk("qcow2", size, file)


def _check_features(file: SourceFile, version: int, cluster: int) -> None:
    length = _V2_LENGTH
    if version == 3:
        features, _, _, _, length = unpacked(file, ">QQQII", _V2_LENGTH)
        if features & _EXTERNAL:
            raise flatten(file, "keeps its data in another file", "qcow2")
        if features & (_DIRTY | _CORRUPT):
            raise refused(
                file,
                "was not closed properly",
                f"stop the machine that uses it, then: qemu-img check -r all {file.name}",
            )
        if unknown := features & ~(_COMPRESSION | _EXTENDED):
            raise flatten(file, f"needs unknown features (0x{unknown:x})", "qcow2")
        if not _V3_LENGTH <= length <= cluster or length % 8:
            raise damaged(file, f"a header of {length} bytes")
        kind = file.at(_V3_LENGTH, 1)[0] if length > _V3_LENGTH else 0
        if kind not in (0, 1) or bool(kind) != bool(features & _COMPRESSION):
            raise damaged(file, f"the unknown compression {kind}")
    _check_extensions(file, length, cluster)


def _check_extensions(file: SourceFile, offset: int, end: int) -> None:
    while offset + 8 <= min(end, file.size):
        kind, length = unpacked(file, ">II", offset)
        if kind == _END:
            return
        if kind == _DATA_FILE:
            raise flatten(file, "names another file for its data", "qcow2")
        if kind == _BACKING:
            raise flatten(file, "names the format of a backing file", "qcow2")
        if kind == _ENCRYPTION:
            raise flatten(file, "is encrypted", "qcow2")
        if kind not in (_NAMES, _BITMAPS):
            raise flatten(file, f"has an unknown header extension (0x{kind:x})", "qcow2")
        if offset + 8 + length > end:
            raise damaged(file, "a header extension goes beyond the header")
        offset += 8 + (length + 7) // 8 * 8
    if offset != end and offset + 8 <= end:
        raise file.cut_short()


def _check_l1(file: SourceFile, size: int, cluster: int, offset: int, entries: int) -> None:
    """Check the first level of the table of clusters, where it lies and where it points."""
    covered = cluster * (
        cluster // 8
    )  # bytes of the disk for an L2 table; half with extended entries
    if not size / covered <= entries <= 2 * (size // covered + 1) + 1024:
        raise damaged(file, f"an L1 table of {entries} entries")
    check_inside(file, "the L1 table", offset, entries * 8, unit=cluster)
    table = array("Q", file.at(offset, entries * 8))
    if sys.byteorder == "little":
        table.byteswap()
    places = [entry & _OFFSET for entry in table if entry & _OFFSET]
    own = range(offset, offset + entries * 8)
    for place in places:
        check_inside(file, "an L2 table", place, cluster, unit=cluster)
        if place == 0 or place in own or own.start in range(place, place + cluster):
            raise damaged(file, "tables that overlap")
    if len(set(places)) != len(places):
        raise damaged(file, "an L2 table that is used twice")
