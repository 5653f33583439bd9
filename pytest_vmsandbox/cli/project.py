"""The project in the current folder, as pytest sees it: its rootdir, its images, its lock file."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from pytest_vmsandbox.catalogue.lock import Lock, read_or_empty
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.paths import LOCK_FILE, lock_file

_PLUGIN = "pytest_vmsandbox.plugin.describing"  # pytest imports it, not we
_COLLECTED = (0, 5)  # pytest's statuses: tests were collected, or there are none
_TAIL = 15  # lines of pytest's output in an error


@dataclass(frozen=True, kw_only=True)
class Project:
    """A project.

    Attributes:
        rootdir: of pytest.
        images: the images that its configuration selects, and those that its tests' markers name.
        image_path: folders with its image definitions.
    """

    rootdir: Path
    images: tuple[str, ...]
    image_path: tuple[Path, ...]

    @property
    def lock(self) -> Lock:
        """Its lock, without images if there is no file.

        Raises:
            ConfigError: the file cannot be read.
        """
        return read_or_empty(self.rootdir / LOCK_FILE)

    @property
    def is_locked(self) -> bool:
        """Whether it has a lock file."""
        return lock_file(self.rootdir) is not None


def project_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that find a project. The function gets them as `where`, for `ask`."""

    @click.option(
        "--rootdir",
        metavar="DIR",
        type=click.Path(exists=True, file_okay=False),
        help="The project's rootdir, as for pytest (default: what pytest finds from here).",
    )
    @click.option(
        "-c",
        "--config-file",
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False),
        help="The project's ini file, as for pytest (default: what pytest finds from here).",
    )
    @wraps(function)
    def command(*args: Any, rootdir: str | None, config_file: str | None, **others: Any) -> None:
        given = {"--rootdir": rootdir, "-c": config_file}
        where = [word for name, value in given.items() if value for word in (name, value)]
        function(*args, where=where, **others)

    return command


def ask(where: list[str], say: Callable[[str], object] | None = None) -> Project:
    """Ask pytest about the project in the current folder. It takes half a second.

    Args:
        where: options of pytest.
        say: gets a line if tests cannot be collected; None to not collect them. Then the images that
            only markers name are unknown.

    Raises:
        ConfigError: pytest cannot start here, or what the project selects is invalid.
    """
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:
        file = Path(folder, "answer")
        plugins = ["-p", "vmsandbox", "-p", _PLUGIN]
        collect = [] if say is None else ["--collect-only", "-q"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *plugins, f"--vm-answer={file}", *collect, *where],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        try:
            answer: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                "pytest cannot say which images this project uses",
                details="\n".join(done.stdout.strip().splitlines()[-_TAIL:]),
                remedy="run 'pytest --vm-list' here, and correct what it says. To name another project, "
                "use --rootdir and -c as for pytest",
            ) from error
    if wrong := answer.get("error"):
        brief, details, remedy = wrong
        raise ConfigError(brief, details=details, remedy=remedy)
    if say is not None and done.returncode not in _COLLECTED:
        say(
            "some tests cannot be collected here, so images that only their markers name are unknown. "
            "'pytest --collect-only' says why"
        )
    return Project(
        rootdir=Path(answer["rootdir"]),
        images=tuple(answer["images"]),
        image_path=tuple(map(Path, answer["image_path"])),
    )


def lock_here(where: list[str]) -> tuple[Lock | None, tuple[Path, ...]]:
    """The lock of the project in the current folder, and its folders of images; none without a lock.

    pytest is asked only if there may be one: here, in a folder above, or where `where` points.

    Raises:
        ConfigError: pytest cannot start here, or the lock cannot be read.
    """
    here = Path.cwd()
    if not where and not any(map(lock_file, (here, *here.parents))):
        return None, ()
    project = ask(where)
    return (project.lock, project.image_path) if project.is_locked else (None, ())


def joined(*folders: Iterable[Path]) -> tuple[Path, ...]:
    """Folders of images from several places, each once."""
    return tuple(dict.fromkeys(path.absolute() for paths in folders for path in paths))
