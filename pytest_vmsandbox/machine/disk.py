"""Disks of a guest: the image's disk, which is read-only, and an overlay that the guest writes to."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import IO

from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.errors import ImageError, LaunchError
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.machine.firmware import Flash, Uefi

_CREATE_SECONDS = 60.0
REQUEST_SIZE = 4 << 20  # bytes of the disk that tells a guest what to run while it is recorded


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The open files of a machine that is recorded, or repeats what was recorded.

    Attributes:
        mode: ``record`` or ``replay``.
        log: what came from outside.
        console, report: what its two serial ports have written.
        snapshots: a qcow2 file for QEMU's snapshots, if a debugger may go backwards; else None.
    """

    mode: str
    log: IO[bytes]
    console: IO[bytes]
    report: IO[bytes]
    snapshots: IO[bytes] | None = None


@dataclass(frozen=True, kw_only=True)
class PluggedDisk:
    """The open files of a disk that was attached to a guest, and can be detached.

    Attributes:
        name: unique among the disks of the guest. It is also the disk's serial number.
        port: the root port that it is in.
        size: bytes, as the guest sees it.
        read_only: whether the guest can only read it.
        base: a file of this host, which is only read; None for a blank disk.
        layers: qcow2 files on top of that, lowest first. The guest writes to the last one.
        kept: whether a snapshot has its files, too.
        is_out: whether it was pulled out of its root port, and will be put back.
    """

    name: str
    port: str
    size: int
    read_only: bool
    base: IO[bytes] | None
    layers: tuple[IO[bytes], ...]
    kept: bool = False
    is_out: bool = False

    def close(self) -> None:
        """Close its files, unless a snapshot has them, too."""
        if not self.kept:
            for file in filter(None, (self.base, *self.layers)):
                file.close()


@dataclass(frozen=True, kw_only=True)
class Disks:
    """The open files of a guest's disks. They have no names, so a crash leaves none behind.

    Attributes:
        base: the image's disk, or None.
        overlays: the qcow2 files of the root disk, if there is a base, then of each further disk. The
            lowest file comes first. The guest writes to the last one.
        sizes: bytes of each disk, as the guest sees it.
        plugged: the disks that were attached to the guest. The guest may not have some of them now.
        flash: the files of UEFI firmware, or None without it.
        request: the file of the disk that tells a guest what to run while it is recorded.
        recording: the files of a machine that is recorded, or repeats what was recorded.
    """

    base: IO[bytes] | None
    overlays: tuple[tuple[IO[bytes], ...], ...]
    sizes: tuple[int, ...] = ()
    plugged: tuple[PluggedDisk, ...] = ()
    flash: Flash | None = None
    request: IO[bytes] | None = None
    recording: Recording | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        *,
        base: Path | None,
        root_size: int | None,
        blank: Sequence[int],
        folder: Path,
        frozen: Sequence[Sequence[Path]] = (),
        uefi: Uefi | None = None,
        recorded: bool = False,
    ) -> Iterator[Disks]:
        """Fresh disks. What the guest writes to them is removed at the end.

        Args:
            base: the image's disk, a raw file, or None for a guest without one.
            root_size: bytes of the root disk; None for the size of `base`.
            blank: bytes of each further disk.
            folder: on a file system with room for what the guest writes.
            frozen: read-only files with what was written to each disk before, lowest first.
            uefi: the guest's UEFI firmware, or None without it.
            recorded: whether what runs in the guest can be recorded.

        Raises:
            ImageError: `base` cannot be read.
            LaunchError: an overlay cannot be made, or the firmware cannot be read.
        """
        with ExitStack() as stack:
            sizes = list(blank)
            base_file: IO[bytes] | None = None
            if base is not None:
                base_file = stack.enter_context(image_file(base))
                sizes.insert(0, root_size or base.stat().st_size)
            overlays = []
            for size, below in zip(sizes, frozen or [()] * len(sizes), strict=True):
                layers: list[IO[bytes]] = [stack.enter_context(path.open("rb")) for path in below]
                overlays.append((*layers, stack.enter_context(empty_overlay(size, folder))))
            flash = stack.enter_context(Flash.open(uefi, folder)) if uefi is not None else None
            request: IO[bytes] | None = None
            if recorded:
                request = stack.enter_context(_blank(REQUEST_SIZE, folder))
            yield cls(
                base=base_file,
                overlays=tuple(overlays),
                sizes=tuple(sizes),
                flash=flash,
                request=request,
            )

    def on_top(self, fresh: Callable[[int], IO[bytes]]) -> Disks:
        """The same disks, with an empty file on top of each that the guest can write to.

        Args:
            fresh: makes an empty qcow2 file of a size.
        """
        overlays = tuple(
            (*below, fresh(size)) for below, size in zip(self.overlays, self.sizes, strict=True)
        )
        plugged = tuple(
            disk if disk.read_only else replace(disk, layers=(*disk.layers, fresh(disk.size)))
            for disk in self.plugged
        )
        return replace(self, overlays=overlays, plugged=plugged)

    def frozen(self, stack: ExitStack) -> Disks:
        """The same disks, with the files of all disks opened again read-only. `stack` closes them."""

        def again(files: Sequence[IO[bytes]]) -> tuple[IO[bytes], ...]:
            return tuple(
                stack.enter_context(Path(f"/proc/self/fd/{file.fileno()}").open("rb"))
                for file in files
            )

        plugged = tuple(
            replace(
                disk,
                base=None if disk.base is None else again([disk.base])[0],
                layers=again(disk.layers),
                kept=True,
            )
            for disk in self.plugged
        )
        base = None if self.base is None else again([self.base])[0]
        return replace(self, base=base, overlays=tuple(map(again, self.overlays)), plugged=plugged)

    @property
    def plugged_in(self) -> list[PluggedDisk]:
        """The disks in root ports that the guest has now."""
        return [disk for disk in self.plugged if not disk.is_out]

    def tops(self) -> list[IO[bytes]]:
        """The file that the guest writes to, of each disk that it can write to."""
        plugged = [disk.layers[-1] for disk in self.plugged_in if not disk.read_only]
        return [layers[-1] for layers in self.overlays] + plugged


