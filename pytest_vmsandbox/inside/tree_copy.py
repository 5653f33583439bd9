"""The copy of a tree in a guest: how it gets there, and what has changed in it since."""

from __future__ import annotations

import gzip
import os
import re
import stat
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO

from pytest_vmsandbox.core.errors import CommandError, TransferError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.guests import transfer
from pytest_vmsandbox.guests.transfer import Streamer
from pytest_vmsandbox.inside.tree import Tree, TreeEntry, shown

_MAX_LISTING = 64 * MIB
_FORMAT = r"%y\0%s\0%T@\0%P\0"  # of GNU find; `_RECORD` reads it
_RECORD = re.compile(rb"([A-Za-z?])\0(\d{1,19})\0(-?\d{1,19})(?:\.(\d{1,12}))?\0([^\0]*)\0")


@dataclass(frozen=True)
class Changes:
    """What has changed in a guest's copy of a tree since it went there.

    Attributes:
        written: files that are new or have other content, by path.
        removed: paths of files that are gone.
    """

    written: Mapping[str, TreeEntry]
    removed: tuple[str, ...]


def push(stream: Streamer, tree: Tree, dest: str) -> None:
    """Copy a tree into the folder `dest` of a guest, which is made if need be.

    The guest's user owns what goes over. What is in the folder already stays, unless something of
    the tree takes its place.

    Raises:
        TransferError: the guest cannot take it; a file changes or vanishes meanwhile.
    """
    folder = transfer.quoted(transfer.guest_path(dest))
    try:
        with transfer.written_by(partial(_pack, tree)) as archive:
            stream(
                f"LC_ALL=C; export LC_ALL; mkdir -p {folder} && cd {folder} && "
                "tar -xpzo --warning=no-timestamp --warning=no-unknown-keyword -f -",
                stdin=archive,
            )
    except CommandError as error:
        raise transfer.refused(f"{tree.root} could not be pushed to {dest}", error) from error


def changes(stream: Streamer, tree: Tree, dest: str) -> Changes:
    """What differs in the guest's folder `dest` from the tree that `push` has put there.

    Costs one command in the guest. A file whose size and time are right is taken for the same.

    Raises:
        TransferError: the guest does not tell what it has.
    """
    there = _listing(stream, dest)
    written = {
        path: entry
        for path, entry in there.items()
        if entry.kind == "file" and _version(entry) != _version(tree.entries.get(path))
    }
    removed = [
        path for path, entry in tree.entries.items() if entry.kind == "file" and path not in there
    ]
    return Changes(written, tuple(removed))


def _version(entry: TreeEntry | None) -> object:
    """What two entries of the same content have in common: a file's time to the microsecond."""
    return entry and (entry.kind, entry.size, entry.mtime_ns // 1000)


# -- what the guest has -------------------------------------------------------------------------


def _listing(stream: Streamer, dest: str) -> dict[str, TreeEntry]:
    """What is in a folder of the guest, which is made if need be.

    Raises:
        TransferError: the guest cannot tell, or what it tells cannot be.
    """
    folder = transfer.quoted(dest)
    listing = bytearray()

    def collect(data: bytes) -> None:
        listing.extend(data)
        if len(listing) > _MAX_LISTING:
            raise TransferError(
                f"the guest's listing of {dest} has more than {_MAX_LISTING // MIB} MiB",
                remedy="there is far more than the project in that folder",
            )

    script = (
        f"LC_ALL=C; export LC_ALL; mkdir -p {folder} && cd {folder} && find . -printf '{_FORMAT}'"
    )
    try:
        stream(script, stdout=collect)
    except CommandError as error:
        # With 1, find says that it could not look everywhere: what it saw is right.
        if error.result.returncode != 1 or not listing:
            raise transfer.refused(f"the guest cannot list its folder {dest}", error) from error
    return _parsed(bytes(listing), dest)


def _parsed(listing: bytes, dest: str) -> dict[str, TreeEntry]:
    """The entries of a guest's listing, which is not trusted.

    Raises:
        TransferError: it is not one.
    """
    there: dict[str, TreeEntry] = {}
    position = 0
    while record := _RECORD.match(listing, position):
        letter, size, seconds, fraction, path = record.groups()
        if path and not {b"", b".", b".."}.isdisjoint(path.split(b"/")):
            break  # it leads out of the folder
        position = record.end()
        entry = TreeEntry(kind="other")
        if letter == b"f":
            mtime = int(seconds) * 1_000_000_000 + int((fraction or b"")[:9].ljust(9, b"0"))
            entry = TreeEntry(kind="file", size=int(size), mtime_ns=mtime)
        there[os.fsdecode(path)] = entry
    if position < len(listing) or there.pop("", None) is None:  # the folder itself is listed, too
        raise TransferError(
            f"the guest's listing of {dest} makes no sense",
            details=f"at byte {position}: {listing[position : position + 100]!r}",
            remedy="the guest's `find` has to be GNU's",
        )
    return there


# -- the way over -------------------------------------------------------------------------------


def _pack(tree: Tree, file: IO[bytes]) -> None:
    """Write a tree as an archive.

    Raises:
        TransferError: a file changes or vanishes meanwhile, or cannot be read.
    """
    with (
        gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed,
        # Of the formats, only this one has times with fractions.
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path, entry in tree.entries.items():
            try:
                _add(archive, f"{tree.root}/{path}", f"./{path}", entry)
            except BrokenPipeError:
                raise  # the guest takes no more, and tells why
            except OSError as error:
                raise TransferError(
                    f"{shown(tree.root / path)} changed while it was pushed to a guest: "
                    f"{error.strerror or error}",
                    remedy="run again; what is written during a run belongs into .gitignore",
                ) from error


def _add(archive: tarfile.TarFile, place: str, name: str, entry: TreeEntry) -> None:
    """Add a file, a link or a folder to an archive.

    Raises:
        OSError: it is no longer what it was, or cannot be read.
    """
    member = tarfile.TarInfo(name)
    member.mode = entry.mode
    if entry.kind != "file":
        _stamp(member, time.time_ns())  # a time it had before would hide news from importlib
        member.type = tarfile.DIRTYPE
        if entry.kind == "link":
            member.type = tarfile.SYMTYPE
            member.linkname = os.readlink(place)  # noqa: PTH115  # as it is written
        archive.addfile(member)
        return
    # Neither a link nor a pipe that took its place is read, or waited for.
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as content:  # noqa: PTH123  # a descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no longer a file")
        member.size, member.mode = status.st_size, status.st_mode & 0o777
        _stamp(member, max(0, status.st_mtime_ns))
        archive.addfile(member, content)
        after = os.fstat(descriptor)
        if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            raise OSError("it was written to")


def _stamp(member: tarfile.TarInfo, mtime_ns: int) -> None:
    """Give it a time, nanoseconds since 1970; tarfile's own way rounds it."""
    seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
    member.mtime = seconds
    member.pax_headers = {"mtime": f"{seconds}.{nanoseconds:09}"}
