"""Copies files and folders into and out of a guest, as streams through a program there.

A file goes through ``cat``, a folder through ``tar``. Every guest has both, and neither side holds more
than a chunk in memory. Files may change meanwhile: each is copied as it was read. The guest is not
trusted: what it sends is first written to a folder beside the destination, which it cannot leave.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shlex
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, TypeVar, cast

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.core.errors import CommandError, TransferError
from pytest_vmsandbox.core.spec import MIB, format_size
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.guests.reaching import archive
from pytest_vmsandbox.guests.reaching.commands import Sink, StrPath, word

T = TypeVar("T")
_Parts = list[tuple[int, int]]  # of a file: the first block of each, and the one after its last
_CHUNK = 1 << 18
_MAX_TEXT = 256 * MIB  # of a file that is read at once
_BLOCK = 4096  # bytes; holes begin and end at multiples of it
_MIN_HOLE = 16  # blocks; shorter holes are sent as zeros
_MAX_HOLES = 256  # for each file; we keep the largest, and each takes one program in the guest
_NOT_REGULAR = 65  # the script's exit status if holes cannot be made
_MAX_HEADER = 100
_HEADER = re.compile(rb"(?:file (?P<mode>[0-7]{1,5}) (?P<mtime>-?[0-9]{1,11})|tree)\n")
_NAMED = 5  # names of what was left out; the others are counted
# Messages of tar about a folder that changes, and about what it leaves out.
_CHANGED = re.compile(
    r"tar: .*(: No such file or directory|: File removed before we read it"
    r"|: file changed as we read it|: File shrank by .*|exit delayed from previous errors"
    r"|Exiting with failure status due to previous errors)"
)
_LEFT_OUT = re.compile(
    r"(?:tar: (.*): (?:socket ignored|unknown file type)|(cp: .*)(?<!: No such file or directory))"
)
# Follows a link ``$d`` to its target, which may be missing. We cannot use `readlink -f` of busybox: it
# resolves a link to a missing target relative to the working folder.
_FOLLOW = (
    'l=$d; i=0; while [ -L "$d" ]; do '
    'i=$((i + 1)); [ $i -le 40 ] || { echo "$l is a link that leads in a circle" >&2; exit 1; }; '
    'r=$(readlink -n "$d" && echo /) || exit 1; r=${r%/}; '
    'case "$r" in /*) d=$r;; *) d=${d%/*}/$r;; esac; '
    '[ -d "${d%/*}/" ] || { echo "$l is a link into a folder that does not exist" >&2; exit 1; }; '
    "done; "
)
_CUT = "short read"  # busybox's tar ends in the middle when a file becomes shorter


class Streamer(Protocol):
    """Runs a shell script in the guest with streams attached (`Guest` has it)."""

    def __call__(
        self, script: str, *, stdin: IO[bytes] | None = None, stdout: Sink | None = None
    ) -> str | None:
        """Run the script.

        Returns:
            What it wrote to its standard error.

        Raises:
            CommandError: it returned non-zero.
        """


# -- push -------------------------------------------------------------------------------------------


def push(stream: Streamer, source: Path, dest: StrPath) -> list[str]:
    """Copy a file or a tree into the guest; see `Guest.push`.

    Returns:
        What was left out.

    Raises:
        TransferError: `source` does not exist, holds something that cannot be copied, or the
            guest cannot take it (its message tells why).
    """
    dest = guest_path(dest)
    try:
        mode = source.stat().st_mode
        if stat.S_ISDIR(mode):
            return _push_tree(stream, source, dest)
        if not stat.S_ISREG(mode):
            raise TransferError(
                f"{source} is neither a file nor a folder", remedy="push a file or a folder"
            )
        into = (
            'case "$d" in */) mkdir -p "$d";; esac; '
            f'[ -d "$d" ] && d="${{d%/}}/"{shlex.quote(source.name)}; '
        )
        _push_file(stream, source, dest, into=into)
    except OSError as error:
        raise TransferError(
            f"{source} cannot be read: {error}",
            remedy="check the path: the source of push() is a path on this machine",
        ) from error
    except CommandError as error:
        raise refused(f"{source} could not be pushed to {dest}", error) from error
    return []


def write_text(stream: Streamer, dest: StrPath, text: str) -> None:
    """Write a file; see `Guest.write_text`.

    Raises:
        TransferError: it cannot be written.
    """
    try:
        push_text(stream, text, dest)
    except CommandError as error:
        raise refused(f"{dest} cannot be written", error) from error


def push_text(stream: Streamer, text: str, dest: StrPath) -> None:
    """Write a file, as `write_text` does.

    Raises:
        CommandError: it cannot be written, or `dest` is a folder.
    """
    finish = (
        'if [ -f "$d" ]; then chown "$(stat -c %u:%g "$d")" "$t" && chmod "$(stat -c %a "$d")" "$t"; '
        'else chmod 644 "$t"; fi'
    )
    into = 'case "$d" in */) echo "$d is a folder" >&2; exit 1;; esac; '
    script = _write_script(guest_path(dest), into=into, receive='cat > "$1"', finish=finish)
    stream(script, stdin=io.BytesIO(text.encode()))


def read_text(stream: Streamer, source: StrPath) -> str:
    """The content of a file; see `Guest.read_text`.

    Raises:
        TransferError: it cannot be read.
    """
    source = guest_path(source)
    data = bytearray()
    script = (
        f'n={quoted(source)}; if [ -e "$n" ] && [ ! -f "$n" ]; then '
        f'echo "$n is not a regular file" >&2; exit 1; fi; exec head -c {_MAX_TEXT + 1} "$n"'
    )
    try:
        stream(script, stdout=data.extend)
        if len(data) > _MAX_TEXT:
            raise TransferError(
                f"{source} is larger than {format_size(_MAX_TEXT)}, the limit of read_text()",
                remedy="use vm.pull(), which has no limit",
            )
        return data.decode()
    except CommandError as error:
        raise refused(f"{source} cannot be read", error) from error
    except UnicodeDecodeError as error:
        raise TransferError(
            f"{source} is not UTF-8: {error}", remedy="use vm.pull(), which copies any file"
        ) from error


def _push_file(stream: Streamer, source: Path, dest: str, *, into: str = "") -> None:
    with source.open("rb") as file:
        status = os.fstat(file.fileno())
        finish = (
            f'chmod {stat.S_IMODE(status.st_mode):o} "$t" && touch -d @{int(status.st_mtime)} "$t"'
        )
        if (parts := _parts(file)) is not None:
            # If holes cannot be made, as in a device, send everything.
            only = f'[ -e "$d" ] && [ ! -f "$d" ] && exit {_NOT_REGULAR}; '
            receive = _receive_parts(parts, status.st_size)
            script = _write_script(dest, into=into + only, receive=receive, finish=finish)
            try:
                with written_by(partial(_send_parts, parts, file)) as stdin:
                    stream(script, stdin=stdin)
            except CommandError as error:
                if error.result.returncode != _NOT_REGULAR:
                    raise
            else:
                return
        stream(_write_script(dest, into=into, receive='cat > "$1"', finish=finish), stdin=file)


def _write_script(dest: str, *, into: str, receive: str, finish: str) -> str:
    """A script that writes its input to a file.

    A file is written beside its place and then renamed, so nobody in the guest sees half of it. It is
    written in place if no file can be made there (`/proc`, a read-only folder), or if the place is not a
    file (a device, a pipe). Symbolic links are followed.

    Args:
        dest: the file, ``$d`` in the other arguments.
        into: makes ``$d`` the path of the file itself.
        receive: writes the input to the file ``$1``.
        finish: gives the new file ``$t`` its mode.
    """
    return (
        f"receive() {{ {receive}; }}; d={quoted(dest)}; {into}"
        '[ -d "$d" ] && { echo "$d is a folder" >&2; exit 1; }; '
        f'if [ -e "$d" ] && [ ! -f "$d" ]; then receive "$d"; exit; fi; {_FOLLOW}'
        'p="${d%/*}/"; [ -d "$p" ] || mkdir -p "$p"; t="$p.vmsandbox.$$"; '
        'if { true > "$t"; } 2>/dev/null; then trap \'rm -f "$t"\' EXIT; '
        f'receive "$t" || exit 1; {{ {finish}; }} && mv -f "$t" "$d" || '
        '{ [ -f "$d" ] && cat "$t" > "$d"; }; '
        'elif [ -e "$d" ]; then receive "$d"; else true > "$d" && receive "$d"; fi'
    )


def _receive_parts(parts: _Parts, size: int) -> str:
    """The part of a script that writes what `_send_parts` sends to the file ``$1``.

    For each part, a program reads exactly that part from the stream.
    """
    words = " ".join(f"{first}:{last - first}" for first, last in parts)
    return (
        f'true > "$1" || return 1; for p in {words}; do e=$(dd bs={_BLOCK} seek="${{p%:*}}" count="${{p#*:}}" '
        'iflag=fullblock conv=notrunc of="$1" 2>&1) || { echo "$e" >&2; return 1; }; done; '
        f'truncate -s {size} "$1"'
    )


def _send_parts(parts: _Parts, file: IO[bytes], sink: IO[bytes]) -> None:
    """Write all parts, in whole blocks, even if the file has become shorter."""
    for first, last in parts:
        for start in range(first * _BLOCK, last * _BLOCK, _CHUNK):
            size = min(_CHUNK, last * _BLOCK - start)
            sink.write(os.pread(file.fileno(), size, start).ljust(size, b"\0"))


def _parts(file: IO[bytes]) -> _Parts | None:
    """The parts of a file that are no holes; None if it has no large holes."""
    status = os.fstat(file.fileno())
    if status.st_blocks * 512 + _MIN_HOLE * _BLOCK > status.st_size:
        return None
    blocks = -(-status.st_size // _BLOCK)
    data = [(start // _BLOCK, -(-stop // _BLOCK)) for start, stop in integrity.extents(file)]
    os.lseek(file.fileno(), 0, os.SEEK_SET)  # the caller reads from the beginning
    holes = [(first, last) for first, last in _between(data, blocks) if last - first >= _MIN_HOLE]
    largest = sorted(holes, key=lambda hole: hole[0] - hole[1])[:_MAX_HOLES]
    return _between(sorted(largest), blocks) if largest else None


def _between(spans: _Parts, end: int) -> _Parts:
    """The parts of the range from 0 to `end` between `spans`, which are in order."""
    edges = [0, *chain.from_iterable(spans), end]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return [(first, last) for first, last in gaps if first < last]


def _push_tree(stream: Streamer, source: Path, dest: str) -> list[str]:
    name, source = source.name, source.resolve()  # a link to a folder is followed
    if dest.endswith("/"):
        dest += source.name if name in {"", ".."} else name
    sparse = {name: path for path, name in archive.paths(source) if _has_holes(path)}
    for name, path in sparse.items():  # before the archive, which sets the modes of folders
        _push_file(stream, path, f"{dest}/{name.removeprefix('./')}")
    left_out: list[str] = []

    def pack(file: IO[bytes]) -> None:
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed:
            left_out.extend(archive.pack(source, cast("IO[bytes]", packed), apart=sparse))

    target = quoted(dest)
    with written_by(pack) as packed:
        stream(f"mkdir -p {target} && tar -xpzo -C {target} -f -", stdin=packed)
    return left_out


def _has_holes(path: Path) -> bool:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_blocks * 512 >= status.st_size:
            return False
        with path.open("rb") as file:
            return _parts(file) is not None
    except FileNotFoundError:  # it was removed meanwhile
        return False


# -- pull -------------------------------------------------------------------------------------------


def pull(stream: Streamer, source: StrPath, dest: StrPath) -> list[str]:
    """Copy a file or a tree out of the guest; see `Guest.pull`.

    Returns:
        What was left out.

    Raises:
        TransferError: `source` does not exist, or `dest` cannot be written.
    """
    source = guest_path(source)
    name = PurePosixPath(source).name or "root"
    inside = os.fspath(dest).endswith("/")
    target = Path(dest)
    try:
        folder = target if inside else target.parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".vmsandbox-", dir=folder) as scratch:
            got, left_out = _pull_into(stream, source, Path(scratch), special=_is_private(folder))
            is_tree = got.is_dir() and not got.is_symlink()
            if inside or (target.is_dir() and not is_tree):
                target /= name
            _move(got, target)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise TransferError(
            f"{source} could not be pulled, because the guest sent a damaged or unsafe archive: {error}",
            remedy="check whether `tar` in the guest works. vm.shell() can make an archive to pull as a file",
        ) from error
    except OSError as error:
        raise TransferError(f"{source} could not be pulled to {target}: {error}") from error
    except CommandError as error:
        raise refused(f"{source} could not be pulled from the guest", error) from error
    return left_out


def _is_private(folder: Path) -> bool:
    """Whether other users of this machine cannot enter a folder.

    Only in such a folder, setuid bits are kept.
    """
    folder = folder.resolve()
    return any(
        above.stat().st_uid in (0, os.geteuid()) and not above.stat().st_mode & 0o011
        for above in (folder, *folder.parents)
    )


def _move(source: Path, target: Path) -> None:
    """Move a file or a folder into its place. A folder is merged with an existing one."""
    if source.is_dir() and not source.is_symlink():
        mode = stat.S_IMODE(source.stat().st_mode)
        source.chmod(mode | 0o700)
        there = target.is_dir()
        target.mkdir(exist_ok=True)
        for entry in source.iterdir():
            place = target / entry.name
            if place.is_symlink():  # the guest may have sent it in order to get out of `target`
                place.unlink()
            _move(entry, place)
        if not there:  # an existing folder keeps its mode
            target.chmod(mode)
    else:
        source.replace(target)


def _pull_into(
    stream: Streamer, source: str, scratch: Path, *, special: bool, copied: bool = False
) -> tuple[Path, list[str]]:
    """Pull `source` into `scratch`. Returns the path of the copy, and what was left out."""
    path = PurePosixPath(source)
    parent, name = str(path.parent), path.name
    if not name:  # the guest's root folder, or «.»
        parent, name = source, "."
    folder = scratch / ("copied" if copied else "direct")
    folder.mkdir()
    script = _read_script(parent, name if name == "." else "./" + name, copied=copied)
    failed: CommandError | None = None
    with _read_by(partial(_receive, folder, name, special)) as (write, received):
        try:
            said = stream(script, stdout=write) or ""
        except CommandError as error:
            said, failed = str(error.result.stderr), error
    if failed is not None:
        if _CUT in said and not copied:
            return _pull_into(stream, source, scratch, special=special, copied=True)
        if not _has_only_changed(said):  # for a file there are no messages of tar
            raise failed
    left_out = [next(filter(None, found.groups())) for found in _LEFT_OUT.finditer(said)]
    return folder / name, [*received.result(), *left_out]


def _read_script(folder: str, name: str, *, copied: bool) -> str:
    """A script that writes a header, and then a file, or an archive of anything else.

    It also archives a copy in a file system without blocks, such as `/proc`, whose files do not know
    their size.

    Args:
        folder: the folder that contains it.
        name: its name there, which does not look like an option.
        copied: whether to archive a copy, which does not change.
    """
    blocks = "*" if copied else "0"
    return (
        f"LC_ALL=C; export LC_ALL; cd {quoted(folder)} && n={shlex.quote(name)} || exit; "
        'if [ -f "$n" ] && [ ! -L "$n" ]; then stat -c "file %a %Y" "$n" && exec cat "$n"; '
        'elif [ -L "$n" ] || [ -d "$n" ]; then echo tree; '
        f'case $([ -L "$n" ] || stat -f -c %b "$n") in {blocks}) '
        "c=$(mktemp -d) && trap 'rm -rf \"$c\"' EXIT || exit; "
        'cp -RPp "$n" "$c"; cd "$c";; esac; '
        'tar -czf - "$n"; '
        'elif [ -e "$n" ]; then echo "$n is neither a file nor a folder" >&2; exit 1; '
        'else ls -d "$n"; exit 1; fi'
    )


def _has_only_changed(said: str) -> bool:
    """Whether tar only complains that the folder changes."""
    lines = said.splitlines()
    return bool(lines) and all(
        _CHANGED.fullmatch(line) or _LEFT_OUT.fullmatch(line) for line in lines
    )


def _receive(folder: Path, name: str, special: bool, file: IO[bytes]) -> list[str]:
    """Receive the output of `_read_script`. Returns what was left out.

    Raises:
        tarfile.TarError: the output is invalid.
    """
    header = _HEADER.fullmatch(file.readline(_MAX_HEADER))
    if header is None:
        raise tarfile.ReadError("it has no header")
    if header["mode"] is not None:
        mode, mtime = int(header["mode"], 8), int(header["mtime"])
        return archive.receive(file, folder / name, mode=mode, mtime=mtime, special=special)
    # tarfile itself would expand a gzip block of zeros a thousandfold in memory.
    with gzip.GzipFile(fileobj=file, mode="rb") as packed:
        return archive.extract(cast("IO[bytes]", packed), folder, special=special)


def in_words(left_out: Sequence[str]) -> str:
    """What was left out, for people. Names may come from a guest."""
    words = [printable(name) for name in left_out[:_NAMED]]
    if len(left_out) > _NAMED:
        words.append(f"and {len(left_out) - _NAMED} more")
    return ", ".join(words)


# -- streams ----------------------------------------------------------------------------------------


@contextmanager
def written_by(work: Callable[[IO[bytes]], None]) -> Iterator[IO[bytes]]:
    """A file to read from, while a thread writes its content.

    An error of `work` is raised by the read at the end.
    """
    read_fd, write_fd = os.pipe()

    def run() -> None:
        # If the reader has stopped, it knows why.
        with suppress(BrokenPipeError), os.fdopen(write_fd, "wb") as file:
            work(file)

    with (
        ThreadPoolExecutor(1, thread_name_prefix="vmsandbox-pack") as pool,
        os.fdopen(read_fd, "rb", buffering=0) as file,
    ):
        yield cast("IO[bytes]", _CheckedReader(file, pool.submit(run)))


class _CheckedReader(io.RawIOBase):
    """Reads a pipe. If the writer failed, its end is an error, so no partial archive looks complete."""

    def __init__(self, file: io.FileIO, written: Future[None]) -> None:
        self._file, self._written = file, written

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if not data:
            self._written.result()
        return data or b""


@contextmanager
def _read_by(work: Callable[[IO[bytes]], T]) -> Iterator[tuple[Sink, Future[T]]]:
    """A function that passes data to a thread, which reads it as a file; and the thread's result."""
    read_fd, write_fd = os.pipe()

    def run() -> T:
        with os.fdopen(read_fd, "rb") as file:
            try:
                return work(file)
            finally:
                while file.read(_CHUNK):  # let the sender finish
                    pass

    with (
        ThreadPoolExecutor(1, thread_name_prefix="vmsandbox-unpack") as pool,
        os.fdopen(write_fd, "wb") as file,
    ):
        yield file.write, pool.submit(run)


def quoted(path: str) -> str:
    """A path in the guest as a word of a script. It does not look like an option."""
    return shlex.quote(path if path.startswith("/") else f"./{path}")


def guest_path(path: StrPath) -> str:
    """A path in the guest as text.

    Raises:
        TypeError: it is neither a str nor a path.
        TransferError: it is empty, or contains a NUL.
    """
    text = word(path, "a path in the guest")
    if not text or "\0" in text:
        raise TransferError(
            f"{text!r} is not a path in the guest",
            remedy="use a path that is not empty and has no NUL",
        )
    return text


def refused(what: str, error: CommandError) -> TransferError:
    """The error for our script that failed in the guest. `what` is its first line."""
    remedy = ""
    if "No space left" in str(error):
        remedy = "the guest's disk is full: use a larger one, for instance disk='16GiB'"
    return TransferError(what, details=error.details, remedy=remedy)
