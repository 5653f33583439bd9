"""What git says about a folder of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from pytest_vmsandbox.core.errors import ConfigError

# A git hook sets these for the repository that it serves; ours is the one around the folder.
_OF_ANOTHER_REPOSITORY = frozenset(
    {
        *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR"),
        *("GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE", "GIT_INTERNAL_SUPER_PREFIX"),
    }
)


def is_work_tree(folder: Path) -> bool:
    """Whether a folder is in a work tree of git; no if there is no git.

    Raises:
        ConfigError: git refuses, for instance since the folder belongs to another user.
    """
    try:
        done = _run(folder, "rev-parse", "--is-inside-work-tree")
    except OSError:
        return False
    if done.returncode == 128 and b"not a git repository" in done.stderr:
        return False
    return _output(done, folder) == b"true\n"


def tracked(folder: Path) -> list[str]:
    """The files that git tracks in a folder of a work tree, those of submodules too.

    Returns:
        Paths relative to the folder, in the file system's encoding with surrogate escapes.

    Raises:
        ConfigError: git refuses.
    """
    return _listed(folder, "--cached", "--recurse-submodules")


def untracked(folder: Path) -> list[str]:
    """The files in a folder of a work tree that git neither tracks nor ignores.

    A repository in the repository comes as a folder.

    Returns:
        Paths as `tracked` returns them.

    Raises:
        ConfigError: git refuses.
    """
    return _listed(folder, "--others", "--exclude-standard")


def _listed(folder: Path, *options: str) -> list[str]:
    listing = _output(_run(folder, "ls-files", "-z", *options), folder)
    return [os.fsdecode(name).rstrip("/") for name in listing.split(b"\0") if name]


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {
        name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_REPOSITORY
    }
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=environment | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )


def _output(done: subprocess.CompletedProcess[bytes], folder: Path) -> bytes:
    if done.returncode:
        raise ConfigError(
            f"git does not tell which files of {folder} belong to the project",
            details=done.stderr.decode(errors="replace"),
            remedy="do what git says: `git status` has to work there, also for this user",
        )
    return done.stdout
