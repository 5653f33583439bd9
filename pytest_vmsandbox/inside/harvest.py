"""What tests have written into the project's tree in a guest, and how it comes back.

The guest is not trusted. Nothing is written outside the project's folder or through a symbolic
link, nothing that git, Python or pytest would read as code unless its exact name was given, and
nothing without a limit.
"""

from __future__ import annotations

import enum
import io
import os
import secrets
import stat
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, cast

from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.core.errors import CommandError, ConfigError, TransferError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.guests import transfer
from pytest_vmsandbox.guests.archive import extract
from pytest_vmsandbox.guests.transfer import Streamer
from pytest_vmsandbox.inside import tree_copy
from pytest_vmsandbox.inside.tree import Tree, TreeEntry, is_cache

SETTING = "vm_pull"
MAX_FILES = 20_000  # of one guest
MAX_FILE = 64 * MIB
MAX_TOTAL = 256 * MIB  # of one guest
_PER_FILE = 8_192  # bytes that an archive may have for a file beside its content and its name

_CODE_SUFFIXES = frozenset(
    {".py", ".pyc", ".pyd", ".pyi", ".pyo", ".pyw", ".pyx", ".pth", ".so", ".egg-link"}
)
# What is read at the start of pytest, of a tool that it loads, or of Python.
_CODE_NAMES = frozenset(
    {
        *("pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "pyproject.toml"),
        *("tox.ini", "setup.cfg", ".coveragerc", "pyvenv.cfg"),
    }
)


class Outcome(enum.Enum):
    """What became of a file that a guest has written or removed."""

    BROUGHT = "brought"
    LEFT = "left"  # nobody has asked for it
    DIFFERENT = "different"  # somebody else has written another content here meanwhile
    IS_CODE = "code"
    TOO_LARGE = "large"
    UNWRITABLE = "unwritable"  # here; the reason follows the path, in parentheses
    IN_THE_WAY = "way"  # here is a link, or something else that is no file
    REMOVED = "removed"


@dataclass(frozen=True)
class Patterns:
    """Which files come back.

    Args:
        globs: matched against paths relative to the project's folder. ``*`` matches ``/``, too, and
            a folder stands for all that is in it. The last one that fits decides; ``!`` in front
            of it says that the file stays in the guest, and that nobody needs to be told.

    Raises:
        ConfigError: one of them leads out of the project, or into git's folder.
    """

    globs: Sequence[str]

    def __post_init__(self) -> None:
        for glob in self.globs:
            pure = PurePosixPath(glob.removeprefix("!"))
            if not pure.parts or pure.is_absolute() or ".." in pure.parts or ".git" in pure.parts:
                raise ConfigError(
                    f"{SETTING}: {glob!r} is not allowed",
                    remedy="name files and folders below the rootdir, relative to it",
                )

    def outcome(self, path: str) -> Outcome | None:
        """What is to become of a file; None if it stays in the guest and nobody needs to know."""
        for glob in reversed(self.globs):
            if _fits(path, glob.removeprefix("!")):
                if glob.startswith("!") or _is_of_git(path):
                    return None
                return Outcome.IS_CODE if _is_code(path) and glob != path else Outcome.BROUGHT
        return None if is_cache(path) else Outcome.LEFT


def bring_back(
    stream: Streamer, tree: Tree, dest: str, *, patterns: Patterns, since: float
) -> dict[Outcome, list[str]]:
    """Bring back what has been written in a guest's copy of the tree, as far as it is wanted.

    A file here that somebody has written since the guest got its copy, or since the run began, is
    left as it is, unless the guest's has the same content.

    Args:
        stream: runs scripts in the guest.
        tree: what went there.
        dest: the folder in the guest that it went to.
        patterns: what is wanted.
        since: when the run began, seconds since the epoch.

    Returns:
        The paths of files, by what became of them.

    Raises:
        TransferError: the guest does not tell what it has, or does not hand it out.
    """
    changes = tree_copy.changes(stream, tree, dest)
    found: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}
    wanted: dict[str, TreeEntry] = {}
    total = 0
    for path, entry in sorted(changes.written.items()):
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
    for path in changes.removed:
        if patterns.outcome(path) in (Outcome.BROUGHT, Outcome.IS_CODE):
            found[Outcome.REMOVED].append(path)
    if wanted:
        with tempfile.TemporaryDirectory(prefix="vmsandbox-") as scratch:
            _fetch(stream, dest, wanted, Path(scratch))
            with locked(tree.root, on_busy=lambda: None):  # other workers of xdist write here, too
                for path in wanted:
                    try:
                        if outcome := _put(path, Path(scratch), tree, since):
                            found[outcome].append(path)
                    except OSError as error:  # others may be written nevertheless
                        found[Outcome.UNWRITABLE].append(f"{path} ({error.strerror})")
    return found


