"""Which folders of this machine may go to a guest: the rootdir, and what ``vm_push`` names."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.inside import git

_FIRST_PERSON, _NOBODY = 1000, 65534  # user numbers of people are between these


def check(root: Path, entries: Sequence[str]) -> None:
    """Look whether git and ``vm_push`` let a tree go to a guest; the rest is seen when it goes.

    Args:
        root: pytest's rootdir.
        entries: the values of ``vm_push``.

    Raises:
        ConfigError: they do not.
    """
    root = Path(os.path.realpath(root))
    inner, outside = divide(root, entries)
    for entry in inner:
        relative(root, entry)
    for folder in (root, *outside):
        git.is_work_tree(folder)


def divide(root: Path, entries: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The entries of ``vm_push`` below `root`, and the folders elsewhere, without links.

    The former are as they were written, and not checked; `relative` does that.

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


def relative(root: Path, entry: str) -> str:
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


def check_root(root: Path) -> None:
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
