"""A kept guest as one file, for another machine.

It is a tar archive, compressed by gzip. Its first member is the record, the second one says how large
each file is and which parts of it are not zero, and one for each file has these parts. So a disk with
holes takes no more room than what is in it, and the same guest gives the same bytes.

A file that is read may come from a stranger. Only plain members are read, under the names that the
record gives, with sizes that are known before, and each file has to have its digest.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.store import IN_USE, Entry, Kind
from pytest_vmsandbox.catalogue.importing import tar
from pytest_vmsandbox.catalogue.importing.checked import MAX_SIZE
from pytest_vmsandbox.catalogue.importing.compression import Limits, unpacked
from pytest_vmsandbox.catalogue.importing.source import opened
from pytest_vmsandbox.core.errors import CacheError, ConfigError, ImageError
from pytest_vmsandbox.core.spec import MIB, format_size

RECORD, INDEX = "record.json", "index.json"
FORMAT = 1  # raise it when older versions cannot read it any more
_QUICK = 1  # gzip's level
_MAX_TEXT = 16 * MIB  # bytes of the record, and of the index
_MAX_DEPTH = 4
_MAX_END = MIB  # bytes of zeros that fill up the archive
_ROOM_LEFT = 256 * MIB
_HARM = "is damaged, or made to do harm: "  # so begin errors of the reader
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ANY_RATIO = 1 << 20  # the index bounds what comes out, so a memory of one byte is no bomb

Tell = Callable[[int, int], object]  # gets the bytes that are done, and all


@dataclass(frozen=True)
class _File:
    """A file: its path in the folder, its size, and where its parts begin and how long they are."""

    path: str
    size: int
    parts: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return sum(length for _, length in self.parts)


# -- writing --------------------------------------------------------------------------------------------


def write(entry: Entry, out: IO[bytes], tell: Tell = lambda *_: None) -> None:
    """Write something of the cache as one file. The caller holds it.

    Args:
        out: open for writing.
    """
    files = [_measured(entry.folder, path) for path in sorted(entry.record["digests"])]
    total, done = sum(file.length for file in files), 0
    index = {
        "format": FORMAT,
        "files": [{"path": it.path, "size": it.size, "parts": it.parts} for it in files],
    }
    with (
        gzip.GzipFile("", "wb", _QUICK, out, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        for name, content in ((RECORD, entry.record), (INDEX, index)):
            text = json.dumps(content, sort_keys=True).encode()
            archive.addfile(_member(name, len(text)), io.BytesIO(text))
        for number, file in enumerate(files):
            with (entry.folder / file.path).open("rb", buffering=0) as source:
                archive.addfile(
                    _member(_member_name(number, file.path), file.length),
                    _Parts(source, file.parts, lambda part: tell(done + part, total)),  # noqa: B023
                )
            done += file.length


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


def _member_name(number: int, path: str) -> str:
    return f"{number:03}-{PurePosixPath(path).name}"


def _measured(folder: Path, path: str) -> _File:
    """A file of a folder. Chunks that touch are one part."""
    with (folder / path).open("rb", buffering=0) as file:
        size, end = os.fstat(file.fileno()).st_size, 0
        parts: list[tuple[int, int]] = []
        for start, data in integrity.chunks(file):
            if parts and start == end:
                parts[-1] = parts[-1][0], parts[-1][1] + len(data)
            else:
                parts.append((start, len(data)))
            end = start + len(data)
    return _File(path, size, tuple(parts))


class _Parts(io.RawIOBase):
    """The parts of a file, one after the other, for reading."""

    def __init__(
        self, file: IO[bytes], parts: Iterable[tuple[int, int]], tell: Callable[[int], object]
    ) -> None:
        self._file = file
        self._parts = list(reversed(list(parts)))
        self._tell = tell
        self._done = 0

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes: `size`, or fewer at the end."""
        found = bytearray()
        while self._parts and len(found) < size:
            start, length = self._parts.pop()
            data = os.pread(self._file.fileno(), min(length, size - len(found)), start)
            if not data:
                break  # tarfile says that the file is cut short
            found += data
            if length > len(data):
                self._parts.append((start + len(data), length - len(data)))
        self._done += len(found)
        self._tell(self._done)
        return bytes(found)


