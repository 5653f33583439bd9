"""Runs programs that read what strangers made, such as ``qemu-img``, where they can do no harm.

In the jail are name spaces of its own (users, mounts, processes, network, IPC), a root in memory with the
system's programs and libraries, and the files that were handed in: nothing else of this machine. The program
has no capabilities and cannot get any. It ends when its time is over, when it writes too much, and when this
process ends. Where the system does not allow such a jail, nothing runs.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.catalogue.importing.source import SourceFile
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.spec import GIB
from pytest_vmsandbox.core.text import printable

_CELL = os.fspath(Path(__file__).with_name("cell.py"))
_MEMORY = 4 * GIB  # of addresses
_DESCRIPTORS = 2048  # a large disk can have a file for each 2 GiB
_LOOK_SECONDS = 0.25
_KEPT = 4096  # bytes of the output
_NOT_SEALED = "not read-only"  # the step of cell.py that found something that could be changed
_CUSTOM = "replaced"  # the step of cell.py that tells that a file is another one now
_REMEDY = (
    "allow user name spaces: `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu), "
    "`sudo sysctl kernel.unprivileged_userns_clone=1` (Debian), `sudo sysctl user.max_user_namespaces=15000`; "
    "for a container, start it with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined "
    "--security-opt systempaths=unconfined`. Or import on another machine, and copy the folder of the image "
    "from that machine's cache"
)


@dataclass(frozen=True)
class Bind:
    """A file that the program in the jail can see.

    Attributes:
        file: the file, open here.
        target: its path in the jail.
        writable: whether the program may write to it.
    """

    file: SourceFile
    target: str
    writable: bool = False


@dataclass(frozen=True)
class Ended:
    """How a program in the jail ended: its exit status (128 + N for signal N), and the end of its output."""

    status: int
    output: str


def run(
    argv: Sequence[str],
    binds: Sequence[Bind],
    *,
    work: Path,
    seconds: float,
    file_size: int,
    check: Callable[[], None] = lambda: None,
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = None,
) -> Ended:
    """Run a program in the jail.

    Args:
        argv: the program by its absolute path, and its arguments.
        binds: the files that it can see.
        work: a folder for temporary files.
        seconds: after which it is killed.
        file_size: the largest file, in bytes, that it can write.
        check: called a few times a second. What it raises ends the program.
        stdin: a descriptor for its standard input.
        stdout: a descriptor for its standard output, which otherwise is part of `Ended.output`.

    Raises:
        ImageError: the jail cannot be made here, or the time is over.
    """
    with (
        _new_root(work) as root,
        _plan(argv, binds, root, seconds, file_size) as plan,
        _Pipe() as failed,
        _Pipe() as alive,
        _Pipe() as output,
    ):
        told = (
            failed.writing,
            alive.reading,
            plan,
        )  # only we can write to `alive`: it closes with us
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", _CELL, *map(str, told)],
            stdin=stdin,
            stdout=output.writing if stdout is None else stdout,
            stderr=output.writing,
            pass_fds=told,
            start_new_session=True,
        )
        try:
            failed.close_writing()
            output.close_writing()
            text = _read(output.reading, Deadline(seconds), check, argv[0])
            code = process.wait()
        finally:
            _end(process, output.reading)
        refused = os.read(failed.reading, 4096)
    if refused:
        raise _refused(json.loads(refused), argv[0])
    return Ended(code, text)


@contextmanager
def _new_root(work: Path) -> Iterator[Path]:
    """An empty folder, on which the new root is mounted, for the program only."""
    root = Path(tempfile.mkdtemp(prefix="root-", dir=work))
    try:
        yield root
    finally:
        root.rmdir()


@contextmanager
def _plan(
    argv: Sequence[str], binds: Sequence[Bind], root: Path, seconds: float, file_size: int
) -> Iterator[int]:
    """What cell.py is told, as the descriptor of a file in memory: it can be too long for an argument."""
    plan = {
        "root": os.fspath(root.absolute()),
        "argv": list(argv),
        "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/"},
        "limits": {
            "FSIZE": file_size,
            "AS": _MEMORY,
            "CPU": int(seconds) + 1,
            "CORE": 0,
            "NOFILE": _DESCRIPTORS,
        },
        "binds": [
            {
                "path": os.fspath(bind.file.path.absolute()),
                "device": bind.file.status.st_dev,
                "inode": bind.file.status.st_ino,
                "target": bind.target,
                "writable": bind.writable,
            }
            for bind in binds
        ],
    }
    with os.fdopen(os.memfd_create("plan"), "r+", encoding="utf-8") as file:
        json.dump(plan, file)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        yield file.fileno()


class _Pipe:
    """The two ends of a pipe, each closed once."""

    def __enter__(self) -> Self:
        self.reading, self.writing = os.pipe2(os.O_CLOEXEC)
        self._is_open = True
        return self

    def close_writing(self) -> None:
        """Close the writing end, if it is open."""
        if self._is_open:
            self._is_open = False
            os.close(self.writing)

    def __exit__(self, *_: object) -> None:
        self.close_writing()
        os.close(self.reading)


def _end(process: subprocess.Popen[bytes], output: int) -> None:
    """End the cell, and wait until the program in it is gone, too: it closes the output."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
    while os.read(output, 1 << 16):
        pass


