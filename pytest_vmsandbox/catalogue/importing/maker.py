"""Makes an image of what a definition names as its source: fetched, unpacked, checked, and converted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pytest_vmsandbox.catalogue.importing.checked import CheckedDisk
from pytest_vmsandbox.catalogue.importing.checksums import Digest
from pytest_vmsandbox.catalogue.importing.convert import convert, write_sparsely
from pytest_vmsandbox.catalogue.importing.fetch import Fetcher
from pytest_vmsandbox.catalogue.importing.unpacking import unpacked_disk
from pytest_vmsandbox.catalogue.making import Build
from pytest_vmsandbox.catalogue.origin import Source
from pytest_vmsandbox.catalogue.store import DISK, INITRD, KERNEL
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import KIB, format_size

_NOT_LOCKED: Mapping[str, str] = MappingProxyType({})


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
            unpacked_disk(file, source.format, build.work, build.say) as found,
        ):
            disk = found.disk
            _check_size(disk, definition.disk_size)
            if left_out := found.left_out:
                build.say(
                    f"left out: {', '.join(left_out)}; only the disk that it boots from is taken"
                )
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
                write_sparsely(file.chunks(), build.out / name)
            used |= {key: place, f"{key}_sha256": digest.hex}
    return {"source": used}


def _digest(fetcher: Fetcher, source: Source, locked: Mapping[str, str]) -> tuple[Digest, str]:
    """The digest that the disk must have, and where it came from."""
    for kind in ("sha256", "sha512"):
        if kind in locked:
            return Digest(kind, locked[kind]), "given by the lock file"
    return fetcher.digest_and_check(source)


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