NO_DISKS = Disks(base=None, overlays=())


def image_file(path: Path) -> BufferedReader:
    """A file of an image, open for reading.

    Raises:
        ImageError: it cannot be opened.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise ImageError(
            f"the image is damaged: {path} cannot be read: {error.strerror}",
            remedy="build the image again: vmsandbox images build NAME --force",
        ) from error


def _blank(size: int, folder: Path) -> IO[bytes]:
    """A file of zeros, without a name, that can only be read."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        os.ftruncate(file.fileno(), size)
        return Path(f"/proc/self/fd/{file.fileno()}").open("rb", buffering=0)


def empty_overlay(size: int, folder: Path) -> IO[bytes]:
    """An empty qcow2 file of `size` bytes, without a name.

    Raises:
        LaunchError: it cannot be made.
    """
    content = _empty_qcow2(size)
    with ExitStack() as stack:
        try:
            # Unbuffered: else closing it would fail once more where the disk is full.
            overlay = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            if overlay.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise LaunchError(
                f"no disk for the guest could be made in {folder}: {error.strerror}",
                remedy=f"make room there, or set the environment variable {paths.CACHE} to another folder",
            ) from error
        stack.pop_all()
        return overlay


@cache
def _empty_qcow2(size: int) -> bytes:
    """The content of an empty qcow2 file of `size` bytes without a base."""
    with tempfile.TemporaryDirectory() as folder:  # if it fails, qemu-img removes the file
        file = Path(folder, "empty.qcow2")
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=off", str(file)]
        try:
            subprocess.run(
                [*argv, str(size)],
                check=True,
                capture_output=True,
                timeout=_CREATE_SECONDS,
                stdin=subprocess.DEVNULL,
                encoding="utf-8",
                errors="replace",
            )
        except FileNotFoundError as error:
            raise LaunchError(
                "there is no qemu-img on this machine",
                remedy="run 'vmsandbox quickstart', or install it: apt-get install qemu-utils (Debian, "
                "Ubuntu)",
            ) from error
        except (subprocess.SubprocessError, OSError) as error:
            raise LaunchError(
                f"qemu-img could not make a disk of {format_size(size)}",
                details=str(getattr(error, "stderr", None) or error),
                remedy="'vmsandbox doctor' checks this machine",
            ) from error
        return file.read_bytes()
