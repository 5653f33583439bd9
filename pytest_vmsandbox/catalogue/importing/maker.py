"""Makes an image of what a definition names as its source: fetched, unpacked, checked, and converted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

from pytest_vmsandbox.catalogue.importing import archives, headers
from pytest_vmsandbox.catalogue.importing.checked import CheckedDisk
from pytest_vmsandbox.catalogue.importing.checksums import Digest
from pytest_vmsandbox.catalogue.importing.compression import (
    Limits,
    is_compressed,
    unpacked,
    without_zstd,
)
from pytest_vmsandbox.catalogue.importing.convert import check_room, convert
from pytest_vmsandbox.catalogue.importing.fetch import Fetcher
from pytest_vmsandbox.catalogue.importing.source import SourceFile, opened
from pytest_vmsandbox.catalogue.making import Build
from pytest_vmsandbox.catalogue.origin import Source
from pytest_vmsandbox.catalogue.store import DISK, INITRD, KERNEL
from pytest_vmsandbox.core.errors import ConfigError, ImageError
from pytest_vmsandbox.core.spec import KIB, format_size

_NOT_LOCKED: Mapping[str, str] = MappingProxyType({})
_ARCHIVES = ("ova", "box")


def make(
    build: Build, *, cache: Path, offline: bool = False, locked: Mapping[str, str] = _NOT_LOCKED
) -> Mapping[str, object]:
    """Fill the folder of an image from its definition's source: the disk, the kernel, the initial RAM disk.

    Args:
        build: what is made.
        cache: the user's cache folder, which keeps what was downloaded.
        offline: whether the network must not be used.
        locked: digests that count instead of the definition's: ``sha256`` or ``sha512``,
            ``kernel_sha256``, ``initrd_sha256``.

    Returns:
        What the record of the image has about its ``source``: places and digests by the definition's
        keys, and ``checked``, which says where the disk's digest came from.

    Raises:
        ImageError: a file cannot be fetched, has another digest, is damaged, or made to do harm.
        CacheError: what was downloaded cannot be kept.
        ConfigError: the definition does not fit to the disk.
    """
    definition = build.definition
    source = definition.source
    if source is None:
        raise ConfigError(f"{definition.name} has no [source]", remedy="add one to its image.toml")
    fetcher = Fetcher(cache, definition.folder, build.say, offline=offline)
    used: dict[str, str] = {}
    if source.url:
        digest, used["checked"] = _digest(fetcher, source, locked)
        with (
            fetcher.opened(source.url, digest) as file,
            disk_of(file, source.format, build.work, build.say) as disk,
        ):
            _check_size(disk, definition.disk_size)
            build.say(f"converting {format_size(disk.size)} from {disk.format}")
            convert(disk, build.out / DISK, build.work)
        _grow(build.out / DISK, definition.disk_size)
        used |= {"url": source.url, digest.kind: digest.hex}
    for key, place, stated, name in (
        ("kernel", source.kernel, source.kernel_sha256, KERNEL),
        ("initrd", source.initrd, source.initrd_sha256, INITRD),
    ):
        if place:
            digest = Digest("sha256", locked.get(f"{key}_sha256") or stated)
            with fetcher.opened(place, digest) as file:
                _copy(file, build.out / name)
            used |= {key: place, f"{key}_sha256": digest.hex}
    return {"source": used}


def _digest(fetcher: Fetcher, source: Source, locked: Mapping[str, str]) -> tuple[Digest, str]:
    """The digest that the disk must have, and where it came from."""
    for kind in ("sha256", "sha512"):
        if kind in locked:
            return Digest(kind, locked[kind]), "given by the lock file"
    return fetcher.digest_and_check(source)


@contextmanager
def disk_of(
    file: SourceFile, kind: str, work: Path, say: Callable[[str], None]
) -> Iterator[CheckedDisk]:
    """The checked disk that is in a file, which may be compressed or an archive.

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
            _write(unpacked(plain, Limits()), target)
            plain = stack.enter_context(opened(target, file.name))
        yield headers.check(plain, kind or headers.detect(plain))


@contextmanager
def _disk_of_archive(
    file: SourceFile, kind: str, work: Path, say: Callable[[str], None]
) -> Iterator[CheckedDisk]:
    if kind not in archives.KINDS:
        raise ImageError(
            f"{file.name} is an archive, but the format is {kind or 'not named'}",
            remedy="name the right format: ova or box (for a tar with the files of one VMDK: vmdk)",
        )
    say(f"unpacking {file.name}")
    folder = work / "members"
    folder.mkdir(mode=0o700)
    try:
        archive = archives.read(file, folder)
        chosen = archives.choose(file, archive, kind)
        if chosen.left_out:
            say(
                f"left out: {', '.join(chosen.left_out)}; only the disk that it boots from is taken"
            )
        with archives.opened_disks(archive) as disks:
            disk = disks[chosen.name]
            found = headers.detect(disk) if chosen.format in ("", "vmdk") else chosen.format
            yield headers.check(disk, found, disks)
    finally:
        shutil.rmtree(folder)


def _write(pieces: Iterator[bytes], target: Path) -> None:
    """Write pieces to a file, with holes where they are zero."""
    size = 0
    with target.open("xb") as out:
        for data in pieces:
            size += len(data)
            if any(data):
                out.write(data)
            else:
                out.seek(len(data), 1)
            if size % (64 << 20) < len(data):
                check_room(target.parent)
        out.truncate(size)


def _copy(file: SourceFile, target: Path) -> None:
    with target.open("xb") as out:
        for data in file.chunks():
            out.write(data)


def _check_size(disk: CheckedDisk, wanted: int | None) -> None:
    if wanted is not None and wanted < disk.size:
        raise ConfigError(
            f"the disk of {disk.file.name} has {format_size(disk.size)}, more than disk.size says",
            remedy=f'write into image.toml: [disk] size = "{-(-disk.size // KIB)}KiB", or more',
        )


def _grow(disk: Path, wanted: int | None) -> None:
    if wanted is not None and wanted > disk.stat().st_size:
        with disk.open("r+b") as file:
            file.truncate(wanted)
