"""The project's tree on this machine: which folders may go to guests, and which files in them do."""

from __future__ import annotations

import os
import posixpath
import pwd
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import MIB

MAX_FILES = 20_000
MAX_BYTES = 256 * MIB

# Folders that never belong to the project, unless git tracks something in them.
_CACHES = frozenset(
    {
        *(".hg", ".svn", "__pycache__", "node_modules", ".tox", ".nox", ".venv"),
        *(".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"),
    }
)
_WRITTEN_BY_RUNS = frozenset({".coverage"})  # files that each run writes
_FIRST_PERSON, _NOBODY = 1000, 65534  # user ids of people are between these
# git sets these for its hooks. We want the repository that the folder is in.
_OF_ANOTHER_REPOSITORY = frozenset(
    {
        *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR"),
        *("GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE", "GIT_INTERNAL_SUPER_PREFIX"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeEntry:
    """One file, link or folder.

    Attributes:
        kind: ``"file"``, ``"link"`` or ``"dir"``; in a guest ``"file"`` or ``"other"``.
        size: bytes of a file, else 0.
        mtime_ns: the modification time of a file in nanoseconds since 1970, at least 0; else 0.
        mode: the bits 0o777 of a file or folder; 0 for a link. The owner can always write to a
            folder.
        target: of a link, unresolved.
    """

    kind: str
    size: int = 0
    mtime_ns: int = 0
    mode: int = 0
    target: str = ""


@dataclass(frozen=True)
class Tree:
    """The part of a project that goes to guests.

    Attributes:
        root: the project's folder, with links resolved.
        entries: path relative to `root` → entry. Paths have ``/`` between names, and are in the file
            system's encoding with surrogate escapes. A folder comes before its content.
        sent: path of a file → its other versions that guests got, because it was written meanwhile.
    """

    root: Path
    entries: Mapping[str, TreeEntry]
    sent: dict[str, list[TreeEntry]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, root: Path, *, more: Sequence[str] = ()) -> Tree:
        """The tree at `root`.

        In a git work tree it has the files that git tracks, also in submodules, and those that git
        does not ignore. Elsewhere it has all files. Caches and virtual environments are left out, and
        so are git's own folders, sockets, pipes and devices.

        Args:
            root: the project's folder.
            more: paths relative to `root` of files and folders that go although git ignores them.

        Raises:
            ConfigError: `root` is a home folder or the like; a path of `more` does not exist or leads
                out of `root`; git fails; something cannot be read; there are more than `MAX_FILES`
                files or `MAX_BYTES` bytes.
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


def is_cache(path: str) -> bool:
    """Whether a path of a tree is in a cache, belongs to git, or is written by each run."""
    *_, name = parts = path.split("/")
    return ".git" in parts or not _CACHES.isdisjoint(parts) or name in _WRITTEN_BY_RUNS


def shown(path: str | Path) -> str:
    """A path as printable text."""
    return os.fsencode(path).decode(errors="replace")


class _Gatherer:
    """Gathers the entries of a tree, up to the limits.

    Paths are relative to the root; the root's own path is empty.

    Attributes:
        entries: the entries so far, unsorted.
    """

    def __init__(self, root: Path) -> None:
        self.entries: dict[str, TreeEntry] = {}
        self._root = root
        self._files = self._bytes = 0
        self._tops: dict[str, list[int]] = {}  # name in the root: files, bytes

    def git(self, folder: str) -> bool:
        """Gather what git tracks or does not ignore. Returns False outside of a git work tree.

        Raises:
            ConfigError: git fails, or there is too much.
        """
        place = self._root / folder
        if not _is_work_tree(place):
            return False
        tracked = _listed(place, "--cached", "--recurse-submodules")
        others = _listed(place, "--others", "--exclude-standard")
        if not tracked and not others and not os.path.lexists(place / ".git"):
            return False  # the work tree around the folder ignores it
        paths = [posixpath.join(folder, name) for name in tracked]
        paths += [path for name in others if not self._skips(path := posixpath.join(folder, name))]
        for path in paths:
            # git lists a repository in a repository as a folder. Its own rules apply.
            is_one = self.add(path) == "dir" and os.path.lexists(self._root / path / ".git")
            if is_one and not self.git(path):
                self.walk(path)
        return True

    def walk(self, folder: str) -> None:
        """Gather everything below a folder, except caches and virtual environments.

        Raises:
            ConfigError: a folder cannot be read, or there is too much.
        """
        folders = [folder]
        while folders:
            here = folders.pop()
            try:
                with os.scandir(self._root / here) as found:
                    paths = sorted(posixpath.join(here, entry.name) for entry in found)
            except OSError as error:
                raise _unreadable(self._root / here, error) from error
            wanted = [path for path in paths if not self._is_skipped(path)]
            folders += [path for path in wanted if self.add(path, folders=True) == "dir"]

    def add(self, path: str, *, folders: bool = False) -> str:
        """Add a path and its parent folders. Returns its kind; empty if it is left out.

        A missing path is left out, and so is one behind a link.

        Args:
            folders: whether to add the path if it is a folder. git knows no empty folders.

        Raises:
            ConfigError: it cannot be read, or there is too much.
        """
        if not path:
            return "dir"
        if path in self.entries:
            return self.entries[path].kind
        try:
            entry = _entry(f"{self._root}/{path}")
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            raise _unreadable(self._root / path, error) from error
        if entry is None or ".git" in path.split("/"):
            return ""
        if self.add(posixpath.dirname(path), folders=True) != "dir":
            return ""
        if entry.kind != "dir":
            self._count(path, entry.size)
        if folders or entry.kind != "dir":
            self.entries[path] = entry
        return entry.kind

    def _skips(self, path: str) -> bool:
        """Whether an untracked path is, or is in, a cache or a virtual environment."""
        above = posixpath.dirname(path)
        return self._is_skipped(path) or (above != "" and self._skips(above))

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
        largest = sorted(self._tops.items(), key=lambda top: top[1][column], reverse=True)[:3]
        raise ConfigError(
            f"{self._root} is too large to be sent to a guest: it has more than {limit}",
            details="the largest files and folders, counted up to the limit:\n"
            + "\n".join(
                f"  {shown(name)}: {files:,} files, {size / MIB:.1f} MiB"
                for name, (files, size) in largest
            ),
            remedy="add what the tests do not need to .gitignore, or set --rootdir to the project's own folder",
        )


def _entry(place: str) -> TreeEntry | None:
    """The entry for a path of this machine; None for sockets and the like.

    Raises:
        OSError: there is nothing, or it cannot be read.
    """
    status = os.lstat(place)
    mode = status.st_mode & 0o777
    if stat.S_ISREG(status.st_mode):
        mtime = max(0, status.st_mtime_ns)
        return TreeEntry(kind="file", size=status.st_size, mtime_ns=mtime, mode=mode)
    if stat.S_ISLNK(status.st_mode):
        return TreeEntry(kind="link", target=os.readlink(place))  # noqa: PTH115  # unresolved
    if stat.S_ISDIR(status.st_mode):
        return TreeEntry(kind="dir", mode=mode | 0o700)
    return None


def _unreadable(place: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{shown(place)} cannot be sent to a guest: {error.strerror}",
        remedy="make it readable, or add it to .gitignore",
    )


# -- git --------------------------------------------------------------------------------------------


def _is_work_tree(folder: Path) -> bool:
    """Whether a folder is in a git work tree. Without git, it is not.

    Raises:
        ConfigError: git fails, for instance because the folder belongs to another user.
    """
    return _git(folder, "rev-parse", "--is-inside-work-tree") == b"true\n"


def _listed(folder: Path, *options: str) -> list[str]:
    """The files that git lists in a folder of a work tree. It lists a nested repository as a folder.

    Returns:
        Paths relative to the folder, in the file system's encoding with surrogate escapes.

    Raises:
        ConfigError: git fails.
    """
    listing = _git(folder, "ls-files", "-z", *options)
    return [os.fsdecode(name).rstrip("/") for name in listing.split(b"\0") if name]


def _git(folder: Path, *arguments: str) -> bytes:
    """The output of git for a folder; empty without git, or without a repository."""
    environment = {
        name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_REPOSITORY
    }
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except OSError:
        return b""
    if done.returncode and b"not a git repository" not in done.stderr:
        raise ConfigError(
            f"git failed to list the files of the project in {folder}",
            details=done.stderr.decode(errors="replace"),
            remedy="follow git's message until `git status` works in that folder, as this user",
        )
    return done.stdout


# -- which folders may go ---------------------------------------------------------------------------


def check_push(root: Path, entries: Sequence[str]) -> None:
    """Check git and ``vm_push`` before the first test. Other checks follow when the tree is sent.

    Args:
        root: pytest's rootdir.
        entries: the values of ``vm_push``.

    Raises:
        ConfigError: git fails, or an entry is invalid.
    """
    root = Path(os.path.realpath(root))
    inner, outside = divide_push(root, entries)
    for entry in inner:
        _relative(root, entry)
    for folder in (root, *outside):
        _is_work_tree(folder)


def divide_push(root: Path, entries: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The entries of ``vm_push`` below `root`, and folders elsewhere with links resolved.

    The former are returned as they were written. `_relative` checks them.

    Raises:
        ConfigError: an entry elsewhere is no folder, or contains `root`.
    """
    root = Path(os.path.realpath(root))
    inner: list[str] = []
    outside: dict[Path, None] = {}
    for entry in entries:
        place = os.path.normpath(os.path.join(root, entry))  # noqa: PTH118  # `..`
        if not entry or "\0" in entry or Path(place).is_relative_to(root):
            inner.append(entry)
            continue
        folder = Path(os.path.realpath(root / entry))
        if not folder.is_dir():
            raise ConfigError(
                f"vm_push: {entry!r} is outside of the rootdir, and is not a folder",
                remedy="name a folder: outside of the rootdir, vm_push takes only folders",
            )
        if root.is_relative_to(folder):
            raise ConfigError(
                f"vm_push: {entry!r} contains the rootdir, {root}",
                remedy="name a folder beside the rootdir",
            )
        outside[folder] = None
    return inner, list(outside)


def _relative(root: Path, entry: str) -> str:
    """An entry of ``vm_push`` as a path of the tree at `root`; empty for the root itself.

    Raises:
        ConfigError: it does not exist, leads out of the root or through a link, or belongs to git.
    """
    remedy = "name a file or a folder, relative to the rootdir"
    pure = PurePosixPath(entry)
    if not entry or "\0" in entry or pure.is_absolute() or ".." in pure.parts:
        raise ConfigError(f"vm_push: {entry!r} leads out of {root}", remedy=remedy)
    if ".git" in pure.parts:
        raise ConfigError(
            f"vm_push: {entry!r} belongs to git, and is never sent to a guest",
            remedy="remove it from vm_push",
        )
    place = root / pure
    if not os.path.lexists(place):
        raise ConfigError(f"vm_push: there is no {entry!r} in {root}", remedy=remedy)
    if pure.parts and Path(os.path.realpath(place.parent)) != place.parent:
        raise ConfigError(f"vm_push: {entry!r} leads through a symbolic link", remedy=remedy)
    return "" if not pure.parts else str(pure)


def _check_root(root: Path) -> None:
    """Refuse a folder that is no project. Links in its path are resolved.

    Raises:
        ConfigError: it is missing, is a home folder, or contains one.
    """
    if not root.is_dir():
        raise ConfigError(
            f"{root} is not a folder on this machine",
            remedy="set --rootdir to the project's folder",
        )
    for home in _homes():
        if root == home or root in home.parents:
            what = "is a home folder" if root == home else f"contains the home folder {home}"
            raise ConfigError(
                f"{root} {what}, so it is not sent to a guest",
                remedy="start pytest in the project's folder, or set --rootdir to it",
            )


def _homes() -> set[Path]:
    """The home folders of this machine's users, with links resolved."""
    homes = {os.environ.get("HOME", "/")}
    try:
        homes.add(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        pass  # a container may run as a user without a name
    for user in pwd.getpwall():
        if user.pw_uid == 0 or _FIRST_PERSON <= user.pw_uid < _NOBODY:
            homes.add(user.pw_dir)
    return {Path(os.path.realpath(home)) for home in homes if home.startswith("/")} | {Path("/")}
