"""A session's process: sets it up, and runs pytest in it."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys

from .apart import ASIDE, aside, keep_apart, leave_modules
from .wire import Wire

TYPE_CHECKING = False  # known to type checkers; importing typing takes long in a guest
if TYPE_CHECKING:
    from typing import Any

shared_sys: Any = sys
keep_apart(globals())

MAX_SNAPSHOT = 5_000  # files and folders of a tree; a session does not check larger trees
DUMP = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR1


def run(config: dict[str, Any], sock: socket.socket, messages: int, *outputs: int) -> int:
    """Run a session in this process, which the supervisor has forked, and return pytest's exit status.

    Args:
        config: ``args`` for pytest, ``wanted`` (the plugins to load; empty for those of ``plugins`` that
            are installed), ``options`` (name → value) to set, ``ini`` (a list of
            ``[names of a key, value]``), ``path`` for `sys.path`, ``junit`` (the family of the host's
            junit file, if it writes one), ``outcomes`` (further outcomes that plugins of the host know),
            ``alone`` (whether each attempt at a test has a guest of its own), ``measure`` (coverage's
            options, to measure coverage) and ``tree`` (of this folder), ``fixtures`` (name → value),
            ``programs`` for ``PATH``, ``cwd``, ``environment``, ``details`` (files whose items are
            described in full, because the host could not collect them), ``logs`` (whether the host wants
            log records), ``allure`` (the folder of its files), ``machine`` (whether benchmarks include
            the machine).
        sock, messages: see `Wire`.
        outputs: the descriptors of standard output and error.
    """
    wire = Wire(sock, messages)
    take_streams(*outputs)
    os.environ["PATH"] = config["programs"] + os.pathsep + os.environ.get("PATH", os.defpath)
    os.environ.update(config["environment"])
    os.chdir(config["cwd"])
    sys.path[:0] = config["path"]
    sys.argv[:] = ["pytest", *config["args"]]
    measuring = None
    if config.get("measure"):
        from .measuring import CoverageTracer

        measuring = CoverageTracer(config["measure"])

    import pytest

    from .control import Control, fixtures_of, installed_plugins

    leave_modules()
    control = Control(config, wire)
    before = snapshot(config["tree"]) if config.get("alone") else None
    plugins = config.get("wanted") or installed_plugins(config["plugins"])
    args = [arg for name in plugins for arg in ("-p", name)] + config["args"]
    ours: list[Any] = [control, control.reporter, fixtures_of(config["fixtures"])]
    if measuring is not None:
        ours.append(measuring.plugin())
    status = int(pytest.main(args, plugins=ours))
    if measuring is not None:
        measuring.tell(wire, os.path.realpath(config["tree"]))
    # Only a woken session is surely the first in its guest, so it has seen all that was written.
    if control.awake and before is not None and snapshot(config["tree"]) == before:
        wire.say({"untouched": True})
    return status


def take_streams(*outputs: int) -> None:
    """Set up descriptors, streams and signals as in a new program."""
    os.setpgid(0, 0)
    protect("0")
    if os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    for number, fd in enumerate((os.open(os.devnull, os.O_RDONLY), *outputs)):
        os.dup2(fd, number)
    # A separate descriptor, because pytest uses 2 while a test runs.
    private = aside(os.dup(2))
    os.closerange(3, ASIDE)  # those of the supervisor
    # Opened as Python does, by the locale.
    shared_sys.stdin = open(0, closefd=False)  # noqa: PLW1514
    shared_sys.stdout = open(1, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: PLW1514
    shared_sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: PLW1514
    for name in ("stdin", "stdout", "stderr"):
        setattr(shared_sys, f"__{name}__", getattr(shared_sys, name))
    faulthandler.enable(file=private)
    faulthandler.register(DUMP, file=private, all_threads=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def protect(score: str) -> None:
    """Tell the kernel which process to kill if memory runs out."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write(score)
    except OSError:
        pass


def snapshot(folder: str) -> dict[str, tuple[int, ...]] | None:
    """A value that differs if anything in a folder has changed. Python's caches do not count.

    None if there are too many files, or they cannot be read: then the host has to check.
    """
    found: dict[str, tuple[int, ...]] = {}
    folders = [folder]
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if is_folder:
                        if entry.name == "__pycache__":
                            continue
                        folders.append(entry.path)
                    status = entry.stat(follow_symlinks=False)
                    found[entry.path] = (
                        (status.st_mode,)  # a cache changes the times of the folder that it is in
                        if is_folder
                        else (status.st_mode, status.st_ino, status.st_size, status.st_ctime_ns)
                    )
                    if len(found) > MAX_SNAPSHOT:
                        return None
    except OSError:
        return None
    return found
