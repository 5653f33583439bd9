"""The project's tree, on its way to a guest where its tests run.

What goes is what git tracks or does not ignore. It goes as a difference: the guest tells what it
has, and gets what is missing or other there.
"""

from __future__ import annotations

import gzip
import io
import os
import pwd
import re
import stat
import subprocess
import tarfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from pytest_vmsandbox.core.errors import CommandError, ConfigError, TransferError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.guests import transfer

MAX_FILES = 20_000
MAX_BYTES = 256 * MIB
_MAX_LISTING = 64 * MIB

# Folders that are never the project, unless git tracks something in them.
_CACHES = frozenset(
    {
        *(".hg", ".svn", "__pycache__", "node_modules", ".tox", ".nox", ".venv"),
        *(".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"),
    }
)
_WRITTEN_BY_RUNS = frozenset({".coverage"})  # files; with each run they would be others
# A git hook sets these for the repository that it serves; ours is the one around the root.
_OF_ANOTHER_REPOSITORY = frozenset(
    {
        *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR"),
        *("GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE", "GIT_INTERNAL_SUPER_PREFIX"),
    }
)
_FIRST_PERSON = {"Darwin": 500}.get(os.uname().sysname, 1000)  # user numbers of people begin there
_NOBODY = 65534

_FORMAT = r"%y\0%s\0%T@\0%m\0%P\0%l\0"  # of GNU find; `_RECORD` reads it
_RECORD = re.compile(
    rb"([A-Za-z?])\0(\d{1,19})\0(-?\d{1,19})(?:\.(\d{1,12}))?\0([0-7]{1,6})\0"
    rb"(?P<path>[^\0]*)\0([^\0]*)\0"
)
_KINDS = {b"f": "file", b"l": "link", b"d": "dir"}


class Scripted(Protocol):
    """Runs shell scripts in the guest with streams attached; an `Engine` does."""

    def stream_script(
        self,
        script: str,
        *,
        stdin: IO[bytes] | None = None,
        stdout: Callable[[bytes], object] | None = None,
    ) -> object:
        """Run the script.

        Raises:
            CommandError: it returned non-zero.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file, link or folder.

    Attributes:
        kind: ``"file"``, ``"link"`` or ``"dir"``; in a guest also ``"other"``.
        size: bytes of a file, else 0.
        mtime_ns: when a file was last written, nanoseconds since 1970 and never before; else 0.
        mode: the bits 0o777 of a file or folder; 0 for a link. A folder is always one that its
            owner can change.
        target: of a link, as it is written there.
    """

    kind: str
    size: int = 0
    mtime_ns: int = 0
    mode: int = 0
    target: str = ""


@dataclass(frozen=True)
class Tree:
    """What of a project goes to a guest.

    Attributes:
        root: the project's folder, without links.
        entries: everything by its path relative to `root` with ``/`` between the names, in the
            file system's encoding with surrogate escapes; a folder comes before what is in it.
    """

    root: Path
    entries: Mapping[str, Entry]

    @classmethod
    def of(cls, root: Path, *, more: Sequence[str] = ()) -> Tree:
        """The tree at `root`.

        In a git work tree these are the files that git tracks, those of submodules too, and those
        that it does not ignore, but for caches and environments. Elsewhere it is all that is
        there, likewise. Git's own folders, sockets, pipes and devices never go.

        Args:
            root: the project's folder.
            more: paths relative to `root` of files and folders that go although git ignores them.

        Raises:
            ConfigError: `root` is no project but a home or the like; a path of `more` does not
                exist or leads out of `root`; git refuses; something cannot be looked at; there
                are more than `MAX_FILES` files or `MAX_BYTES` bytes.
        """
        root = Path(os.path.realpath(root))
        _check_root(root)
        wanted = [_relative(root, path) for path in more]
        gatherer = _Gatherer(root)
        if not gatherer.git(""):
            gatherer.walk("")
        for path in wanted:
            if gatherer.add(path, folders=True) == "dir":
                gatherer.walk(path)
        return cls(root, dict(sorted(gatherer.entries.items())))


