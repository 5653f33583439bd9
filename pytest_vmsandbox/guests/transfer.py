"""Files and trees into and out of a guest, as streams through a program there.

A file goes through ``cat``, a tree through ``tar``: every guest has both, and neither side holds
more than a chunk in memory. The guest is not trusted: what it sends is written beside the
destination first, below a folder that it cannot get out of.
"""

from __future__ import annotations

import gzip
import io
import os
import shlex
import shutil
import stat
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, cast

from pytest_vmsandbox.core.errors import CommandError, TransferError

_CHUNK = 1 << 18
_MAX_READ = 1 << 18  # bytes; more is read at once only of a header, and none is that long


class Streamer(Protocol):
    """Runs a shell script in the guest with streams attached (`Guest` has it)."""

    def __call__(
        self,
        script: str,
        *,
        stdin: IO[bytes] | None = None,
        stdout: Callable[[bytes], object] | None = None,
    ) -> None:
        """Run the script.

        Raises:
            CommandError: it returned non-zero.
        """


def push(stream: Streamer, source: Path, dest: str) -> None:
    """Copy a file or a tree into the guest; see `Guest.push`.

    Raises:
        TransferError: `source` does not exist, holds something that cannot be copied, or the
            guest cannot take it (its message tells why).
    """
    check_guest_path(dest)
    try:
        mode = source.stat().st_mode
        if stat.S_ISDIR(mode):
            _push_tree(stream, source, dest)
        elif stat.S_ISREG(mode):
            with source.open("rb") as file:
                push_stream(stream, file, dest, name=source.name, mode=stat.S_IMODE(mode))
        else:
            raise TransferError(f"{source} is neither a file nor a folder")
    except OSError as error:
        raise TransferError(
            f"{source} cannot be read: {error}", remedy="the path is one of this machine"
        ) from error
    except CommandError as error:
        raise refused(f"{source} could not be pushed to {dest}", error) from error


def push_stream(
    stream: Streamer, file: IO[bytes], dest: str, *, name: str | None, mode: int
) -> None:
    """Copy an open file into the guest, under `name` if `dest` is a folder there.

    Raises:
        CommandError: it cannot be written, or `dest` is a folder and there is no `name`.
    """
    if name is None:
        into = '[ -d "$d" ] && { echo "$d is a folder" >&2; exit 1; }; '
    else:
        into = (
            'case "$d" in */) mkdir -p "$d";; esac; '
            f'[ -d "$d" ] && d="${{d%/}}/"{shlex.quote(name)}; '
        )
    # Written beside its place and then renamed: nobody in the guest sees half a file.
    script = (
        f"d={quoted(dest)}; {into}"
        'p=$(dirname -- "$d"); [ -d "$p" ] || mkdir -p "$p"; '
        't="$p/.vmsandbox.$$"; '
        f'cat > "$t" && chmod {mode:o} "$t" && mv -f "$t" "$d" || {{ rm -f "$t"; exit 1; }}'
    )
    stream(script, stdin=file)


def pull(stream: Streamer, source: str, dest: str | os.PathLike[str]) -> None:
    """Copy a file or a tree out of the guest; see `Guest.pull`.

    Raises:
        TransferError: `source` does not exist, or `dest` cannot be written.
    """
    check_guest_path(source)
    name = PurePosixPath(source).name or "root"
    inside = os.fspath(dest).endswith("/")
    target = Path(dest)
    try:
        (target if inside else target.parent).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".vmsandbox-", dir=target if inside else target.parent
        ) as scratch:
            got = _pull_into(stream, source, Path(scratch))
            is_tree = got.is_dir() and not got.is_symlink()
            if inside or (target.is_dir() and not is_tree):
                target /= name
            _move(got, target)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise TransferError(
            f"{source} could not be pulled: the guest sent a damaged or unsafe archive: {error}"
        ) from error
    except OSError as error:
        raise TransferError(f"{source} could not be pulled to {target}: {error}") from error
    except CommandError as error:
        raise refused(f"{source} could not be pulled from the guest", error) from error


