"""What a maker of an image works with: one build, its folders, its log and its programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.spec import KIB, MIB, format_size
from pytest_vmsandbox.core.text import one_line, printable

PROGRESS = b"== "  # starts those lines of a program's output that tell people about progress
# A recipe leaves this file in the folder of the image if a guest has to complete the disk.
SECOND_STAGE = "second-stage"
LONGEST_LINE = 64 * KIB  # of a program's output; a longer one is handled in pieces

_MOST_OUTPUT = 64 * MIB  # of one build: its log becomes a part of the image
_SUPERVISOR = os.fspath(Path(__file__).with_name("supervisor.py"))


@dataclass(frozen=True, kw_only=True)
class Build:
    """One build of an image, while it lasts. The store's lock of that name is held.

    Attributes:
        definition: what is built.
        out: the empty folder to fill, in the cache. It becomes the image.
        cache: the user's cache.
        work: an empty folder for temporary files, which is removed afterwards. Other users' name
            spaces can reach it.
        log: the open file of the build's output.
        lock: the descriptor of the store's lock. A program that inherits it and outlives us still
            holds the lock.
        progress: gets lines for people.
    """

    definition: ImageDefinition
    out: Path
    cache: Path
    work: Path
    log: IO[bytes]
    lock: int
    progress: Callable[[str], None]

    def say(self, text: str) -> None:
        """Tell people about the progress, and write it into the log."""
        self.write(PROGRESS + one_line(text).encode() + b"\n")

    def write(self, line: bytes) -> None:
        """Write a line into the log. If it begins with `PROGRESS`, people see it, too.

        Raises:
            ImageError: the log is too large.
        """
        if self.log.tell() + len(line) > _MOST_OUTPUT:
            raise ImageError(
                f"making {self.definition.name!r} failed: its programs wrote more than "
                f"{format_size(_MOST_OUTPUT)} of output",
                remedy="let them write less, for instance into a file",
            )
        self.log.write(line)
        if line.startswith(PROGRESS):
            text = line.removeprefix(PROGRESS).decode(errors="replace")
            self.progress(printable(text).strip())

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> int:
        """Run a program of this machine to its end. Its output goes into the log.

        Afterwards nothing that it started is left. That holds even if this process is killed: the
        program is killed then, and the lock is held until it is gone.

        Args:
            argv: the program and its arguments.
            cwd: the folder that it starts in; None for `work`.
            env: its environment; None for ours, with the language of the output set.
            pass_fds: descriptors that it inherits.

        Returns:
            Its exit status; 128 + N for signal N.

        Raises:
            OSError: it cannot be started, or the log cannot be written.
            ImageError: it wrote too much.
        """
        with subprocess.Popen(
            _supervised(argv, self.lock),
            cwd=self.work if cwd is None else cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8"} if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal is ours alone
            pass_fds=(self.lock, *pass_fds),
            umask=0o022,
        ) as process:
            try:
                assert process.stdout is not None
                while line := process.stdout.readline(LONGEST_LINE):
                    self.write(line)
                status = process.wait()
            finally:
                process.terminate()
                process.wait()
        return status if status >= 0 else 128 - status  # below 0: the supervisor itself was killed


# Fills the folder of a build. Returns what its record has besides the definition.
Maker = Callable[[Build], Mapping[str, object]]


class Ended(NamedTuple):
    """How a program has ended.

    Attributes:
        why: why it failed; empty if it did not.
        output: what it has written, without control sequences.
    """

    why: str
    output: str


def run_to_end(
    argv: Sequence[str], folder: Path, env: Mapping[str, str], lock: int, seconds: float
) -> Ended:
    """Run a program of this machine to its end. Nothing that it started is left then, as with `Build.run`.

    Args:
        argv: the program and its arguments.
        folder: where it starts.
        env: its environment.
        lock: a descriptor that is held until all of it is gone, such as that of the store's lock.
        seconds: after which it is killed.
    """
    try:
        with subprocess.Popen(
            _supervised(argv, lock),
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        ) as process:
            try:
                written, _ = process.communicate(timeout=seconds)
            finally:
                process.terminate()
                process.wait()
    except subprocess.TimeoutExpired:
        return Ended(f"it did not end within {seconds:g} seconds", "")
    except OSError as error:
        return Ended(str(error), "")
    output = printable(written.decode(errors="replace")).strip()
    if process.returncode == 0:
        return Ended("", output)
    return Ended(output or f"it ended with status {process.returncode}", output)


def _supervised(argv: Sequence[str], lock: int) -> list[str]:
    """The command line that runs a program under the supervisor."""
    return [sys.executable, "-I", "-S", _SUPERVISOR, str(os.getpid()), str(lock), *argv]