@dataclass(frozen=True)
class Pushed:
    """What a `sync` did.

    Attributes:
        files: how many files and links went over.
        bytes: of those files, before they were packed.
        removed: how many files, links and folders were removed in the guest, or had to make room.
    """

    files: int = 0
    bytes: int = 0
    removed: int = 0


@dataclass(frozen=True)
class Changes:
    """What has changed in a guest's copy of a tree since it went there.

    Attributes:
        written: files that are new or have other content, by path.
        removed: paths of files that are gone.
    """

    written: Mapping[str, Entry]
    removed: tuple[str, ...]


def changes(guest: Scripted, tree: Tree, dest: str) -> Changes:
    """What differs in the guest's folder `dest` from the tree that `sync` has put there.

    Costs one command in the guest. A file whose size and time are right is taken for the same.

    Raises:
        TransferError: the guest does not tell what it has.
    """
    there = _listing(guest, dest)
    written = {
        path: entry
        for path, entry in there.items()
        if entry.kind == "file" and not _same_content(entry, tree.entries.get(path))
    }
    removed = [
        path for path, entry in tree.entries.items() if entry.kind == "file" and path not in there
    ]
    return Changes(written, tuple(removed))


def is_cache(path: str) -> bool:
    """Whether a path of a tree is in a cache, is git's own, or is what each run writes anew."""
    *_, name = parts = path.split("/")
    return ".git" in parts or not _CACHES.isdisjoint(parts) or name in _WRITTEN_BY_RUNS


def _same_content(entry: Entry, other: Entry | None) -> bool:
    return other is not None and _version(entry) == _version(other)


def _version(entry: Entry) -> object:
    """What two entries of the same content have in common."""
    return entry.kind, entry.size, entry.mtime_ns // 1000


def check(root: Path, more: Sequence[str]) -> None:
    """Look whether git and ``vm_push`` let a tree go to a guest; the rest is seen when it goes.

    Args:
        root, more: see `Tree.of`; folders outside of `root` may be among `more`.

    Raises:
        ConfigError: see `Tree.of` and `outside`.
    """
    root = Path(os.path.realpath(root))
    for folder in (root, *outside(root, more)):
        _is_work_tree(folder)
    for path in more:
        if not is_outside(root, path):
            _relative(root, path)


def outside(root: Path, entries: Iterable[str]) -> list[Path]:
    """The folders among the entries of the setting ``vm_push`` that are not below `root`, without links.

    Raises:
        ConfigError: one of them is no folder, or holds `root`.
    """
    root = Path(os.path.realpath(root))
    found: dict[Path, None] = {}
    for entry in entries:
        if not is_outside(root, entry):
            continue
        place = Path(os.path.realpath(root / entry))
        if not place.is_dir():
            raise ConfigError(
                f"vm_push: {entry!r} is no folder of this machine",
                remedy="outside of the rootdir, vm_push takes folders only",
            )
        if root.is_relative_to(place):
            raise ConfigError(
                f"vm_push: {entry!r} holds the rootdir, {root}",
                remedy="name a folder beside the rootdir",
            )
        found[place] = None
    return list(found)


def is_outside(root: Path, entry: str) -> bool:
    """Whether an entry of ``vm_push`` names, as it is written, something that is not below `root`."""
    place = os.path.normpath(os.path.join(os.path.realpath(root), entry))  # noqa: PTH118  # `..`
    return (
        bool(entry) and "\0" not in entry and not Path(place).is_relative_to(os.path.realpath(root))
    )


