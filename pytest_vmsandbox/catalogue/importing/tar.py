"""Reads tar archives of strangers as a stream.

Python's tarfile reads much that nobody needs here: links, devices, sparse members, headers of any length. This
reader takes plain files with plain names, and refuses the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pytest_vmsandbox.catalogue.importing.checked import MAX_SIZE, damaged, refused
from pytest_vmsandbox.catalogue.importing.source import SourceFile
from pytest_vmsandbox.catalogue.importing.vmdk import is_plain
from pytest_vmsandbox.core.errors import ImageError

BLOCK = 512
MAGIC_AT, MAGIC = 257, b"ustar"
_MAX_MEMBERS = 1024
_MAX_EXTRA = 64 * 1024  # bytes of names and attributes before a member
_PLAIN, _FOLDER, _ATTRIBUTES, _ALL_ATTRIBUTES, _LONG_NAME = b"0\0", b"5", b"x", b"g", b"L"
_KINDS = {
    b"1": "a link",
    b"2": "a link",
    b"K": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}
# Folder of Vagrant boxes, and what macOS adds to each file with attributes; nothing in them is needed.
_IGNORED = ("include/", "._")


@dataclass(frozen=True)
class Member:
    """A file in an archive: its name, its size, and its content, to be read before the next one."""

    name: str
    size: int
    data: Iterator[bytes]


class _Stream:
    """Bytes that come in pieces of any size."""

    def __init__(self, file: SourceFile, pieces: Iterable[bytes]) -> None:
        self._file = file
        self._pieces = iter(pieces)
        self._rest = b""

    def upto(self, length: int) -> bytes:
        """At least one byte and at most `length`; none at the end."""
        if not self._rest:
            self._rest = next((piece for piece in self._pieces if piece), b"")
        data, self._rest = self._rest[:length], self._rest[length:]
        return data

    def parts(self, length: int) -> Iterator[bytes]:
        """Exactly `length` bytes, in parts."""
        while length:
            data = self.upto(length)
            if not data:
                raise self._file.cut_short()
            length -= len(data)
            yield data

    def exactly(self, length: int) -> bytes:
        """Exactly `length` bytes."""
        return b"".join(self.parts(length))


def is_tar(head: bytes) -> bool:
    """Whether something with that beginning is a tar archive."""
    return head[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def members(file: SourceFile, pieces: Iterable[bytes]) -> Iterator[Member]:
    """The files in an archive.

    Args:
        file: the archive, for errors.
        pieces: its content, unpacked.

    Raises:
        ImageError: it is damaged, or has a member that is not plain.
    """
    stream = _Stream(file, pieces)
    names: set[str] = set()
    long_name, attributes = b"", dict[bytes, bytes]()
    for _ in range(_MAX_MEMBERS):
        header = stream.exactly(BLOCK)
        if not any(header):
            return
        name, size, kind = _header(file, header)
        if kind in (_ATTRIBUTES, _ALL_ATTRIBUTES, _LONG_NAME):
            if size > _MAX_EXTRA:
                raise damaged(file, f"a header of {size} bytes")
            extra = stream.exactly(size + -size % BLOCK)[:size]
            if kind == _LONG_NAME:
                long_name = extra.removesuffix(b"\0")
            else:
                found = _attributes(file, extra)
                attributes |= found if kind == _ATTRIBUTES else {}
                if kind == _ALL_ATTRIBUTES and found.keys() & {b"path", b"size"}:
                    raise damaged(file, "names or sizes for all of its members")
            continue
        plain = _name(file, attributes.get(b"path", long_name or name), kind)
        size = _pax_size(file, attributes[b"size"]) if b"size" in attributes else size
        long_name, attributes = b"", {}
        if kind not in _PLAIN:
            continue  # a folder
        if size > MAX_SIZE or plain in names:
            raise damaged(file, f"the member {plain!r} is there twice, or too large")
        names.add(plain)
        data = stream.parts(size)
        if not plain.startswith(_IGNORED):
            yield Member(plain, size, data)
        for _part in data:
            pass  # what was not read
        stream.exactly(-size % BLOCK)
    raise damaged(file, f"more than {_MAX_MEMBERS} members")


def _header(file: SourceFile, header: bytes) -> tuple[bytes, int, bytes]:
    """Name, size and kind of a member."""
    stated = _number(file, header[148:156])
    if sum(header) - sum(header[148:156]) + 8 * 32 != stated:
        raise damaged(file, "it is no tar archive, or a header has not its checksum")
    name, kind = header[:100], header[156:157]
    if header[MAGIC_AT : MAGIC_AT + 8] == b"ustar\x0000" and header[345]:
        name = _text(file, header[345:500]) + b"/" + _text(file, name)
    else:
        name = _text(file, name)
    return name, _number(file, header[124:136]), kind


def _text(file: SourceFile, field: bytes) -> bytes:
    text, _, rest = field.partition(b"\0")
    if rest.strip(b"\0"):
        raise damaged(file, "a name that goes on behind its end")
    return text


def _number(file: SourceFile, field: bytes) -> int:
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise damaged(file, "a negative size")
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise damaged(file, "it is no tar archive, or a header has a wrong number")
    return int(digits or b"0", 8)


def _attributes(file: SourceFile, data: bytes) -> dict[bytes, bytes]:
    """The records of a pax header: ``LENGTH KEY=VALUE`` and a line end."""
    found = {}
    while data:
        length = data.partition(b" ")[0]
        if (
            not length.isdigit()
            or len(length) > 6
            or not len(length) + 3 <= int(length) <= len(data)
        ):
            raise damaged(file, "wrong attributes of a member")
        record, data = data[: int(length)], data[int(length) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        if key.startswith((b"GNU.sparse", b"SCHILY.realsize")):
            raise _unwanted(file, "a sparse file")
        found[key] = value
    return found


def _pax_size(file: SourceFile, value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise damaged(file, "a wrong size of a member")
    return int(value)


def _name(file: SourceFile, raw: bytes, kind: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = "\0"
    if kind not in (*(bytes([plain]) for plain in _PLAIN), _FOLDER):
        raise _unwanted(file, _KINDS.get(kind, "something unknown"))
    while name.startswith("./"):
        name = name[2:]
    parts = name.removesuffix("/").split("/") if kind == _FOLDER else name.split("/")
    if kind == _FOLDER and parts in ([""], ["."]):
        return ""
    ignored = name.startswith(_IGNORED[0])
    if not all(map(is_plain, parts)) or (len(parts) > 1 and not ignored and kind != _FOLDER):
        raise refused(
            file,
            f"has a member with a path or a strange name: {name[:80]!r}",
            "an archive of a disk has plain files and no folders: unpack it by yourself where it can do no "
            "harm, and import the disk that is in it",
        )
    return name


def _unwanted(file: SourceFile, what: str) -> ImageError:
    return refused(
        file,
        f"has a member that is {what}",
        "an archive of a disk has plain files only: unpack it by yourself where it can do no harm, and import "
        "the disk that is in it",
    )
