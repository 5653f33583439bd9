"""Where our files lie on this machine."""

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


def cache_dir() -> Path:
    """The user's cache: images, templates and so on. ``VMSANDBOX_CACHE`` overrides it.

    Raises:
        ConfigError: this user has no home.
    """
    if override := os.environ.get(CACHE):
        return Path(override).absolute()
    folder = Path("~")  # what is left where there is no home
    with suppress(RuntimeError):
        folder = platformdirs.user_cache_path(APP, appauthor=False)
    if folder.parts[0] == "~":
        raise ConfigError(
            "there is no place for the cache: HOME is not set, and this user has no home",
            remedy=f"name a folder in {CACHE}",
        )
    return folder


def runtime_dir() -> Path:
    """The folder of what lives as long as a run, private to the user.

    It is ``$XDG_RUNTIME_DIR/vmsandbox`` where that is a folder of this user (after ``su`` it may
    be another's), else one under the folder for temporary files. ``VMSANDBOX_RUNTIME`` overrides
    it.
    """
    if override := os.environ.get(RUNTIME):
        return Path(override).absolute()
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        with suppress(OSError):
            status = Path(base).stat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                return Path(base) / APP
    return Path(tempfile.gettempdir()) / f"{APP}-{os.getuid()}"


@contextmanager
def usable(folder: Path, variable: str) -> Iterator[None]:
    """While something is made or opened in a folder that an environment variable can name.

    Raises:
        ConfigError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be used: {error.strerror or error}",
            remedy=f"name another folder in {variable}",
        ) from error
