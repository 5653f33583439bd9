"""Converts a checked disk image to a raw disk: ``qemu-img`` in the jail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from pytest_vmsandbox.catalogue.importing import jail
from pytest_vmsandbox.catalogue.importing.checked import CheckedDisk
from pytest_vmsandbox.catalogue.importing.source import opened
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.spec import GIB, MIB, format_size

QEMU_IMG = "qemu-img"
_INPUT, _OUTPUT = "/in/disk", "/out/disk"
_NO_MATTER = "OFD lock probing"  # in the jail is no /dev/null
_LEAST_SECONDS, _BYTES_PER_SECOND = 900.0, 2 * MIB
_ROOM_LEFT = 256 * MIB
_LOOK_EVERY = 64 * MIB
_ZEROS = bytes(MIB)
RATIO, GRACE = 250, GIB  # what is unpacked is at most that many times as large, and this


def convert(disk: CheckedDisk, output: Path, work: Path) -> None:
    """Write a raw disk, with holes where it is zero.

    Args:
        disk: whose header has been checked.
        output: is made, with exactly the size of the disk.
        work: a folder for temporary files.

    Raises:
        ImageError: the image is damaged, the jail cannot be made, or there is no room.
    """
    program = jail.program(QEMU_IMG)
    with output.open("xb") as new:
        new.truncate(disk.size)
    with ExitStack() as stack:
        target = stack.enter_context(opened(output))
        binds = [jail.Bind(target, _OUTPUT, writable=True)]
        if disk.descriptor:
            text = Path(work, "descriptor")
            text.write_text(disk.descriptor, encoding="ascii")
            stack.callback(text.unlink)
            binds.append(jail.Bind(stack.enter_context(opened(text)), _INPUT))
            binds += [jail.Bind(file, f"/in/{name}") for name, file in disk.parts]
        else:
            binds.append(jail.Bind(disk.file, _INPUT))
        packed = sum(file.size for file in disk.files)

        def check() -> None:
            check_growth(output, RATIO * packed + GRACE)

        # The target is there, and all zero: nothing is created, and no format is guessed.
        argv = [program, "convert", "-n", "--target-is-zero", "-f", disk.format, "-O", "raw"]
        ended = jail.run(
            [*argv, _INPUT, _OUTPUT],
            binds,
            work=work,
            seconds=seconds_for(packed),
            file_size=disk.size,
            check=check,
        )
    check()  # it may have been quick
    for file in disk.files:
        file.check_unchanged()
    if ended.status != 0:
        raise ImageError(
            f"{disk.file.name} cannot be converted: {QEMU_IMG} ended with status {ended.status}",
            details="\n".join(line for line in ended.output.splitlines() if _NO_MATTER not in line),
            remedy="the file is damaged: fetch or copy it again, and compare its digest",
        )


def seconds_for(packed: int) -> float:
    """How long a program may take for a file of that many bytes."""
    return _LEAST_SECONDS + packed / _BYTES_PER_SECOND


def check_growth(output: Path, limit: int) -> None:
    """Check that an output neither fills the disk nor is a bomb.

    Raises:
        ImageError: it is one of both.
    """
    if (written := output.stat().st_blocks * 512) > limit:
        raise bomb(output.name, written)
    check_room(output.parent)


def write_sparsely(pieces: Iterable[bytes], target: Path) -> None:
    """Write pieces to a file that is made, with holes where they are zero.

    Raises:
        ImageError: there is no room.
    """
    size = until_look = 0
    with target.open("xb") as out:
        for data in pieces:
            size += len(data)
            if until_look <= 0:
                check_room(target.parent)
                until_look = _LOOK_EVERY
            if data != _ZEROS[: len(data)]:
                out.write(data)
                until_look -= len(data)
            else:
                out.seek(len(data), os.SEEK_CUR)
        out.truncate(size)


def check_room(folder: Path) -> None:
    """Check that the disk of a folder is not full.

    Raises:
        ImageError: it is.
    """
    if shutil.disk_usage(folder).free < _ROOM_LEFT:
        raise ImageError(
            f"the disk is full: less than {format_size(_ROOM_LEFT)} are left in {folder}",
            remedy="make room there, or set the environment variables VMSANDBOX_CACHE and TMPDIR "
            "to folders on a larger disk",
        )


def bomb(name: str, size: int) -> ImageError:
    """The error for a file that unpacks to much more than it has."""
    return ImageError(
        f"{name} was not unpacked further: {format_size(size)} came out of a file that is "
        f"{RATIO} times smaller",
        remedy="if you trust it, unpack it by yourself, and import what was in it",
    )
