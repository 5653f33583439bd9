"""Builds an image: runs its recipe under a supervisor, and puts the result into the store."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.store import (
    DISK,
    HOST_KEY,
    LOG,
    BuiltImage,
    ImageState,
    ImageStore,
    build_command,
    files_of,
)
from pytest_vmsandbox.core import deadline
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.spec import GIB, format_size

ROOM_FOR_A_DISK = 3 * GIB
PROGRESS = b"== "  # starts those lines of a recipe's output that tell people about progress

_SUPERVISOR = os.fspath(Path(__file__).with_name("supervisor.py"))
LARGE_TMP = "/var/tmp"  # noqa: S108  # folders in it are made safely; /tmp is often memory
_TAIL = 20  # lines of the output in an error
# One line, as ssh-keygen writes it. Each key of that type begins with its name and size.
_HOST_KEY = re.compile(rb"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI[A-P][A-Za-z0-9+/]{42}( [^\n]*)?\n")


def build(
    definition: ImageDefinition,
    store: ImageStore,
    *,
    progress: Callable[[str], None],
    force: bool = False,
) -> BuiltImage:
    """Build an image, unless it is built.

    If several processes build the same image, one builds it and the others wait.

    Args:
        definition: what to build.
        store: where to put it.
        progress: gets lines for people about the progress.
        force: build it even if it is built.

    Returns:
        The built image. Older builds with its name are removed, unless guests use them.

    Raises:
        ImageError: a program that the recipe needs is missing, the disk is too full, the recipe
            failed or left files out, or guests use the image to be replaced.
        CacheError: the image cannot be kept.
        ConfigError: a file of the definition cannot be read.
        TeardownError: temporary files or older builds cannot be removed.
    """
    name = definition.name
    if not force and store.state(definition) is ImageState.BUILT:  # it may be damaged and in use
        progress(f"{name} is built")
        return store.require(definition)
    maker = _Maker(definition, store, progress)
    image = store.make(
        store.key(definition),
        maker.fill,
        on_busy=lambda: progress(f"waiting: another process is building {name}"),
        replace=force,
    )
    if not maker.is_used:
        progress(f"{name} is built")
    store.discard(folder for folder in store.folders_of(name) if folder != image.folder)
    return image


@dataclasses.dataclass
class _Maker:
    """Makes an image if the store asks for it."""

    definition: ImageDefinition
    store: ImageStore
    progress: Callable[[str], None]
    is_used: bool = False

    def fill(self, out: Path, lock: int) -> dict[str, object]:
        """Put the files of an image into a folder. Returns the content of the record."""
        self.is_used = True
        definition = self.definition
        _check_programs(definition)
        log = self.store.failed_log(definition.name)
        # The user namespaces of mmdebstrap must reach this folder, and they cannot reach the cache.
        base = Path(os.environ.get("TMPDIR") or LARGE_TMP)
        with self.store.work_folder(definition.name, base) as work:
            if definition.disk_size is not None:
                check_room((out, work), ROOM_FOR_A_DISK)
            try:
                self._run(out, work, log, lock)
                _check(out, definition)
            except OSError as error:
                raise ImageError(f"building {definition.name!r} failed: {error}") from error
            except ImageError as error:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                end = "\n".join((f"--- last lines of {log}", *lines[-_TAIL:]))
                error.details = f"{error.details}\n{end}".strip()
                error.remedy = error.remedy or f"read {log}, correct the cause, and build it again"
                raise
        log.replace(out / LOG)
        return {
            "name": definition.name,
            "digest": definition.digest,
            "built": deadline.wall(),
            "definition": definition.record(),
        }

    def _run(self, out: Path, work: Path, log: Path, lock: int) -> None:
        """Run the recipe. Afterwards nothing that it started is left.

        Raises:
            ImageError: the recipe failed.
        """
        definition = self.definition
        environment = {
            **os.environ,
            "LC_ALL": "C.UTF-8",
            "PATH": programs.search_path(),
            "TMPDIR": os.fspath(work),
            "VMSANDBOX_OUT": os.fspath(out),
            "VMSANDBOX_WORK": os.fspath(work),
        }
        argv = [
            *(sys.executable, "-I", "-S", _SUPERVISOR, str(os.getpid()), str(lock)),
            *_own_namespaces(),
            os.fspath(definition.folder.absolute() / definition.recipe),
        ]
        with (
            log.open("wb", buffering=0) as output,
            subprocess.Popen(
                argv,
                cwd=definition.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal is ours alone
                pass_fds=(lock,),
                umask=0o022,
            ) as process,
        ):
            try:
                for line in process.stdout or ():
                    output.write(line)
                    if line.startswith(PROGRESS):
                        self.progress(line.removeprefix(PROGRESS).decode(errors="replace").strip())
                status = process.wait()
            finally:
                process.terminate()
                process.wait()
        if status != 0:
            # A status below 0: the supervisor itself was killed.
            killed = status - 128 if status > 128 else -status
            ended = f"signal {killed}" if killed > 0 else f"status {status}"
            raise ImageError(f"building {definition.name!r} failed: its recipe ended with {ended}")


def check_room(folders: Iterable[Path], needed: int) -> None:
    """Check that `needed` bytes are free on the disk of each folder.

    Raises:
        ImageError: fewer bytes are free.
    """
    for folder in folders:
        if (free := shutil.disk_usage(folder).free) < needed:
            raise ImageError(
                f"only {format_size(free)} are free in {folder}; a build needs "
                f"{format_size(needed)}",
                remedy="make room there, or set the environment variables VMSANDBOX_CACHE and TMPDIR "
                "to folders on a larger disk",
            )


def _check_programs(definition: ImageDefinition) -> None:
    if sys.platform != "linux":
        raise ImageError(
            f"image {definition.name!r} can be built on Linux only",
            remedy=f"build it on a Linux machine, and copy the folder images/{definition.name} from "
            "that machine's cache to the cache here",
        )
    if missing := programs.missing(programs.with_theirs(definition.requires)):
        packages = sorted({programs.package_of(program) for program in missing})
        raise ImageError(
            f"building {definition.name!r} needs programs that are missing: {', '.join(missing)}",
            remedy=programs.install_line(packages),
        )


def _own_namespaces() -> list[str]:
    """The start of a command line that gives a program its own process and mount namespaces.

    It is for root only. Recipes of other users make no mounts outside of user namespaces, and
    newuidmap would refuse to run in this one.
    """
    command = ["unshare", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child", "--"]
    if os.geteuid() != 0 or shutil.which(command[0]) is None:
        return []
    works = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if works else []  # most containers do not allow it


def _check(out: Path, definition: ImageDefinition) -> None:
    """Check the files of an image.

    Raises:
        ImageError: a file is missing, empty, unreadable or unexpected; or the definition has changed
            meanwhile.
    """
    if definition.reread().digest != definition.digest:
        raise ImageError(
            f"the definition of {definition.name!r} changed while it was being built",
            remedy=build_command(definition.name),
        )
    wrong = []
    for name in files_of(definition):
        file = out / name
        if file.is_symlink() or not file.is_file():
            wrong.append(f"{name} is missing or not a regular file")
        elif file.stat().st_size == 0 or not os.access(file, os.R_OK):
            wrong.append(f"{name} is empty or cannot be read")
        elif name == HOST_KEY and not _HOST_KEY.fullmatch(file.read_bytes()):
            wrong.append(f"{name} is not one line with an ssh-ed25519 key")
    if definition.disk_size is None and (out / DISK).exists():
        wrong.append(f"{DISK} is there, but image.toml has no [disk]")
    if wrong:
        raise ImageError(
            f"the recipe of {definition.name!r} ended, but its image is not complete",
            details="\n".join(wrong),
            remedy=f"correct the recipe, {definition.folder / definition.recipe}",
        )
