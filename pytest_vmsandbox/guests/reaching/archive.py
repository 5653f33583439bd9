"""Folders as tar archives. We pack folders that may change, and unpack archives of untrusted guests."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import tempfile
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, cast

_CHUNK = 1 << 18
_MAX_READ = 1 << 18  # bytes; only a forged header makes tarfile read more at once
_RUN = 1 << 16  # bytes; this many zeros in a row become a hole
_SPECIAL = stat.S_ISUID | stat.S_ISGID
_KINDS = {tarfile.FIFOTYPE: "pipe", tarfile.CHRTYPE: "device", tarfile.BLKTYPE: "device"}


# -- packing ----------------------------------------------------------------------------------------


def pack(source: Path, file: IO[bytes], *, apart: Container[str] = ()) -> list[str]:
    """Write an archive of a folder, which may change meanwhile.

    Files that are removed meanwhile are left out. So are owners, which mean nothing in a guest.

    Args:
        source: the folder.
        file: where to write the archive.
        apart: names in the archive of files that are not packed. Hard links to them are.

    Returns:
        What was left out: pipes, sockets and devices.

    Raises:
        OSError: something cannot be read.
    """
    left_out = []
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for path, name in paths(source):
            with suppress(FileNotFoundError):
                member: tarfile.TarInfo | None = archive.gettarinfo(path, name)
                if member is None:  # tar has no type for sockets
                    left_out.append(f"{name} (socket)")
                elif member.type in _KINDS:
                    left_out.append(f"{name} ({_KINDS[member.type]})")
                elif name not in apart or member.islnk():
                    _add(archive, member, path)
    return left_out


def paths(source: Path) -> Iterator[tuple[Path, str]]:
    """A folder and everything in it: each path, and its name in the archive. Links are not followed."""
    for parent, folders, files in os.walk(source, onerror=_unless_gone):
        folder = Path(parent)
        name = "." if folder == source else f"./{folder.relative_to(source)}"
        yield folder, name
        links = [entry for entry in folders if (folder / entry).is_symlink()]
        for entry in sorted([*links, *files]):
            yield folder / entry, f"{name}/{entry}"


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _add(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    if not member.isreg():
        archive.addfile(member)
        return
    with path.open("rb") as file, tempfile.SpooledTemporaryFile(_CHUNK) as spool:
        # The header comes first and has the size. So small files are read before. Files of /proc are
        # longer than their size.
        start = file.read(_CHUNK)
        if len(start) == _CHUNK and member.size > _CHUNK:
            file.seek(0)
            archive.addfile(member, cast("IO[bytes]", _Padded(file)))
            return
        spool.write(start)
        while data := file.read(_CHUNK):
            spool.write(data)
        member.size = spool.tell()
        spool.seek(0)
        archive.addfile(member, cast("IO[bytes]", spool))


class _Padded(io.RawIOBase):
    """A file with zeros after its end, in case it becomes shorter while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size).ljust(size, b"\0")


# -- unpacking --------------------------------------------------------------------------------------


def extract(file: IO[bytes], folder: Path, *, special: bool = False) -> list[str]:
    """Unpack an archive that is not trusted.

    Names that lead out of `folder` are refused. Symbolic links are made last, so nothing is written
    through one. They may point anywhere. Long runs of zeros become holes.

    Args:
        special: whether to keep setuid and setgid bits.

    Returns:
        What was left out: pipes, devices, and without `special` those bits.

    Raises:
        tarfile.TarError: something in the archive is refused.
    """
    try:
        with tarfile.open(fileobj=_Bounded(file), mode="r:") as archive:
            return _Unpacking(folder, special=special).run(archive)
    except (OverflowError, RecursionError, ValueError) as error:  # odd times, names, nesting
        raise tarfile.TarError(str(error)) from error


def receive(
    file: IO[bytes], path: Path, *, mode: int, mtime: float, special: bool = False
) -> list[str]:
    """Write a new file. Long runs of zeros become holes.

    Returns:
        What was left out: its setuid and setgid bits, without `special`.
    """
    zeros = bytes(_RUN)
    with path.open("xb") as target:
        while data := file.read(_CHUNK):
            for start in range(0, len(data), _RUN):
                run = data[start : start + _RUN]
                if run == zeros:
                    target.seek(_RUN, os.SEEK_CUR)
                else:
                    target.write(run)
        target.truncate()
    path.chmod(mode & (0o7777 if special else 0o777))
    os.utime(path, (mtime, mtime))
    return [] if special or not mode & _SPECIAL else ["its setuid or setgid bit"]


class _Bounded(io.RawIOBase):
    """Reads a stream forward, with a limit for the size that a header can ask for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError(f"it has a header of {size} bytes")
        data = self._file.read(size)
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._position:
            raise tarfile.ReadError("it needs reading backwards")
        while self._position < offset and self.read(min(_CHUNK, offset - self._position)):
            pass
        return self._position


class _Unpacking:
    """An archive on its way into a folder."""

    def __init__(self, folder: Path, *, special: bool) -> None:
        self._folder = folder
        self._special = special
        self._links: list[tuple[Path, str]] = []
        self._modes: list[tuple[Path, int]] = []
        self._no_files: set[Path] = set()  # pipes and devices
        self._left_out: list[str] = []

    def run(self, archive: tarfile.TarFile) -> list[str]:
        for member in archive:
            self._take(archive, member)
        for path, _ in self._links:  # make all folders before the first link
            path.parent.mkdir(parents=True, exist_ok=True)
        for path, link in self._links:
            path.symlink_to(link)
        for path, mode in reversed(self._modes):  # inner ones first: an outer one may be read-only
            path.chmod(mode)
        return self._left_out

    def _take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = self._inside(member.name, f"{member.name!r} leads out of the folder")
        if member.issparse():  # a few bytes could expand to any size
            raise tarfile.TarError(f"{member.name!r} is a sparse file")
        if member.isdir():
            path.mkdir(parents=True, exist_ok=True)
            self._modes.append((path, member.mode & 0o777))
        elif member.issym():
            self._links.append((path, member.linkname))
        elif member.islnk():
            self._link(member, path)
        elif member.isreg():
            path.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None
            without = receive(
                content, path, mode=member.mode, mtime=member.mtime, special=self._special
            )
            self._left_out += [f"{member.name} ({what})" for what in without]
        elif member.type in _KINDS:
            self._no_files.add(path)
            self._left_out.append(f"{member.name} ({_KINDS[member.type]})")
        else:
            raise tarfile.TarError(f"{member.name!r} is neither a file, a folder nor a link")

    def _link(self, member: tarfile.TarInfo, path: Path) -> None:
        target = self._inside(member.linkname, f"{member.name!r} is a link out of the folder")
        if target in self._no_files:
            self._left_out.append(f"{member.name} (link to {member.linkname})")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(target, path, follow_symlinks=False)

    def _inside(self, name: str, complaint: str) -> Path:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts:
            raise tarfile.TarError(complaint)
        return self._folder.joinpath(*parts)
