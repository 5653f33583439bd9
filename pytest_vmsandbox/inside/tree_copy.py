"""The copy of a tree in a guest: how it gets there, and how changed files come back.

The guest is not trusted. Nothing is written outside of the project's folder or through a symbolic link.
Files that git, Python or pytest would read as code are written only if `vm_pull` has their exact path.
Everything has a limit.
"""

from __future__ import annotations

import enum
import gzip
import io
import os
import re
import secrets
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast

from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.core.errors import CommandError, ConfigError, TransferError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.guests.reaching import transfer
from pytest_vmsandbox.guests.reaching.archive import extract
from pytest_vmsandbox.guests.reaching.transfer import Streamer
from pytest_vmsandbox.inside.tree import Tree, TreeEntry, is_cache, shown

_MAX_LISTING = 64 * MIB
_FORMAT = r"%y\0%s\0%T@\0%P\0"  # of GNU find; `_RECORD` reads it
_RECORD = re.compile(rb"([A-Za-z?])\0(\d{1,19})\0(-?\d{1,19})(?:\.(\d{1,12}))?\0([^\0]*)\0")

MAX_FILES = 20_000  # of one guest
MAX_FILE = 64 * MIB
MAX_TOTAL = 256 * MIB  # of one guest
_PER_FILE = 8_192  # bytes in an archive for each file, besides its content and name