def _move(source: Path, target: Path) -> None:
    """Move a file or a tree into its place, into a folder that is there already."""
    if source.is_dir() and not source.is_symlink():
        mode = stat.S_IMODE(source.stat().st_mode)
        source.chmod(mode | 0o700)
        there = target.is_dir()
        target.mkdir(exist_ok=True)
        for entry in source.iterdir():
            place = target / entry.name
            if place.is_symlink():  # the guest may have sent it before, to get out of `target`
                place.unlink()
            _move(entry, place)
        if not there:  # a folder of the user's stays as it is
            target.chmod(mode)
    else:
        source.replace(target)


def _push_tree(stream: Streamer, source: Path, dest: str) -> None:
    target = quoted(dest)
    if dest.endswith("/"):
        target = quoted(dest + source.resolve().name)
    script = f"mkdir -p {target} && tar -xpzo -C {target} -f -"

    def pack(file: IO[bytes]) -> None:
        with (
            gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.GNU_FORMAT) as archive,
        ):
            archive.add(source, ".", filter=_anonymous)

    with written_by(pack) as archive:
        stream(script, stdin=archive)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what has no meaning in the guest: owners, sockets."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _pull_into(stream: Streamer, source: str, scratch: Path) -> Path:
    """Pull `source` into `scratch`; the path of what came."""
    path = PurePosixPath(source)
    folder, name = str(path.parent), path.name
    if not name:  # the guest's root folder, or «.»
        folder, name = source, "."
    name = name if name == "." else "./" + name  # a name may begin with a dash
    script = f"cd {quoted(folder)} && tar -czf - {shlex.quote(name)}"
    failure: list[BaseException] = []

    def unpack(file: IO[bytes]) -> None:
        # tarfile's own way of reading gzip expands a block of zeros a thousandfold in memory.
        with gzip.GzipFile(fileobj=file, mode="rb") as packed:
            extract(cast("IO[bytes]", packed), scratch)

    with _read_by(unpack, failure) as write:
        stream(script, stdout=write)
    if failure:
        raise failure[0]
    return scratch / name if name != "." else scratch


def extract(file: IO[bytes], folder: Path) -> None:
    """Unpack an archive that is not trusted.

    Names that leave `folder` are refused, devices and pipes too. Symbolic links are made last, so
    nothing is written through one; they keep what they say, wherever it points.

    Raises:
        tarfile.TarError: something in it is refused.
    """
    try:
        with tarfile.open(fileobj=_Bounded(file), mode="r:") as archive:
            _extract(archive, folder)
    except (OverflowError, RecursionError, ValueError) as error:  # odd times, names, nesting
        raise tarfile.TarError(str(error)) from error