# -- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """What is in such a file. It is read once, from front to end.

    Attributes:
        record: of what was exported. Only its digests have been checked.
    """

    record: Mapping[str, Any]
    _name: str
    _files: tuple[_File, ...]
    _members: Iterator[tar.Member]
    _pieces: Iterator[bytes]

    @property
    def size(self) -> int:
        """Bytes that it takes on the disk."""
        return sum(file.length for file in self._files)

    def unpack(self, folder: Path, tell: Tell = lambda *_: None) -> None:
        """Write the files into an empty folder, each for this user only.

        Raises:
            ConfigError: a file is missing, or has another size or content than the record says.
            CacheError: there is no room.
        """
        if shutil.disk_usage(folder).free < self.size + _ROOM_LEFT:
            raise CacheError(
                f"{self._name} needs {format_size(self.size)}, and the disk of {folder.parent} has not "
                "as much left",
                remedy="make room there, or set the environment variable VMSANDBOX_CACHE to another folder",
            )
        done = 0
        for number, file in enumerate(self._files):
            member = self._next()
            if (member.name, member.size) != (_member_name(number, file.path), file.length):
                raise _refused(self._name, f"it has {member.name!r} in the place of {file.path}")
            target = folder / file.path
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(target, flags, 0o600), "wb") as out:
                for data in _placed(out, file, member.data):
                    done += data
                    tell(done, self.size)
            if integrity.file_digest(target) != self.record["digests"][file.path]:
                raise _refused(self._name, f"{file.path} has not the digest of the record")
        for extra in self._members:
            raise _refused(self._name, f"it has a further file {extra.name!r}")
        left = 0
        for piece in self._pieces:  # at the end of it, gzip's own digest is checked
            left += len(piece)
            if left > _MAX_END:
                raise _refused(self._name, "it goes on behind its end")

    def _next(self) -> tar.Member:
        member = next(self._members, None)
        if member is None:
            raise _refused(self._name, "files are missing at its end")
        return member


def _placed(out: IO[bytes], file: _File, pieces: Iterator[bytes]) -> Iterator[int]:
    """Write the parts of a file to their places. Yields how many bytes were written."""
    rest = b""
    for start, length in file.parts:
        out.seek(start)
        missing = length
        while missing:
            rest = rest or next(pieces)
            data, rest = rest[:missing], rest[missing:]
            out.write(data)
            missing -= len(data)
            yield len(data)
    out.truncate(file.size)


@contextmanager
def read(path: Path, kind: Kind) -> Iterator[Export]:
    """Open a file that `write` has written.

    Args:
        kind: of what was exported.

    Raises:
        ConfigError: it is not there, or something else, or damaged.
    """
    name = str(path)
    with ExitStack() as stack:
        try:
            source = stack.enter_context(opened(path, name))
        except ImageError as error:
            raise ConfigError(
                error.brief, remedy="name a file that 'vmsandbox kept export' has written"
            ) from error
        try:
            pieces = unpacked(source, Limits(ratio=_ANY_RATIO))
            members = tar.members(source, pieces)
            record = _text(name, next(members, None), RECORD)
            index = _text(name, next(members, None), INDEX)
            if record.get("schema") != kind.schema:
                raise _refused(name, "another version of vmsandbox has kept it")
            paths = _checked_paths(name, record.get("digests"), {IN_USE, kind.record})
            files = tuple(_read_index(name, index, paths))
            yield Export(record, name, files, members, pieces)
        except ImageError as error:
            why = error.brief.removeprefix(f"{name} ").removeprefix(_HARM)
            raise _refused(name, why) from error


def _text(name: str, member: tar.Member | None, expected: str) -> dict[str, Any]:
    if member is None or member.name != expected:
        raise _refused(name, f"it has no {expected} where one has to be")
    if member.size > _MAX_TEXT:
        raise _refused(name, f"its {expected} takes {format_size(member.size)}")
    try:
        content = json.loads(b"".join(member.data))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise _refused(name, f"its {expected} cannot be read")
    return content


def _checked_paths(name: str, digests: object, reserved: set[str]) -> list[str]:
    """The paths of the files that a record names: plain ones, each in the folder."""
    if not isinstance(digests, dict) or not digests:
        raise _refused(name, "its record names no files")
    for path, digest in digests.items():
        parts = path.split("/")
        plain = len(parts) <= _MAX_DEPTH and all(map(_PART.fullmatch, parts))
        if not plain or path in reserved or not _is_digest(digest):
            raise _refused(name, f"its record names {path[:80]!r}, which is no plain name")
    folders = {str(parent) for path in digests for parent in PurePosixPath(path).parents}
    if both := folders & digests.keys():
        raise _refused(name, f"its record names {min(both)!r} as a file and as a folder")
    return sorted(digests)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _read_index(name: str, index: Mapping[str, Any], paths: list[str]) -> Iterator[_File]:
    """The files of an index, in the order of their members."""
    if index.get("format") != FORMAT:
        raise _refused(
            name,
            f"it has the format {str(index.get('format'))[:20]}, and this version reads {FORMAT}",
        )
    rows = index.get("files")
    if not isinstance(rows, list) or len(rows) != len(paths):
        raise _refused(name, "its index and its record name different files")
    for row, path in zip(rows, paths, strict=True):
        if not isinstance(row, dict) or row.get("path") != path:
            raise _refused(name, "its index and its record name different files")
        parts = row.get("parts")
        if not _are_numbers([row.get("size")]) or not isinstance(parts, list):
            raise _refused(name, f"its index gives {path} no size")
        if not all(
            isinstance(part, list) and len(part) == 2 and _are_numbers(part) for part in parts
        ):
            raise _refused(name, f"its index has wrong parts of {path}")
        ends = [0, *(start + length for start, length in parts)]
        starts = [*(start for start, _ in parts), row["size"]]
        if any(start < end for start, end in zip(starts, ends, strict=True)):
            raise _refused(
                name, f"its index has parts of {path} that overlap or lie behind its end"
            )
        yield _File(path, row["size"], tuple((start, length) for start, length in parts))


def _are_numbers(values: Iterable[object]) -> bool:
    return all(type(value) is int and 0 <= value <= MAX_SIZE for value in values)


def _refused(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"{name} is no kept guest, or it is damaged: {why}",
        remedy="export it again where it was kept ('vmsandbox kept export'), and copy it in binary mode",
    )
