"""Builds an image: has it made, by its recipe or otherwise, and puts the result into the store."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pytest_vmsandbox.catalogue import emulator, helpers, programs
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.making import SECOND_STAGE, Build, Maker
from pytest_vmsandbox.catalogue.own import HELPER_VARIABLE
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
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.spec import GIB, KIB, format_size
from pytest_vmsandbox.core.text import printable

ROOM_FOR_A_DISK = 3 * GIB
LARGE_TMP = "/var/tmp"  # noqa: S108  # folders in it are made safely; /tmp is often memory
_TAIL = 20  # lines of the output in an error
_TAIL_SIZE = 64 * KIB  # bytes of the output that they are taken from
_TAIL_WIDTH = 500  # characters of each of them
# One line, as ssh-keygen writes it. Each key of that type begins with its name and size.
_HOST_KEY = re.compile(rb"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI[A-P][A-Za-z0-9+/]{42}( [^\n]*)?\n")


def build(
    definition: ImageDefinition,
    store: ImageStore,
    make: Maker | None = None,
    *,
    progress: Callable[[str], None],
    force: bool = False,
) -> BuiltImage:
    """Build an image, unless it is built.

    If several processes build the same image, one builds it and the others wait.

    Args:
        definition: what to build.
        store: where to put it.
        make: fills the image's folder; None to run the definition's recipe.
        progress: gets lines for people about the progress.
        force: build it even if it is built.

    Returns:
        The built image. Older builds with its name and architecture are removed, unless guests use them.

    Raises:
        ImageError: a program that the recipe needs is missing, the disk is too full, the maker
            failed or left files out, or guests use the image to be replaced.
        CacheError: the image cannot be kept.
        ConfigError: a file of the definition cannot be read.
        TeardownError: temporary files or older builds cannot be removed.
    """
    name = definition.name
    if not force and store.state(definition) is ImageState.BUILT:  # it may be damaged and in use
        progress(f"{name} is built")
        return store.require(definition)
    filler = _Filler(definition, store, make or run_recipe, progress)
    image = store.make(
        store.key(definition),
        filler.fill,
        on_busy=lambda: progress(f"waiting: another process is building {name}"),
        replace=force,
        is_current=store.is_current,
    )
    if not filler.is_used:
        progress(f"{name} is built")
    older = store.folders_of(name, definition.architecture)
    store.discard(folder for folder in older if folder != image.folder)
    return image


@dataclasses.dataclass
class _Filler:
    """Has an image made if the store asks for it."""

    definition: ImageDefinition
    store: ImageStore
    make: Maker
    progress: Callable[[str], None]
    is_used: bool = False

    def fill(self, out: Path, lock: int) -> dict[str, object]:
        """Put the files of an image into a folder. Returns the content of the record."""
        self.is_used = True
        name = self.definition.name
        log = self.store.failed_log(name)
        # The user namespaces of mmdebstrap must reach this folder, and they cannot reach the cache.
        base = Path(os.environ.get("TMPDIR") or LARGE_TMP)
        with (
            self.store.work_folder(name, base) as work,
            log.open("wb", buffering=0) as output,
        ):
            build = Build(
                definition=self.definition,
                out=out,
                cache=self.store.root.parent,
                work=work,
                log=output,
                lock=lock,
                progress=self.progress,
            )
            try:
                more = self._made(build)
            except OSError as error:
                raise ImageError(f"building {name!r} failed: {error}") from error
            except ImageError as error:
                _add_end_of(log, error)
                raise
        log.replace(out / LOG)
        return {
            **more,
            "name": name,
            "digest": self.definition.digest,
            "built": deadline.wall(),
            "definition": self.definition.record(),
        }

    def _made(self, build: Build) -> Mapping[str, object]:
        if self.definition.disk_size is not None:
            check_room((build.out, build.work), ROOM_FOR_A_DISK)
        more = self.make(build)
        if self.definition.reread().digest != self.definition.digest:
            raise ImageError(
                f"the definition of {self.definition.name!r} changed while it was being built",
                remedy=build_command(self.definition),
            )
        _check(build.out, self.definition)
        return more


def _add_end_of(log: Path, error: ImageError) -> None:
    """Add the last lines of a build's log to the error that ended the build."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_SIZE))
        text = printable(file.read().decode(errors="replace"))
    if lines := [_cut(line) for line in text.splitlines()[-_TAIL:]]:
        end = "\n".join((f"--- last lines of {log}", *lines))
        error.details = f"{error.details}\n{end}".strip()
        error.remedy = error.remedy or f"read {log}, correct the cause, and build it again"


