"""Disks of a guest: the image's, only read, and an overlay that takes what the guest writes."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import IO

from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.errors import ImageError, LaunchError
from pytest_vmsandbox.core.spec import format_size

_CREATE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Disks:
    """The open files of a guest's disks. They have no names, so no crash leaves one behind.

    Attributes:
        base: the image's disk, or None.
        overlays: for the root disk, if there is a base, then for each further disk, its qcow2 files
            from the lowest to the one that takes what the guest writes.
        sizes: bytes of each disk, as the guest sees it.
    """

    base: IO[bytes] | None
    overlays: tuple[tuple[IO[bytes], ...], ...]
    sizes: tuple[int, ...] = ()

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
    ) -> Iterator[Disks]:
        """Fresh disks; what the guest has written is gone at the end.

        Args:
            base: the image's disk, a raw file, or None for a guest without one.
            root_size: bytes of the root disk; None for the size of `base`.
            blank: bytes of each further disk.
            folder: on a file system that has room for what the guest writes.
            frozen: what was written to each disk before, lowest first; only read.

        Raises:
            ImageError: `base` cannot be read.
            LaunchError: an overlay cannot be made.
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
            yield cls(base=base_file, overlays=tuple(overlays), sizes=tuple(sizes))

    def on_top(self, frozen: Sequence[Sequence[IO[bytes]]], fresh: Sequence[IO[bytes]]) -> Disks:
        """The same disks: what they held once, and an empty file on top of each."""
        layers = tuple((*below, top) for below, top in zip(frozen, fresh, strict=True))
        return Disks(base=self.base, overlays=layers, sizes=self.sizes)

    def frozen(self, stack: ExitStack) -> tuple[tuple[IO[bytes], ...], ...]:
        """All files of each disk, opened anew to be only read; `stack` closes them."""
        return tuple(
            tuple(
                stack.enter_context(Path(f"/proc/self/fd/{file.fileno()}").open("rb"))
                for file in files
            )
            for files in self.overlays
        )


NO_DISKS = Disks(base=None, overlays=())


def image_file(path: Path) -> BufferedReader:
    """A file of an image, open to be read.

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
                f"no disk could be made in {folder}: {error.strerror}",
                remedy=f"make room there, or name another folder in {paths.CACHE}",
            ) from error
        stack.pop_all()
        return overlay


@cache
def _empty_qcow2(size: int) -> bytes:
    """A qcow2 file of `size` bytes that holds nothing and names no base."""
    with tempfile.TemporaryDirectory() as folder:  # on failure, qemu-img removes the file itself
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
                "there is no qemu-img on this machine", remedy="apt-get install qemu-utils"
            ) from error
        except (subprocess.SubprocessError, OSError) as error:
            raise LaunchError(
                f"a disk of {format_size(size)} could not be made",
                details=str(getattr(error, "stderr", None) or error),
            ) from error
        return file.read_bytes()
