"""What of ours is there: processes, files, threads and ports, to compare before and after."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path


def left_over(before: dict[str, set[str]], seconds: float) -> dict[str, set[str]]:
    """What is there now and was not before; things that are just going get `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        now = inventory()
        more = {kind: now[kind] - before[kind] for kind in now if now[kind] - before[kind]}
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(0.05)


def inventory() -> dict[str, set[str]]:
    """Everything of this process that a guest could leave behind."""
    return {
        "processes": {f"{pid} {name}" for pid, name in descendants(os.getpid())},
        "threads": {thread.name for thread in threading.enumerate()} - {"vmsandbox-digest_0"},
        "descriptors": set(_descriptors()),
        "files": {
            str(path)
            for folder in _folders()
            for path in folder.rglob("*")
            # A verdict stays, and may be another process's; the run's claims and keys are its own.
            if path.suffix != ".json" and not path.name.startswith(("memory", "key."))
        },
    }


def descendants(root: int) -> list[tuple[int, str]]:
    """The children of a process, their children and so on: number and name."""
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            name, _, rest = stat.partition("(")[2].rpartition(")")
            parent = int(rest.split()[1])
            children.setdefault(parent, []).append((int(entry.name), name))
    found, todo = [], [root]
    while todo:
        for pid, name in children.get(todo.pop(), []):
            found.append((pid, name))
            todo.append(pid)
    return found


def _descriptors() -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        # Sockets and pipes are new objects with new numbers; all else is told apart by name.
        if not (target.startswith("/memfd:vmsandbox-memory") or "/templates/" in target):
            found.append(target)  # templates stay open
    return found


def _folders() -> list[Path]:
    from pytest_vmsandbox.core import paths

    return [*paths.runtime_dir().glob(f"{os.getpid()}-*"), paths.cache_dir() / "accelerator"]