def sync(guest: Scripted, tree: Tree, dest: str, *, before: Collection[str] = ()) -> Pushed:
    """Make the folder `dest` of the guest hold the tree; what else is in there stays.

    Costs one command in the guest if nothing differs. The owner of what goes over is the guest's
    user. A file whose size, mode and time are right is taken for the same.

    Args:
        guest: where to.
        tree: what.
        dest: a folder in the guest; it is made if need be.
        before: paths that an earlier `sync` pushed there; those that are no longer in the tree
            are removed, folders only if they are empty then.

    Raises:
        TransferError: the guest cannot take it or does not tell what it has; a file changes or
            vanishes meanwhile.
    """
    transfer.check_guest_path(dest)
    there = _listing(guest, dest)
    differing = [path for path, it in tree.entries.items() if _key(there.get(path)) != _key(it)]
    doomed = _doomed(there, tree, before)
    into = f"LC_ALL=C; export LC_ALL; cd {transfer.quoted(dest)} &&"
    parcel = _Parcel(tree, differing)
    try:
        if doomed:
            names = b"".join(os.fsencode(path) + b"\0" for path in doomed)
            guest.stream_script(f"{into} xargs -0 rm -fd --", stdin=io.BytesIO(names))
        if differing:
            with transfer.written_by(parcel.pack) as archive:
                guest.stream_script(
                    # A file in the way is unlinked first; --recursive-unlink would also remove
                    # all that is in a folder of which only the mode is new.
                    f"{into} tar -xpzo --warning=no-timestamp --warning=no-unknown-keyword -f -",
                    stdin=archive,
                )
    except CommandError as error:
        raise transfer.refused(f"{tree.root} could not be pushed to {dest}", error) from error
    return Pushed(parcel.files, parcel.bytes, len(doomed))


# -- what goes ----------------------------------------------------------------------------------