def _read(output: int, deadline: Deadline, check: Callable[[], None], program: str) -> str:
    """What the program says, up to its end. Only the last of it is kept."""
    kept = b""
    while True:
        if select.select([output], [], [], deadline.remaining(_LOOK_SECONDS))[0]:
            data = os.read(output, 1 << 16)
            if not data:
                return printable(kept.decode(errors="replace")).strip()
            kept = (kept + data)[-_KEPT:]
        if deadline.expired:
            raise ImageError(
                f"{Path(program).name} took more than {deadline.seconds:.0f} s, and was ended",
                remedy="try again when this machine is less busy; if it is not, the file is damaged",
            )
        check()


def _refused(told: dict[str, object], program: str) -> ImageError:
    step, number = told["step"], told["errno"]
    why = os.strerror(number) if isinstance(number, int) and number else ""
    if step == _CUSTOM:
        return ImageError(
            "a file was replaced by another one while it was imported",
            remedy="import it again when nothing writes to its folder",
        )
    if step == "open":
        return ImageError(
            f"a file cannot be read in the jail: {why}",
            details="The jail has none of root's rights to files of other users.",
            remedy="copy it to a folder of yours, or run this command as the user whom it belongs to",
        )
    if step == "exec" and number == errno.ENOENT:
        return ImageError(
            f"{program} cannot run in the jail: it is not below /usr",
            remedy="install it with the package manager of this system",
        )
    if str(step).startswith(_NOT_SEALED):
        return ImageError(
            f"{Path(program).name} was not started: its jail is {step}",
            details="It reads files from strangers, and could have changed files of this machine.",
            remedy="import on another machine, and copy the folder of the image from that machine's cache. "
            "Please report it, with what `findmnt` shows",
        )
    return ImageError(
        f"{Path(program).name} cannot run in a jail here: {step}{f': {why}' if why else ''}",
        details="It reads files from strangers, so it does not run without one.",
        remedy=_REMEDY,
    )


def program(name: str) -> str:
    """The path of a program that can run in the jail.

    Raises:
        ImageError: it is not installed, or the jail cannot be made on this system.
    """
    if sys.platform != "linux":
        raise ImageError(
            "disks can be imported on Linux only",
            remedy="import it on a Linux machine, and copy the folder of the image from its cache",
        )
    found = programs.find(name)
    if found is None:
        raise ImageError(
            f"{name} is missing: it is needed to import this file",
            remedy=programs.install_line([programs.package_of(name)]),
        )
    return os.fspath(Path(found).resolve())
