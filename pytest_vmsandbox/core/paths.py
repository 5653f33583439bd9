"""Where we keep files on this machine."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from pytest_vmsandbox.core.errors import ConfigError

APP = "vmsandbox"
CACHE, RUNTIME = "VMSANDBOX_CACHE", "VMSANDBOX_RUNTIME"
LOCK_FILE = "vm-images.lock"


def cache_dir() -> Path:
    """The user's cache: images, templates and so on. ``VMSANDBOX_CACHE`` overrides it.

    Raises:
        ConfigError: this user has no home folder.
    """
    if override := os.environ.get(CACHE):
        return Path(override).absolute()
    folder = Path("~")  # stands for a missing home folder
    with suppress(RuntimeError):
        folder = platformdirs.user_cache_path(APP, appauthor=False)
    if folder.parts[0] == "~":
        raise ConfigError(
            "there is no place for the cache: HOME is not set, and this user has no home folder",
            remedy=f"set the environment variable {CACHE} to a folder",
        )
    return folder


def imported_dir(cache: Path) -> Path:
    """The folder for definitions of images that ``vmsandbox images import`` has brought in."""
    return cache / "imported"


def runtime_dir() -> Path:
    """The folder for files of the current runs. It is private to the user.

    It is ``$XDG_RUNTIME_DIR/vmsandbox`` if this user owns that folder. After ``su``, somebody else may
    own it. Otherwise it is below the folder for temporary files. ``VMSANDBOX_RUNTIME`` overrides it.
    """
    if override := os.environ.get(RUNTIME):
        return Path(override).absolute()
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        with suppress(OSError):
            status = Path(base).stat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                return Path(base) / APP
    return Path(tempfile.gettempdir()) / f"{APP}-{os.getuid()}"


def lock_file(rootdir: Path) -> Path | None:
    """The lock file of a project, whose rootdir is pytest's; None without one."""
    file = rootdir / LOCK_FILE
    return file if os.path.lexists(file) else None


@contextmanager
def usable(folder: Path, variable: str) -> Iterator[None]:
    """Report errors of a folder together with the environment variable that can name another one.

    Raises:
        ConfigError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be used: {error.strerror or error}",
            remedy=f"set the environment variable {variable} to another folder",
        ) from error
