"""What can happen to a file in the cache, for tables of tests."""

from collections.abc import Callable
from pathlib import Path

_ZEROS = 4096


def _truncate(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def _zero(file: Path) -> None:
    """Write zeros over some KiB, from the first byte on that is none."""
    data = file.read_bytes()
    start = len(data) - len(data.lstrip(b"\0"))
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(bytes(min(_ZEROS, len(data) - start)))


def _flip(file: Path) -> None:
    """Change one bit of a byte in the middle of what is not zero."""
    data = file.read_bytes().rstrip(b"\0")
    start = len(data) - len(data.lstrip(b"\0"))
    at = (start + len(data)) // 2
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(bytes([data[at] ^ 0x10]))


KINDS: dict[str, Callable[[Path], object]] = {
    "truncated": _truncate,
    "zeroed": _zero,
    "flipped": _flip,
    "removed": Path.unlink,
}


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files in a folder, by name."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