def _fits(path: str, glob: str) -> bool:
    """Whether a path, or a folder that it is in, is one that a glob names."""
    glob = glob.rstrip("/")
    return path == glob or any(
        fnmatchcase(name, pattern)
        for name in (path, f"/{path}")  # «**/x» is also «x»
        for pattern in (glob, f"{glob}/*")
    )


def _is_of_git(path: str) -> bool:
    """Also where a file system does not tell capital letters from small ones."""
    return ".git" in path.casefold().split("/")


def _is_code(path: str) -> bool:
    name = PurePosixPath(path.casefold())
    return (
        name.suffix in _CODE_SUFFIXES
        or name.name in _CODE_NAMES
        or any(part.startswith(".git") for part in name.parts)
    )


def _fetch(stream: Streamer, dest: str, wanted: Mapping[str, TreeEntry], scratch: Path) -> None:
    """Copy files of the guest's folder `dest` into the empty folder `scratch`.

    Raises:
        TransferError: it does not hand them out, or sends more than it has announced.
    """
    names = [os.fsencode(path) for path in wanted]
    limit = sum(entry.size for entry in wanted.values()) + sum(map(len, names))
    limit += _PER_FILE * (len(names) + 2)
    script = (
        f"LC_ALL=C; export LC_ALL; cd {transfer.quoted(dest)} && "
        "tar --null --no-recursion --hard-dereference --ignore-failed-read -cf - -T -"
    )
    what = f"what tests have written in {dest} could not be brought back"
    with tempfile.TemporaryFile() as archive:

        def take(data: bytes) -> None:
            if archive.tell() + len(data) > limit:
                raise TransferError(what, details=f"the guest sent more than {limit} bytes")
            archive.write(data)

        listed = io.BytesIO(b"".join(b"./%s\0" % name for name in names))
        try:
            stream(script, stdin=listed, stdout=take)
        except CommandError as error:
            if error.result.returncode != 1:  # with 1, a file has changed while it was read
                raise transfer.refused(what, error) from error
        archive.seek(0)
        try:
            extract(cast("IO[bytes]", archive), scratch)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise TransferError(what, details=f"the guest's archive: {error}") from error


def _put(path: str, scratch: Path, tree: Tree, since: float) -> Outcome | None:
    """Write one file of `scratch` into the tree; None if it is there already.

    Raises:
        OSError: it cannot be written.
    """
    content = _content(scratch, path, MAX_FILE)
    if content is None:  # gone in the guest since it was listed, or no file any more
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
    except _InTheWay:
        return Outcome.IN_THE_WAY
    return Outcome.BROUGHT


class _InTheWay(Exception):
    """A folder of the path is none, or is reached by a link."""


@contextmanager
def _folder(root: Path, names: Iterable[str], *, make: bool = False) -> Iterator[int]:
    """A descriptor of a folder below `root`, to which no link leads.

    Raises:
        _InTheWay: there is something else, or it is missing and is not to be made.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(root, flags)
    try:
        for name in names:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptor)
            try:
                inner = os.open(name, flags | os.O_NOFOLLOW, dir_fd=descriptor)
            except (NotADirectoryError, FileNotFoundError) as error:
                raise _InTheWay from error
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _content(root: Path, path: str, most: int) -> bytes | None:
    """The content of a file below `root`; None if there is none, no link leads to it, or it is longer."""
    *folders, name = path.split("/")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with _folder(root, folders) as folder, suppress(OSError):
            descriptor = os.open(name, flags, dir_fd=folder)
            with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    content = file.read(most + 1)
                    return content if len(content) <= most else None
    except _InTheWay:
        pass
    return None


def _status(folder: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _is_written_by_others(
    here: os.stat_result | None, pushed: TreeEntry | None, since: float
) -> bool:
    """Whether somebody has written, made or removed a file here that the guest has not seen."""
    if here is None:
        return pushed is not None
    if pushed is not None and (here.st_size, here.st_mtime_ns) == (pushed.size, pushed.mtime_ns):
        return False
    return here.st_ctime >= since


def _write(folder: int, name: str, content: bytes, former: os.stat_result | None) -> None:
    """Write a file beside its place, and rename it: nobody sees half of it.

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