def _check_root(root: Path) -> None:
    """Refuse a folder that is no project.

    Raises:
        ConfigError: it is.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder of this machine")
    for home in _homes():
        if root == home or root in home.parents:
            what = "is a home folder" if root == home else f"holds the home folder {home}"
            raise ConfigError(
                f"{root} {what}: it is not pushed to a guest",
                remedy="start in the project's folder, or name it with --rootdir",
            )


def _homes() -> set[Path]:
    """The home folders of this machine's people, without links."""
    homes = {os.environ.get("HOME", "/")}
    try:
        homes.add(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        pass  # a container may run as a user without a name
    for user in pwd.getpwall():
        if user.pw_uid == 0 or _FIRST_PERSON <= user.pw_uid < _NOBODY:
            homes.add(user.pw_dir)
    return {Path(os.path.realpath(it)) for it in homes if it.startswith("/")} | {Path("/")}


def _relative(root: Path, path: str) -> str:
    """A path of the setting as one of the tree; empty for the root itself.

    Raises:
        ConfigError: it does not exist, leads out of the root or through a link, or is git's.
    """
    remedy = "vm_push takes files and folders, relative to the rootdir"
    pure = PurePosixPath(path)
    if not path or "\0" in path or pure.is_absolute() or ".." in pure.parts:
        raise ConfigError(f"vm_push: {path!r} leads out of {root}", remedy=remedy)
    if ".git" in pure.parts:
        raise ConfigError(f"vm_push: {path!r} is git's own; it never goes to a guest")
    place = root / pure
    if not os.path.lexists(place):
        raise ConfigError(f"vm_push: there is no {path!r} in {root}", remedy=remedy)
    if pure.parts and Path(os.path.realpath(place.parent)) != place.parent:
        raise ConfigError(f"vm_push: {path!r} leads through a symbolic link", remedy=remedy)
    return "" if not pure.parts else str(pure)


class _Gatherer:
    """Gathers the entries of a tree, and stops at the limits.

    Paths are relative to the root; the root's own is empty.

    Attributes:
        entries: what was found, in no order.
    """

    def __init__(self, root: Path) -> None:
        self.entries: dict[str, Entry] = {}
        self._root = root
        self._files = self._bytes = 0
        self._tops: dict[str, list[int]] = {}  # name in the root: files, bytes
        self._skipped: dict[str, bool] = {"": False}

    def git(self, folder: str) -> bool:
        """Gather what git tracks or does not ignore; False if there is no git work tree.

        Raises:
            ConfigError: git refuses, or there is too much.
        """
        place = self._root / folder
        if not _is_work_tree(place):
            return False
        tracked = _names(_git(place, "ls-files", "-z", "--cached", "--recurse-submodules"))
        others = _names(_git(place, "ls-files", "-z", "--others", "--exclude-standard"))
        if not tracked and not others and not os.path.lexists(place / ".git"):
            return False  # a folder that a work tree around it ignores
        paths = [_join(folder, name) for name in tracked]
        paths += [it for it in (_join(folder, name) for name in others) if not self._skips(it)]
        for path in paths:
            # A repository in a repository comes as a folder, and goes by its own rules.
            if (
                self.add(path) == "dir"
                and os.path.lexists(self._root / path / ".git")
                and not self.git(path)
            ):
                self.walk(path)
        return True

    def walk(self, folder: str) -> None:
        """Gather all that is below a folder, but for caches and environments.

        Raises:
            ConfigError: a folder cannot be read, or there is too much.
        """
        folders = [folder]
        while folders:
            here = folders.pop()
            try:
                with os.scandir(self._root / here) as found:
                    paths = sorted(_join(here, it.name) for it in found)
            except OSError as error:
                raise _unreadable(self._root / here, error) from error
            folders += [
                path
                for path in paths
                if not self._is_skipped(path) and self.add(path, folders=True) == "dir"
            ]

    def add(self, path: str, *, folders: bool = False) -> str:
        """Add one path, and the folders that it is in; returns its kind, or nothing if it has none.

        Folders are added only on demand: for git there are no empty ones. What is gone is left
        out, and what is found through a link.

        Raises:
            ConfigError: it cannot be looked at, or there is too much.
        """
        if not path:
            return "dir"
        try:
            entry = _entry(f"{self._root}/{path}")
            if entry is None or ".git" in path.split("/") or not self._has_folder(_parent(path)):
                return ""
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            raise _unreadable(self._root / path, error) from error
        if path in self.entries or (entry.kind == "dir" and not folders):
            return entry.kind
        self.entries[path] = entry
        if entry.kind != "dir":
            self._count(path, entry.size)
        return entry.kind

    def _has_folder(self, path: str) -> bool:
        """Whether it is a true folder in true folders; adds them."""
        if not path:
            return True
        if path in self.entries:
            return self.entries[path].kind == "dir"
        if not self._has_folder(_parent(path)):
            return False
        entry = _entry(f"{self._root}/{path}")
        if entry is None or entry.kind != "dir":
            return False
        self.entries[path] = entry
        return True

    def _skips(self, path: str) -> bool:
        """Whether a path that git does not track is in a cache or an environment, or is one."""
        path = path.rstrip("/")
        if path not in self._skipped:
            self._skipped[path] = self._skips(_parent(path)) or self._is_skipped(path)
        return self._skipped[path]

    def _is_skipped(self, path: str) -> bool:
        place = self._root / path
        if place.name in _WRITTEN_BY_RUNS:
            return place.is_file()
        is_one = place.name in _CACHES or os.path.lexists(place / "pyvenv.cfg")
        return is_one and place.is_dir() and not place.is_symlink()

    def _count(self, path: str, size: int) -> None:
        self._files += 1
        self._bytes += size
        top = self._tops.setdefault(path.partition("/")[0], [0, 0])
        top[0] += 1
        top[1] += size
        if self._bytes > MAX_BYTES:
            self._stop(f"{MAX_BYTES // MIB} MiB", 1)
        if self._files > MAX_FILES:
            self._stop(f"{MAX_FILES:,} files", 0)

    def _stop(self, limit: str, column: int) -> None:
        largest = sorted(self._tops.items(), key=lambda it: it[1][column], reverse=True)[:3]
        raise ConfigError(
            f"{self._root} has more than {limit}: that is too much to go to a guest",
            details="the largest, counted up to the limit:\n"
            + "\n".join(
                f"  {_shown(name)}: {files:,} files, {size / MIB:.1f} MiB"
                for name, (files, size) in largest
            ),
            remedy="list in .gitignore what the tests do not need, "
            "or name the project's own folder with --rootdir",
        )


def _entry(place: str) -> Entry | None:
    """What is at a place of this machine; None for sockets and the like.

    Raises:
        OSError: nothing is, or it cannot be looked at.
    """
    status = os.lstat(place)
    mode = status.st_mode & 0o777
    if stat.S_ISREG(status.st_mode):
        mtime = max(0, status.st_mtime_ns)
        return Entry(kind="file", size=status.st_size, mtime_ns=mtime, mode=mode)
    if stat.S_ISLNK(status.st_mode):
        return Entry(kind="link", target=os.readlink(place))  # noqa: PTH115  # as it is written
    if stat.S_ISDIR(status.st_mode):
        return Entry(kind="dir", mode=mode | 0o700)
    return None


def _is_work_tree(folder: Path) -> bool:
    """Whether a folder is in a work tree of git.

    Raises:
        ConfigError: git refuses, for instance since the folder belongs to another user.
    """
    inside = _git(folder, "rev-parse", "--is-inside-work-tree", may_fail=True)
    return inside == b"true\n"


def _git(folder: Path, *arguments: str, may_fail: bool = False) -> bytes:
    """What git writes; with `may_fail`, nothing if there is no git or no repository.

    Raises:
        ConfigError: git refuses.
    """
    environment = {
        name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_REPOSITORY
    }
    environment |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except OSError as error:
        if may_fail:
            return b""
        raise ConfigError(f"git cannot be started: {error}") from error
    said = done.stderr.decode(errors="replace")
    if done.returncode == 128 and may_fail and "not a git repository" in said:
        return b""
    if done.returncode != 0:
        raise ConfigError(
            f"git does not tell which files of {folder} belong to the project",
            details=said,
            remedy="do what git says: `git status` has to work there, also for this user",
        )
    return done.stdout


def _names(listing: bytes) -> list[str]:
    return [os.fsdecode(name).rstrip("/") for name in listing.split(b"\0") if name]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _shown(path: str | Path) -> str:
    """A path as text that can be printed."""
    return os.fsencode(path).decode(errors="replace")


def _unreadable(place: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{_shown(place)} cannot be pushed to a guest: {error.strerror}",
        remedy="make it readable, or list it in .gitignore",
    )


# -- what the guest has -------------------------------------------------------------------------


def _listing(guest: Scripted, dest: str) -> dict[str, Entry]:
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
        guest.stream_script(script, stdout=collect)
    except CommandError as error:
        # With 1, find says that it could not look everywhere: what it saw is right.
        if error.result.returncode != 1 or not listing:
            raise transfer.refused(f"the guest cannot list its folder {dest}", error) from error
    return _parsed(bytes(listing), dest)


def _parsed(listing: bytes, dest: str) -> dict[str, Entry]:
    """The entries of a guest's listing, which is not trusted.

    Raises:
        TransferError: it is not one.
    """
    there: dict[str, Entry] = {}
    position = 0
    while position < len(listing):
        record = _RECORD.match(listing, position)
        if record is None or not _is_below(record["path"]):
            break
        letter, size, seconds, fraction, mode, path, target = record.groups()
        position = record.end()
        kind = _KINDS.get(letter, "other")
        is_file = kind == "file"
        there[os.fsdecode(path)] = Entry(
            kind=kind,
            size=int(size) if is_file else 0,
            mtime_ns=_nanoseconds(seconds, fraction or b"") if is_file else 0,
            mode=0 if kind == "link" else int(mode, 8) & 0o777,
            target=os.fsdecode(target),
        )
    if position < len(listing) or there.pop("", None) is None:
        raise TransferError(
            f"the guest's listing of {dest} makes no sense",
            details=f"at byte {position}: {listing[position : position + 100]!r}",
            remedy="the guest's `find` has to be GNU's",
        )
    return there


def _is_below(path: bytes) -> bool:
    """Whether a path that a guest tells is the listed folder (empty), or leads to something in it."""
    return not path or {b"", b".", b".."}.isdisjoint(path.split(b"/"))


def _nanoseconds(seconds: bytes, fraction: bytes) -> int:
    """A time since 1970 as find writes it."""
    return int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))


