"""The project's tree on this machine: which folders may go to a guest, and what of them does."""

from __future__ import annotations

import os
import posixpath
import pwd
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import MIB

MAX_FILES = 20_000
MAX_BYTES = 256 * MIB

# Folders that are never the project, unless git tracks something in them.
_CACHES = frozenset(
    {
        *(".hg", ".svn", "__pycache__", "node_modules", ".tox", ".nox", ".venv"),
        *(".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"),
    }
)
_WRITTEN_BY_RUNS = frozenset({".coverage"})  # files; with each run they would be others
_FIRST_PERSON, _NOBODY = 1000, 65534  # user numbers of people are between these
# A git hook sets these for the repository that it serves; ours is the one around the folder.
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
    entries: Mapping[str, TreeEntry]

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


def is_cache(path: str) -> bool:
    """Whether a path of a tree is in a cache, is git's own, or is what each run writes anew."""
    *_, name = parts = path.split("/")
    return ".git" in parts or not _CACHES.isdisjoint(parts) or name in _WRITTEN_BY_RUNS


def shown(path: str | Path) -> str:
    """A path as text that can be printed."""
    return os.fsencode(path).decode(errors="replace")


class _Gatherer:
    """Gathers the entries of a tree, and stops at the limits.

    Paths are relative to the root; the root's own is empty.

    Attributes:
        entries: what was found, in no order.
    """

    def __init__(self, root: Path) -> None:
        self.entries: dict[str, TreeEntry] = {}
        self._root = root
        self._files = self._bytes = 0
        self._tops: dict[str, list[int]] = {}  # name in the root: files, bytes

    def git(self, folder: str) -> bool:
        """Gather what git tracks or does not ignore; False if there is no git work tree.

        Raises:
            ConfigError: git refuses, or there is too much.
        """
        place = self._root / folder
        if not _is_work_tree(place):
            return False
        tracked = _listed(place, "--cached", "--recurse-submodules")
        others = _listed(place, "--others", "--exclude-standard")
        if not tracked and not others and not os.path.lexists(place / ".git"):
            return False  # a folder that a work tree around it ignores
        paths = [posixpath.join(folder, name) for name in tracked]
        paths += [path for name in others if not self._skips(path := posixpath.join(folder, name))]
        for path in paths:
            # A repository in a repository comes as a folder, and goes by its own rules.
            is_one = self.add(path) == "dir" and os.path.lexists(self._root / path / ".git")
            if is_one and not self.git(path):
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
                    paths = sorted(posixpath.join(here, entry.name) for entry in found)
            except OSError as error:
                raise _unreadable(self._root / here, error) from error
            wanted = [path for path in paths if not self._is_skipped(path)]
            folders += [path for path in wanted if self.add(path, folders=True) == "dir"]

    def add(self, path: str, *, folders: bool = False) -> str:
        """Add one path, and the folders that it is in; returns its kind, or nothing if it has none.

        Folders are added only on demand: for git there are no empty ones. What is gone is left
        out, and what is found through a link.

        Raises:
            ConfigError: it cannot be looked at, or there is too much.
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
        """Whether a path that git does not track is in a cache or an environment, or is one."""
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
            f"{self._root} has more than {limit}: that is too much to go to a guest",
            details="the largest, counted up to the limit:\n"
            + "\n".join(
                f"  {shown(name)}: {files:,} files, {size / MIB:.1f} MiB"
                for name, (files, size) in largest
            ),
            remedy="list in .gitignore what the tests do not need, "
            "or name the project's own folder with --rootdir",
        )


def _entry(place: str) -> TreeEntry | None:
    """What is at a place of this machine; None for sockets and the like.

    Raises:
        OSError: nothing is, or it cannot be looked at.
    """
    status = os.lstat(place)
    mode = status.st_mode & 0o777
    if stat.S_ISREG(status.st_mode):
        mtime = max(0, status.st_mtime_ns)
        return TreeEntry(kind="file", size=status.st_size, mtime_ns=mtime, mode=mode)
    if stat.S_ISLNK(status.st_mode):
        return TreeEntry(kind="link", target=os.readlink(place))  # noqa: PTH115  # as it is written
    if stat.S_ISDIR(status.st_mode):
        return TreeEntry(kind="dir", mode=mode | 0o700)
    return None


def _unreadable(place: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{shown(place)} cannot be pushed to a guest: {error.strerror}",
        remedy="make it readable, or list it in .gitignore",
    )


# -- git --------------------------------------------------------------------------------------------


def _is_work_tree(folder: Path) -> bool:
    """Whether a folder is in a work tree of git; no if there is no git.

    Raises:
        ConfigError: git refuses, for instance since the folder belongs to another user.
    """
    return _git(folder, "rev-parse", "--is-inside-work-tree") == b"true\n"


def _listed(folder: Path, *options: str) -> list[str]:
    """The files that git lists in a folder of a work tree; a repository in it comes as a folder.

    Returns:
        Paths relative to the folder, in the file system's encoding with surrogate escapes.

    Raises:
        ConfigError: git refuses.
    """
    listing = _git(folder, "ls-files", "-z", *options)
    return [os.fsdecode(name).rstrip("/") for name in listing.split(b"\0") if name]


def _git(folder: Path, *arguments: str) -> bytes:
    """What git says about a folder; nothing where there is no git, or no repository."""
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
            f"git does not tell which files of {folder} belong to the project",
            details=done.stderr.decode(errors="replace"),
            remedy="do what git says: `git status` has to work there, also for this user",
        )
    return done.stdout


# -- which folders may go ---------------------------------------------------------------------------


def check_push(root: Path, entries: Sequence[str]) -> None:
    """Look whether git and ``vm_push`` let a tree go to a guest; the rest is seen when it goes.

    Args:
        root: pytest's rootdir.
        entries: the values of ``vm_push``.

    Raises:
        ConfigError: they do not.
    """
    root = Path(os.path.realpath(root))
    inner, outside = divide_push(root, entries)
    for entry in inner:
        _relative(root, entry)
    for folder in (root, *outside):
        _is_work_tree(folder)


def divide_push(root: Path, entries: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The entries of ``vm_push`` below `root`, and the folders elsewhere, without links.

    The former are as they were written, and not checked; `_relative` does that.

    Raises:
        ConfigError: one that is elsewhere is no folder, or holds `root`.
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
                f"vm_push: {entry!r} is no folder of this machine",
                remedy="outside of the rootdir, vm_push takes folders only",
            )
        if root.is_relative_to(folder):
            raise ConfigError(
                f"vm_push: {entry!r} holds the rootdir, {root}",
                remedy="name a folder beside the rootdir",
            )
        outside[folder] = None
    return inner, list(outside)


def _relative(root: Path, entry: str) -> str:
    """An entry of ``vm_push`` as a path of the tree at `root`; empty for the root itself.

    Raises:
        ConfigError: it does not exist, leads out of the root or through a link, or is git's.
    """
    remedy = "vm_push takes files and folders, relative to the rootdir"
    pure = PurePosixPath(entry)
    if not entry or "\0" in entry or pure.is_absolute() or ".." in pure.parts:
        raise ConfigError(f"vm_push: {entry!r} leads out of {root}", remedy=remedy)
    if ".git" in pure.parts:
        raise ConfigError(f"vm_push: {entry!r} is git's own; it never goes to a guest")
    place = root / pure
    if not os.path.lexists(place):
        raise ConfigError(f"vm_push: there is no {entry!r} in {root}", remedy=remedy)
    if pure.parts and Path(os.path.realpath(place.parent)) != place.parent:
        raise ConfigError(f"vm_push: {entry!r} leads through a symbolic link", remedy=remedy)
    return "" if not pure.parts else str(pure)


def _check_root(root: Path) -> None:
    """Refuse a folder, named without links, that is no project.

    Raises:
        ConfigError: it is missing, a home folder, or holds one.
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
    return {Path(os.path.realpath(home)) for home in homes if home.startswith("/")} | {Path("/")}
