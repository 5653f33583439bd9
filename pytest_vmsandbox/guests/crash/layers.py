"""Makes a qcow2 file with all that a state of a root disk adds to the content before the recording.

A root disk is too large to be copied as a raw file. The file goes on top of those with its content, and
the guest that boots from it writes into another one on top.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.errors import CacheError
from pytest_vmsandbox.guests.crash.building import Builder, copy, parts
from pytest_vmsandbox.guests.crash.recording import Content
from pytest_vmsandbox.guests.crash.states import History, State
from pytest_vmsandbox.machine.hypervisor import Hypervisor

_WRITE_SECONDS = 600.0
_PROMPT = "qemu-io> "


def write_layer(
    before: Content,
    log: IO[bytes],
    history: History,
    state: State,
    *,
    target: IO[bytes],
    hypervisor: Hypervisor,
) -> None:
    """Write what a state adds to the content before the recording.

    Args:
        log: the log file.
        target: an empty qcow2 file of the disk's size, see `empty_overlay`.
        hypervisor: has the folder for files that are needed meanwhile.

    Raises:
        ConfigError: no power cut in this recording leaves that state.
        CacheError: it cannot be written.
    """
    with ExitStack() as stack:
        # All that is written is put together in a file that has holes elsewhere.
        folder = stack.enter_context(hypervisor.scratch("crash"))
        changes = stack.enter_context((folder / "changes").open("x+b", buffering=0))
        changes.truncate(before.size)
        builder = stack.enter_context(Builder(changes, log, history, folder))
        stack.enter_context(builder.state(state))
        commands = []
        for start, end in _written(history, state):
            done = start
            for first, last in [*parts(changes, start, end), (end, end)]:
                if done < first:
                    commands.append(f"write -q -z {done} {first - done}")
                if first < last:
                    name = f"{len(commands)}"  # relative, so it needs no quotes
                    with (folder / name).open("xb", buffering=0) as piece:
                        copy(changes, first, piece, 0, last - first)
                    commands.append(f"write -q -s {name} {first} {last - first}")
                done = last
        _run(before, target, commands, folder)


def _written(history: History, state: State) -> Iterator[tuple[int, int]]:
    """The ranges of the disk that are written before the power cut, ascending, as first and last + 1."""
    durable = history.entries[: history.floor(state.point)]
    places = [(it.offset, it.length) for it in durable]
    places += [(it.offset, it.length) for it in history.extents(state)]
    start = end = 0
    for offset, last in sorted((offset, offset + length) for offset, length in places):
        if offset > end:
            yield start, end
            start = offset
        end = max(end, last)
    yield start, end


def _run(before: Content, target: IO[bytes], commands: list[str], folder: Path) -> None:
    """Let qemu-io write into a qcow2 file on top of the content before the recording."""
    name = f"/proc/self/fd/{target.fileno()}"
    node = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": name},
        "backing": before.node(),
    }
    try:
        done = subprocess.run(
            ["qemu-io", "-t", "unsafe", f"json:{json.dumps(node)}"],
            check=True,
            input="".join(f"{command}\n" for command in commands),
            capture_output=True,
            timeout=_WRITE_SECONDS,
            cwd=folder,
            encoding="utf-8",
            errors="replace",
            pass_fds=[*(file.fileno() for file in before.files()), target.fileno()],
        )
        failed = done.stderr + done.stdout.replace(_PROMPT, "").strip()  # its status tells nothing
    except (subprocess.SubprocessError, OSError) as error:
        failed = str(getattr(error, "stderr", None) or error)
    if failed:
        raise CacheError(
            "qemu-io could not write a state of the disk",
            details=failed,
            remedy=f"make room in the cache, or set the environment variable {paths.CACHE} to another folder",
        )