_CODE_SUFFIXES = frozenset(
    {".py", ".pyc", ".pyd", ".pyi", ".pyo", ".pyw", ".pyx", ".pth", ".so", ".egg-link"}
)
# Files that pytest, a tool that it loads, or Python reads when it starts.
_CODE_NAMES = frozenset(
    {
        *("pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "pyproject.toml"),
        *("tox.ini", "setup.cfg", ".coveragerc", "pyvenv.cfg"),
    }
)


@dataclass(frozen=True)
class Changes:
    """What has changed in a guest's copy of a tree since it went there.

    Attributes:
        written: new files, and files with other content, by path.
        removed: paths of removed files.
    """

    written: Mapping[str, TreeEntry]
    removed: tuple[str, ...]


class Outcome(enum.Enum):
    """What became of a file that a guest has written or removed."""

    BROUGHT = "brought"
    LEFT = "left"  # no pattern selects it
    DIFFERENT = "different"  # somebody else has written other content here meanwhile
    IS_CODE = "code"
    TOO_LARGE = "large"
    UNWRITABLE = "unwritable"  # on this machine; the reason follows the path in parentheses
    IN_THE_WAY = "way"  # a link, or something else that is no file, is in its place here
    REMOVED = "removed"


@dataclass(frozen=True)
class Patterns:
    """Which files come back.

    Args:
        globs: matched against paths relative to the project's folder. ``*`` also matches ``/``, and a
            folder stands for everything in it. The last match decides. With ``!`` in front, the file
            stays in the guest, and is not reported.

    Raises:
        ConfigError: a glob leads out of the project, or into git's folder.
    """

    globs: Sequence[str]

    def __post_init__(self) -> None:
        for glob in self.globs:
            pure = PurePosixPath(glob.removeprefix("!"))
            if not pure.parts or pure.is_absolute() or ".." in pure.parts or ".git" in pure.parts:
                raise ConfigError(
                    f"vm_pull: {glob!r} is not allowed",
                    remedy="use globs of files and folders below the rootdir, relative to it, without '..' "
                    "and '.git'",
                )

    def outcome(self, path: str) -> Outcome | None:
        """What to do with a file; None if it stays in the guest and is not reported."""
        for glob in reversed(self.globs):
            if _fits(path, glob.removeprefix("!")):
                if glob.startswith("!") or _is_of_git(path):
                    return None
                return Outcome.IS_CODE if _is_code(path) and glob != path else Outcome.BROUGHT
        return None if is_cache(path) else Outcome.LEFT


def push(stream: Streamer, tree: Tree, dest: str) -> None:
    """Copy a tree into the folder `dest` of a guest. The folder is made if it is missing.

    The guest's user owns the copy. Files in the folder stay, unless the tree has the same path.

    Raises:
        TransferError: the guest cannot write it, or a file here changes or vanishes meanwhile.
    """
    transfer.guest_path(dest)  # checks it
    try:
        with transfer.written_by(partial(_pack, tree)) as archive:
            tar = "tar -xpzo --warning=no-timestamp --warning=no-unknown-keyword -f -"
            stream(_script(dest, tar), stdin=archive)
    except CommandError as error:
        raise transfer.refused(f"{tree.root} could not be pushed to {dest}", error) from error


def changes(stream: Streamer, tree: Tree, dest: str) -> Changes:
    """The differences between the guest's folder `dest` and the tree that `push` has put there.

    It takes one command in the guest. Files with the same size and time count as unchanged.

    Raises:
        TransferError: the guest cannot list its files.
    """
    there = _listing(stream, dest)
    written = {
        path: entry
        for path, entry in there.items()
        if entry.kind == "file"
        and _version(entry) not in map(_version, (tree.entries.get(path), *tree.sent.get(path, ())))
    }
    removed = [
        path for path, entry in tree.entries.items() if entry.kind == "file" and path not in there
    ]
    return Changes(written, tuple(removed))


def _version(entry: TreeEntry | None) -> object:
    """Equal for entries with the same content. Times count to the microsecond."""
    return entry and (entry.kind, entry.size, entry.mtime_ns // 1000)


def bring_back(
    stream: Streamer, tree: Tree, dest: str, *, patterns: Patterns, since: float
) -> dict[Outcome, list[str]]:
    """Bring back the files that tests wrote in a guest's copy of the tree and that patterns select.

    A file here stays as it is if somebody has written it since the guest got its copy, or since the run
    began.

    Args:
        stream: runs scripts in the guest.
        tree: what was sent.
        dest: its folder in the guest.
        patterns: which files come back.
        since: when the run began, seconds since the epoch.

    Returns:
        The paths of files, by what became of them.

    Raises:
        TransferError: the guest cannot list or send its files.
    """
    changed = changes(stream, tree, dest)
    found: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}
    wanted: dict[str, TreeEntry] = {}
    total = 0
    for path, entry in sorted(changed.written.items()):
        outcome = patterns.outcome(path)
        if outcome is Outcome.BROUGHT:
            total += entry.size
            if entry.size > MAX_FILE or total > MAX_TOTAL or len(wanted) >= MAX_FILES:
                outcome = Outcome.TOO_LARGE
            else:
                wanted[path] = entry
                continue
        if outcome is not None:
            found[outcome].append(path)
    for path in changed.removed:
        if patterns.outcome(path) in (Outcome.BROUGHT, Outcome.IS_CODE):
            found[Outcome.REMOVED].append(path)
    if wanted:
        with tempfile.TemporaryDirectory(prefix="vmsandbox-") as scratch:
            _fetch(stream, dest, wanted, Path(scratch))
            with locked(tree.root, on_busy=lambda: None):  # other workers of xdist also write here
                for path in wanted:
                    try:
                        if outcome := _put(path, Path(scratch), tree, since):
                            found[outcome].append(path)
                    except OSError as error:  # try the other files
                        found[Outcome.UNWRITABLE].append(f"{path} ({error.strerror})")
    return found


# -- what the guest has -------------------------------------------------------------------------


def _script(dest: str, command: str) -> str:
    """A script that runs a command in a folder of the guest. The folder is made if it is missing."""
    folder = transfer.quoted(dest)
    return f"LC_ALL=C; export LC_ALL; mkdir -p {folder} && cd {folder} && {command}"


def _receive(
    stream: Streamer, script: str, stdin: IO[bytes] | None, file: IO[bytes], limit: int, what: str
) -> None:
    """Write the output of a script in the guest to a file.

    Args:
        limit: bytes; more output is an error.
        what: the first line of an error.

    Raises:
        TransferError: the output is too long, or the script fails.
    """

    def take(data: bytes) -> None:
        if file.tell() + len(data) > limit:
            raise TransferError(
                what,
                details=f"the guest sent more than {limit} bytes",
                remedy="check what tests write into the project's folder in the guest: it has too many files, "
                "or a file there grows",
            )
        file.write(data)

    try:
        stream(script, stdin=stdin, stdout=take)
    except CommandError as error:
        # Status 1 of find and tar: they could not read everything. Their output is correct.
        if error.result.returncode != 1 or not file.tell():
            raise transfer.refused(what, error) from error


def _listing(stream: Streamer, dest: str) -> dict[str, TreeEntry]:
    """The entries in a folder of the guest. The folder is made if it is missing.

    Raises:
        TransferError: the guest cannot list it, or its listing is invalid.
    """
    listing, script = io.BytesIO(), _script(dest, f"find . -printf '{_FORMAT}'")
    what = f"the guest cannot list its folder {dest}"
    _receive(stream, script, None, listing, _MAX_LISTING, what)
    return _parsed(listing.getvalue(), dest)


def _parsed(listing: bytes, dest: str) -> dict[str, TreeEntry]:
    """Parse a guest's listing, which is not trusted.

    Raises:
        TransferError: the listing is invalid.
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
            f"the guest's listing of {dest} is invalid",
            details=f"at byte {position}: {listing[position : position + 100]!r}",
            remedy="the guest needs GNU find: use an image that has it",
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
                sent = _add(archive, f"{tree.root}/{path}", f"./{path}", entry)
            except BrokenPipeError:
                raise  # the guest reads no more, and reports why
            except OSError as error:
                raise TransferError(
                    f"{shown(tree.root / path)} changed while it was sent to a guest: "
                    f"{error.strerror or error}",
                    remedy="run the tests again. If something writes this file during runs, add it to "
                    ".gitignore",
                ) from error
            if sent is not None and _version(sent) != _version(entry):
                tree.sent.setdefault(path, []).append(sent)


def _add(archive: tarfile.TarFile, place: str, name: str, entry: TreeEntry) -> TreeEntry | None:
    """Add a file, a link or a folder to an archive.

    Returns:
        A file as it is now.

    Raises:
        OSError: it has changed meanwhile, or cannot be read.
    """
    member = tarfile.TarInfo(name)
    member.mode = entry.mode
    if entry.kind != "file":
        _stamp(member, time.time_ns())  # with an older time, importlib would miss new files
        member.type = tarfile.DIRTYPE
        if entry.kind == "link":
            member.type = tarfile.SYMTYPE
            member.linkname = os.readlink(place)  # noqa: PTH115  # unresolved
        archive.addfile(member)
        return None
    # If a link or a pipe has taken its place, we neither read it nor wait for it.
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as content:  # noqa: PTH123  # a descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no longer a file")
        member.size, member.mode = status.st_size, status.st_mode & 0o777
        sent = TreeEntry(
            kind="file", size=member.size, mtime_ns=max(0, status.st_mtime_ns), mode=member.mode
        )
        _stamp(member, sent.mtime_ns)
        archive.addfile(member, content)
        after = os.fstat(descriptor)
        if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            raise OSError("it was written to")
        return sent


def _stamp(member: tarfile.TarInfo, mtime_ns: int) -> None:
    """Set the time, in nanoseconds since 1970. tarfile alone would round it."""
    seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
    member.mtime = seconds
    member.pax_headers = {"mtime": f"{seconds}.{nanoseconds:09}"}


# -- the way back -------------------------------------------------------------------------------


def _fits(path: str, glob: str) -> bool:
    """Whether a glob matches a path, or a folder that it is in."""
    glob = glob.rstrip("/")
    return path == glob or any(
        fnmatchcase(name, pattern)
        for name in (path, f"/{path}")  # «**/x» is also «x»
        for pattern in (glob, f"{glob}/*")
    )


def _is_of_git(path: str) -> bool:
    """Whether git reads the file, also on a file system that ignores case."""
    return ".git" in path.casefold().split("/")


def _is_code(path: str) -> bool:
    name = PurePosixPath(path.casefold())
    is_for_git = any(part.startswith(".git") for part in name.parts)
    return is_for_git or name.suffix in _CODE_SUFFIXES or name.name in _CODE_NAMES


def _fetch(stream: Streamer, dest: str, wanted: Mapping[str, TreeEntry], scratch: Path) -> None:
    """Copy files of the guest's folder `dest` into the empty folder `scratch`.

    Raises:
        TransferError: the guest cannot send them, or sends more than it has announced.
    """
    names = [os.fsencode(path) for path in wanted]
    limit = sum(entry.size for entry in wanted.values()) + sum(map(len, names))
    limit += _PER_FILE * (len(names) + 2)
    listed = io.BytesIO(b"".join(b"./%s\0" % name for name in names))
    tar = "tar --null --no-recursion --hard-dereference --ignore-failed-read -cf - -T -"
    what = f"the files that tests wrote in {dest} could not be brought back"
    with tempfile.TemporaryFile() as archive:
        _receive(stream, _script(dest, tar), listed, archive, limit, what)
        archive.seek(0)
        try:
            extract(cast("IO[bytes]", archive), scratch)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise TransferError(what, details=f"the guest's archive: {error}") from error


def _put(path: str, scratch: Path, tree: Tree, since: float) -> Outcome | None:
    """Write one file of `scratch` into the tree. Returns None if the tree has the same content.

    Raises:
        OSError: it cannot be written.
    """
    content = _content(scratch, path, MAX_FILE)
    if content is None:  # since it was listed, it was removed or is no file any more
        return None
    *folders, name = path.split("/")
    try:
        with _folder(tree.root, folders, make=True) as folder:
            here = _status(folder, name)
            if here is not None and not stat.S_ISREG(here.st_mode):
                return Outcome.IN_THE_WAY
            if here is not None and _content(tree.root, path, len(content)) == content:
                return None
            if _is_written_by_others(here, tree.entries.get(path), since):
                return Outcome.DIFFERENT
            _write(folder, name, content, here)
    except NotADirectoryError:
        return Outcome.IN_THE_WAY
    return Outcome.BROUGHT


@contextmanager
def _folder(root: Path, names: Iterable[str], *, make: bool = False) -> Iterator[int]:
    """A descriptor of a folder below `root`, without links on the way.

    Args:
        make: whether to make missing folders.

    Raises:
        NotADirectoryError: a name is a link, or something else.
        FileNotFoundError: a folder is missing, and `make` is False.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(root, flags)
    try:
        for name in names:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptor)
            inner = os.open(name, flags | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _content(root: Path, path: str, most: int) -> bytes | None:
    """The content of a file below `root`; None if there is no such file, or it has more than `most` bytes.

    A file behind a link does not count.
    """
    *folders, name = path.split("/")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with suppress(OSError), _folder(root, folders) as folder:
        descriptor = os.open(name, flags, dir_fd=folder)
        with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                content = file.read(most + 1)
                return content if len(content) <= most else None
    return None


def _status(folder: int, name: str) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    return None


def _is_written_by_others(
    here: os.stat_result | None, pushed: TreeEntry | None, since: float
) -> bool:
    """Whether somebody here has written, made or removed a file since the guest got its copy."""
    if here is None:
        return pushed is not None
    if pushed is not None and (here.st_size, here.st_mtime_ns) == (pushed.size, pushed.mtime_ns):
        return False
    return here.st_ctime >= since


def _write(folder: int, name: str, content: bytes, former: os.stat_result | None) -> None:
    """Write a file beside its place, and rename it, so nobody sees half of it.

    Raises:
        OSError: it cannot be written.
    """
    scratch = f".vmsandbox-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(scratch, flags, 0o666, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123  # a descriptor
            if former is not None:
                os.fchmod(descriptor, stat.S_IMODE(former.st_mode) & 0o777)
            file.write(content)
        os.rename(scratch, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch, dir_fd=folder)
        raise
