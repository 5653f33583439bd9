"""Detects changed files in the cache: digests of files, and records with a digest of their own."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 20
_DIGEST = "seal"  # earlier versions called it so in their files


def write_record(path: Path, content: Mapping[str, object]) -> dict[str, Any]:
    """Write values and their digest to a file, as JSON.

    Returns:
        The values as `read_record` will return them.
    """
    kept: dict[str, Any] = json.loads(json.dumps(content, default=os.fspath))
    path.write_text(json.dumps({**kept, _DIGEST: _digest(kept)}, indent=1) + "\n", encoding="utf-8")
    return kept


def read_record(path: Path) -> dict[str, Any]:
    """Read the values that `write_record` has written.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has changed since.
    """
    content: Any = None
    with suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop(_DIGEST, None) != _digest(content):
        raise ValueError(f"{path.name} has changed on the disk")
    return content


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damage(folder: Path, digests: Mapping[str, str]) -> str:
    """Which file of a folder does not have its digest; empty if all have it."""
    for name, digest in digests.items():
        try:
            found = file_digest(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if found != digest:
            return f"{name} has changed on the disk"
    return ""


def file_digest(path: Path) -> str:
    """SHA-256, in hex, of a file's size and of its content without zeros."""
    total = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        total.update(b"%d\n" % os.fstat(file.fileno()).st_size)
        for start, data in chunks(file):
            total.update(b"%d\n" % start)
            total.update(data)
    return total.hexdigest()


def extents(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """The parts of a file that are no holes: where each begins and ends, in bytes."""
    fd, end = file.fileno(), 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: only a hole is left
                raise
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def chunks(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The pieces of a file that are not zero: where each begins, and its bytes.

    A piece has at most 1 MiB. Where the file has holes makes no difference.
    """
    zero = bytes(_CHUNK)
    done = 0
    # List the parts first: reading ahead can turn reserved space after a part into a part.
    for begin, end in list(extents(file)):
        start = max(done, begin - begin % _CHUNK)
        while start < end:
            data = os.pread(file.fileno(), _CHUNK, start)
            if data != zero[: len(data)]:
                yield start, data
            start += _CHUNK
        done = start