def _key(entry: Entry | None) -> object:
    """What two entries that are the same have in common: a file's time to the microsecond."""
    return entry and (entry.kind, entry.size, entry.mtime_ns // 1000, entry.mode, entry.target)


def _doomed(there: Mapping[str, Entry], tree: Tree, before: Iterable[str]) -> list[str]:
    """What to remove in the guest before it gets the tree; what is in a folder comes before it.

    That is what was pushed before and is no longer in the tree, and a folder where the tree has
    something else, with all that is in it.
    """
    gone = {path for path in before if path in there and path not in tree.entries}
    in_the_way = [
        path
        for path, entry in tree.entries.items()
        if entry.kind != "dir" and path in there and there[path].kind == "dir"
    ]
    if not gone and not in_the_way:
        return []
    listed = sorted(there)
    for path in in_the_way:
        # «0» is what comes after «/».
        gone |= {path, *listed[bisect_left(listed, f"{path}/") : bisect_left(listed, f"{path}0")]}
    inside = Counter(map(_parent, there))  # how many each folder holds
    doomed = []
    for path in sorted(gone, reverse=True):
        if not inside[path]:
            doomed.append(path)
            inside[_parent(path)] -= 1
    return doomed


# -- the way over -------------------------------------------------------------------------------


class _Parcel:
    """What goes over as one archive.

    Attributes:
        files: how many files and links were packed.
        bytes: how many of their bytes.
    """

    def __init__(self, tree: Tree, paths: Sequence[str]) -> None:
        self.files = self.bytes = 0
        self._tree = tree
        self._paths = paths

    def pack(self, file: IO[bytes]) -> None:
        """Write the archive.

        Raises:
            TransferError: a file changes or vanishes meanwhile, or cannot be read.
        """
        with (
            gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed,
            # Of the formats, only this one has times with fractions.
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in self._paths:
                try:
                    self._pack(archive, path, self._tree.entries[path])
                except BrokenPipeError:
                    raise  # the guest takes no more, and tells why
                except OSError as error:
                    raise self._changed(path, error.strerror or str(error)) from error

    def _pack(self, archive: tarfile.TarFile, path: str, entry: Entry) -> None:
        place = f"{self._tree.root}/{path}"
        member = tarfile.TarInfo(f"./{path}")
        member.mode = entry.mode
        if entry.kind == "dir":
            member.type = tarfile.DIRTYPE
            _stamp(member, time.time_ns())  # a time it had before would hide news from importlib
            archive.addfile(member)
            return
        if entry.kind == "link":
            member.type = tarfile.SYMTYPE
            member.linkname = os.readlink(place)  # noqa: PTH115  # as it is written
            _stamp(member, time.time_ns())
            archive.addfile(member)
            self.files += 1
            return
        # Neither a link nor a pipe that took its place is read, or waited for.
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as content:  # noqa: PTH123  # a descriptor
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self._changed(path, "it is no longer a file")
            member.size, member.mode = status.st_size, status.st_mode & 0o777
            _stamp(member, max(0, status.st_mtime_ns))
            archive.addfile(member, content)
            after = os.fstat(descriptor)
            if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
                raise self._changed(path, "it was written to")
        self.files += 1
        self.bytes += member.size

    def _changed(self, path: str, why: str) -> TransferError:
        return TransferError(
            f"{_shown(self._tree.root / path)} changed while it was pushed to a guest: {why}",
            remedy="run again; what is written during a run belongs into .gitignore",
        )


def _stamp(member: tarfile.TarInfo, mtime_ns: int) -> None:
    """Give it a time, nanoseconds since 1970; tarfile's own way rounds it."""
    seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
    member.mtime = seconds
    member.pax_headers = {"mtime": f"{seconds}.{nanoseconds:09}"}
