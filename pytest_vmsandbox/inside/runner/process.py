"""A session's process: what it is given, and pytest in it."""

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

MAX_SNAPSHOT = 5_000  # files and folders of a tree that a session looks through itself
DUMP = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR1


def run(config: dict[str, Any], sock: socket.socket, messages: int, *outputs: int) -> int:
    """Run a session in this process, which the supervisor has forked, and return pytest's exit status.

    Args:
        config: ``args`` for pytest, ``wanted`` (the plugins that it loads; empty for those of ``plugins``
            that are installed), ``options`` (name → value) to set, ``ini`` (a list of
            ``[names of a key, value]``), ``path`` for `sys.path`, ``junit`` (the family of the host's
            junit file, if it writes one), ``outcomes`` (that plugins of the host know besides pytest's),
            ``alone`` (whether each attempt at a test has a guest of its own), ``measure`` (coverage's
            options, if it is measured) and ``tree`` (of what), ``fixtures`` (name → value), ``programs``
            for ``PATH``, ``cwd``, ``environment``, ``details`` (files of whose items all is told, since
            the host could not collect them), ``logs`` (whether the host wants records of logs),
            ``allure`` (the folder of its files), ``machine`` (whether benchmarks tell of theirs).
        sock, messages: see `Wire`.
        outputs: the descriptors to which standard output and error go.
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
    # One that was not woken may be the second in its guest, and has not seen what the first has written.
    if control.awake and before is not None and snapshot(config["tree"]) == before:
        wire.say({"untouched": True})
    return status


def take_streams(*outputs: int) -> None:
    """Have descriptors, streams and signals as a program has that was just started."""
    os.setpgid(0, 0)
    protect("0")
    if os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    for number, fd in enumerate((os.open(os.devnull, os.O_RDONLY), *outputs)):
        os.dup2(fd, number)
    # A descriptor of its own: while a test runs, 2 is pytest's.
    private = aside(os.dup(2))
    os.closerange(3, ASIDE)  # those of the supervisor
    # As Python opens them, by the locale.
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
    """Tell the kernel whom to kill when memory runs out."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write(score)
    except OSError:
        pass


def snapshot(folder: str) -> dict[str, tuple[int, ...]] | None:
    """What tells whether anything in a folder has changed since; Python's caches are left out.

    None if there is too much, or it cannot be looked at: then somebody else has to look.
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
