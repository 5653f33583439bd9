"""Gets the disk out of a file, which may be compressed or an archive, and checks it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.catalogue.importing import archives, headers
from pytest_vmsandbox.catalogue.importing.checked import CheckedDisk
from pytest_vmsandbox.catalogue.importing.compression import (
    Limits,
    is_compressed,
    unpacked,
    without_zstd,
)
from pytest_vmsandbox.catalogue.importing.convert import write_sparsely
from pytest_vmsandbox.catalogue.importing.source import SourceFile, opened
from pytest_vmsandbox.core.errors import ImageError

_ARCHIVES = ("ova", "box")


@dataclass(frozen=True)
class Unpacked:
    """The disk that was in a file.

    Attributes:
        disk: it, checked.
        kind: the format of the file: that of the disk, ``ova`` or ``box``.
        firmware: ``uefi`` or ``bios``, if the file says it; otherwise empty.
        architecture: likewise, such as ``x86_64``.
        provider: of a box: the hypervisor that it is for.
        left_out: the names of further disks.
    """

    disk: CheckedDisk
    kind: str
    firmware: str = ""
    architecture: str = ""
    provider: str = ""
    left_out: tuple[str, ...] = ()


@contextmanager
def unpacked_disk(
    file: SourceFile, kind: str, work: Path, say: Callable[[str], None]
) -> Iterator[Unpacked]:
    """Unpack the disk that is in a file, and check it.

    Args:
        kind: the format that it is said to have, of `FORMATS`, ``ova`` or ``box``; empty to detect it.
        work: a folder for what is unpacked.
        say: gets lines for people.

    Raises:
        ImageError: the file is damaged, or made to do harm.
    """
    with ExitStack() as stack:
        plain = stack.enter_context(without_zstd(file, work))
        if archives.is_archive(plain):
            yield stack.enter_context(_disk_of_archive(plain, kind, work, say))
            return
        if kind in _ARCHIVES:
            raise ImageError(
                f"{file.name} is no archive, so it is no {kind}",
                remedy="name the format of the disk, or none",
            )
        if is_compressed(plain):
            say(f"unpacking {file.name}")
            target = work / "unpacked-disk"
            stack.callback(target.unlink, missing_ok=True)
            write_sparsely(unpacked(plain, Limits()), target)
            plain = stack.enter_context(opened(target, file.name))
        found = kind or headers.detect(plain)
        yield Unpacked(headers.check(plain, found), found)


@contextmanager
def _disk_of_archive(
    file: SourceFile, kind: str, work: Path, say: Callable[[str], None]
) -> Iterator[Unpacked]:
    if kind not in ("", *archives.KINDS):
        raise ImageError(
            f"{file.name} is an archive, and no {kind} image",
            remedy="name the right format: ova or box (for a tar with the files of one VMDK: vmdk)",
        )
    say(f"unpacking {file.name}")
    folder = work / "members"
    folder.mkdir(mode=0o700)
    try:
        archive = archives.read(file, folder)
        kind = kind or archives.kind_of(archive)
        chosen = archives.choose(file, archive, kind)
        with archives.opened_disks(archive) as disks:
            disk = disks[chosen.name]
            named = chosen.format if chosen.format not in ("", "vmdk") else headers.detect(disk)
            yield Unpacked(
                headers.check(disk, named, disks),
                kind,
                chosen.firmware,
                chosen.architecture,
                chosen.provider,
                chosen.left_out,
            )
    finally:
        shutil.rmtree(folder)
