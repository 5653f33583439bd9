"""What is known of a disk image after its header was checked, and how it is refused."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from pytest_vmsandbox.catalogue.importing.source import SourceFile
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.spec import TIB, format_size

SECTOR = 512
MAX_SIZE = TIB  # bytes of a disk as a guest sees it


@dataclass(frozen=True)
class CheckedDisk:
    """A disk image whose header is harmless.

    Attributes:
        format: as ``qemu-img -f`` names it.
        size: bytes of the disk as a guest sees it.
        file: the image.
        parts: further files of it, by the names that `descriptor` has for them.
        descriptor: for an image of several files: a description of ours, instead of the image's own.
    """

    format: str
    size: int
    file: SourceFile
    parts: tuple[tuple[str, SourceFile], ...] = ()
    descriptor: str = ""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """All files that hold the disk's data."""
        return tuple(part for _, part in self.parts) or (self.file,)


def refused(file: SourceFile, why: str, remedy: str, *, details: str = "") -> ImageError:
    """The error for a file that is not imported.

    Args:
        why: continues a sentence that begins with the file's name.
    """
    return ImageError(f"{file.name} {why}", remedy=remedy, details=details)


def damaged(file: SourceFile, what: str) -> ImageError:
    """The error for a header that makes no sense."""
    return refused(
        file,
        f"is damaged, or made to do harm: {what}",
        "fetch or copy it again, and compare its digest",
    )


def flatten(file: SourceFile, why: str, kind: str) -> ImageError:
    """The error for an image that needs other files, or features that we do not take."""
    return refused(
        file,
        why,
        f"where the image was made, write the whole disk into one new file: "
        f"qemu-img convert -O {kind} {file.name} NEW",
    )


def check_size(file: SourceFile, size: int) -> int:
    """Check the size of a disk as a guest sees it.

    Raises:
        ImageError: it is empty or too large.
    """
    if size <= 0:
        raise damaged(file, "it holds a disk of 0 bytes")
    if size > MAX_SIZE:
        raise refused(
            file,
            f"holds a disk of {format_size(size)}; at most {format_size(MAX_SIZE)} are imported",
            "make its file systems and partitions smaller, then the disk: qemu-img resize --shrink",
        )
    return size


def check_inside(file: SourceFile, what: str, offset: int, length: int, *, unit: int = 1) -> None:
    """Check that a table lies in the file, at a multiple of `unit`.

    Raises:
        ImageError: it does not.
    """
    if offset < 0 or length < 0 or offset + length > file.size:
        raise damaged(file, f"{what} lies outside of the file")
    if offset % unit:
        raise damaged(file, f"{what} is not where it can be")


def unpacked(file: SourceFile, layout: str, offset: int = 0) -> tuple[Any, ...]:
    """Fields of a header, as `struct.unpack` returns them.

    Raises:
        ImageError: the file is too short.
    """
    return struct.unpack(layout, file.at(offset, struct.calcsize(layout)))