class _Bounded(io.RawIOBase):
    """Reads a stream forward; no header of an archive can make one read a long one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = self._file.read(size)
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._position:
            raise tarfile.ReadError("the archive leads backwards")
        while self._position < offset and self.read(min(_CHUNK, offset - self._position)):
            pass
        return self._position


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    links: list[tarfile.TarInfo] = []
    modes: list[tuple[Path, int]] = []
    for member in archive:
        parts = PurePosixPath(member.name).parts
        if member.name.startswith("/") or ".." in parts:
            raise tarfile.TarError(f"{member.name!r} leads out of the folder")
        if member.issparse():  # a few bytes could stand for any number of them
            raise tarfile.TarError(f"{member.name!r} is a sparse file")
        path = folder.joinpath(*parts)
        if member.isdir():
            path.mkdir(parents=True, exist_ok=True)
            modes.append((path, member.mode & 0o777))
        elif member.issym():
            links.append(member)
        elif member.isreg() or member.islnk():
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.islnk():
                _hard_link(member, folder, path)
                continue
            content = archive.extractfile(member)
            assert content is not None
            with path.open("xb") as file:
                shutil.copyfileobj(content, file, _CHUNK)
            path.chmod(member.mode & 0o777)
            os.utime(path, (member.mtime, member.mtime))
        else:
            raise tarfile.TarError(f"{member.name!r} is neither a file, a folder nor a link")
    named = [(folder.joinpath(*PurePosixPath(it.name).parts), it.linkname) for it in links]
    for path, _ in named:  # all folders before the first link: none is found through a link
        path.parent.mkdir(parents=True, exist_ok=True)
    for path, link in named:
        path.symlink_to(link)
    for path, mode in reversed(modes):  # the innermost first: a folder may be read-only
        path.chmod(mode)


def _hard_link(member: tarfile.TarInfo, folder: Path, path: Path) -> None:
    parts = PurePosixPath(member.linkname).parts
    if member.linkname.startswith("/") or ".." in parts:
        raise tarfile.TarError(f"{member.name!r} is a link out of the folder")
    os.link(folder.joinpath(*parts), path, follow_symlinks=False)


@contextmanager
def written_by(work: Callable[[IO[bytes]], None]) -> Iterator[IO[bytes]]:
    """A file to read from, whose content a thread writes meanwhile.

    What `work` raises is raised by the read that would have found the end.
    """
    read_fd, write_fd = os.pipe()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with os.fdopen(write_fd, "wb") as file:
                work(file)
        except BrokenPipeError:
            pass  # the reader has stopped, and knows why
        except BaseException as error:  # noqa: BLE001  # raised again below, in the caller
            failure.append(error)

    thread = threading.Thread(target=run, name="vmsandbox-pack", daemon=True)
    with os.fdopen(read_fd, "rb", buffering=0) as file:
        thread.start()
        try:
            yield cast("IO[bytes]", _CheckedReader(file, failure, thread))
        finally:
            file.close()
            thread.join()


class _CheckedReader(io.RawIOBase):
    """Reads a pipe; its end is an error if the writer failed, so no half archive looks whole."""

    def __init__(
        self, file: io.FileIO, failure: list[BaseException], writer: threading.Thread
    ) -> None:
        self._file, self._failure, self._writer = file, failure, writer

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if not data:
            self._writer.join()
            if self._failure:
                raise self._failure[0]
        return data or b""


@contextmanager
def _read_by(
    work: Callable[[IO[bytes]], None], failure: list[BaseException]
) -> Iterator[Callable[[bytes], object]]:
    """A function that hands data to a thread which reads it as a file."""
    read_fd, write_fd = os.pipe()

    def run() -> None:
        with os.fdopen(read_fd, "rb") as file:
            try:
                work(file)
            except BaseException as error:  # noqa: BLE001  # raised again by the caller
                failure.append(error)
            while file.read(_CHUNK):  # let the sender finish
                pass

    thread = threading.Thread(target=run, name="vmsandbox-unpack", daemon=True)
    thread.start()
    try:
        with os.fdopen(write_fd, "wb", buffering=0) as file:

            def write(data: bytes) -> None:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]

            yield write
    finally:
        thread.join()


def quoted(path: str) -> str:
    """A path of the guest as a word of a script; it does not look like an option."""
    return shlex.quote(path if path.startswith("/") else f"./{path}")


def check_guest_path(path: str) -> None:
    """Refuse what names nothing.

    Raises:
        TransferError: `path` is empty or has a NUL.
    """
    if not path or "\0" in path:
        raise TransferError(f"{path!r} is not a path in the guest")


def refused(what: str, error: CommandError) -> TransferError:
    """The error for a script of ours that failed in the guest; `what` is its first line."""
    remedy = ""
    if "No space left" in str(error):
        remedy = "the guest's disk is full; ask for a larger one: disk='16GiB'"
    return TransferError(what, details=error.details, remedy=remedy)