def _cut(line: str) -> str:
    return line if len(line) <= _TAIL_WIDTH else f"{line[:_TAIL_WIDTH]}…"


def run_recipe(
    build: Build, before_guest: Callable[[], object] = lambda: None
) -> Mapping[str, object]:
    """Make an image with the recipe of its definition. Afterwards nothing that it started is left.

    Args:
        build: what is built.
        before_guest: is called before the recipe starts if a guest will have to complete the image.

    Raises:
        ImageError: a program is missing, or the recipe failed.
    """
    definition = build.definition
    _check_programs(build)
    architecture = ARCHITECTURES[definition.architecture]
    ours = _programs(build)
    if ours[emulator.VARIABLE] == emulator.NONE:
        before_guest()
    environment = {
        **os.environ,
        "LC_ALL": "C.UTF-8",
        "PATH": programs.search_path(),
        "TMPDIR": os.fspath(build.work),
        "VMSANDBOX_ARCHITECTURE": architecture.name,
        "VMSANDBOX_DEBIAN_ARCHITECTURE": architecture.debian,
        "VMSANDBOX_CONSOLE": architecture.console,
        "VMSANDBOX_PYTHON": sys.executable,
        **ours,
        "VMSANDBOX_OUT": os.fspath(build.out),
        "VMSANDBOX_WORK": os.fspath(build.work),
    }
    recipe = os.fspath(definition.folder.absolute() / definition.recipe)
    status = build.run([*_own_namespaces(), recipe], cwd=definition.folder, env=environment)
    if status != 0:
        ended = f"signal {status - 128}" if status > 128 else f"status {status}"
        raise ImageError(f"building {definition.name!r} failed: its recipe ended with {ended}")
    return {}


def _programs(build: Build) -> dict[str, str]:
    """The variables with the helper, and with the emulator, for a recipe that names them."""
    definition = build.definition
    found = {HELPER_VARIABLE: "", emulator.VARIABLE: "", emulator.REGISTRATION: ""}
    if not helpers.is_named_by(definition):
        return found
    architecture = definition.architecture
    helper = os.fspath(helpers.helper_program(architecture, build.cache, say=build.say))
    found[HELPER_VARIABLE] = helper
    if helpers.is_named_by(definition, emulator.VARIABLE) and not emulator.runs(helper):
        path = emulator.NONE
        if emulator.can_register():
            path = emulator.emulator(architecture, build.cache, say=build.say)
            found[emulator.REGISTRATION] = emulator.registration(architecture, path)
        found[emulator.VARIABLE] = path
    return found


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


def _check_programs(build: Build) -> None:
    definition = build.definition
    if sys.platform != "linux":
        raise ImageError(
            f"image {definition.name!r} can be built on Linux only",
            remedy=f"build it on a Linux machine, and copy the folder images/{definition.name} from "
            "that machine's cache to the cache here",
        )
    missing = programs.missing(programs.with_theirs(definition.requires))
    if helpers.is_named_by(definition):
        missing += helpers.lacking(definition.architecture, build.cache)
    if missing:
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
        ImageError: a file is missing, empty, unreadable or unexpected.
    """
    wrong = []
    for name in files_of(definition):
        file = out / name
        if file.is_symlink() or not file.is_file():
            wrong.append(f"{name} is missing or not a regular file")
        elif file.stat().st_size == 0 or not os.access(file, os.R_OK):
            wrong.append(f"{name} is empty or cannot be read")
        elif name == HOST_KEY and not _HOST_KEY.fullmatch(file.read_bytes()):
            wrong.append(f"{name} is not one line with an ssh-ed25519 key")
    if (out / SECOND_STAGE).exists():
        wrong.append("no guest has completed what the recipe has only unpacked")
    if definition.disk_size is None and (out / DISK).exists():
        wrong.append(f"{DISK} is there, but image.toml has no [disk]")
    if wrong:
        raise ImageError(
            f"the recipe of {definition.name!r} ended, but its image is not complete",
            details="\n".join(wrong),
            remedy=f"correct the recipe, {definition.folder / definition.recipe}",
        )
