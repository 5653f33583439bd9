"""Recorded runs of tests, in the user's cache. Each has all that it needs to be repeated but the image.

The files of its template are linked, if the file system can do so. Nobody writes to them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from pytest_vmsandbox.cache.store import PRIVATE_KEY, RECORDED, Entry, Store
from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.access import KeyPair
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.recording import FILES, LOG, REQUEST, RecordedRun, Sealed, check
from pytest_vmsandbox.guests.template_builder import OpenTemplate
from pytest_vmsandbox.guests.templates import MEMORY, STATE
from pytest_vmsandbox.machine import memory

MOST = 10  # recorded runs; the oldest are removed first
_KEY_DIGITS = 16
_AGAIN = "record it again: pytest --vm-record"


class Recorded(Entry):
    """A run that was recorded."""

    @property
    def nodeid(self) -> str:
        """The id of the test, with the image."""
        return str(self.record["nodeid"])

    @property
    def failure(self) -> str:
        """How the test failed, as pytest showed it."""
        return str(self.record["failure"])

    @property
    def seconds(self) -> float:
        """How long the recording took."""
        return float(self.record["seconds"])

    @property
    def hardware(self) -> Hardware:
        """The hardware of the guest."""
        return Hardware.of_record(self.record["hardware"])

    def replayed(
        self, backend: Backend, folder: Path, stack: ExitStack, *, gdb: int | None = None
    ) -> RecordedRun:
        """A guest that repeats the run. It is paused; `stack` ends it.

        Args:
            folder: an empty one, for what the guest writes.
            gdb: a port for a debugger; None for none.

        Raises:
            ConfigError: what it depends on has changed.
            LaunchError: QEMU cannot be started.
        """
        blueprint = backend.blueprint(str(self.record["image"]), self.hardware)
        check(blueprint)
        if blueprint.digest != self.record["digest"]:
            raise ConfigError(
                f"the recorded run of {self.nodeid} cannot be repeated: QEMU, the image or pytest-vmsandbox is "
                "another one",
                details=f"it was recorded with QEMU {self.record['qemu']}; here is {blueprint.qemu.release}",
                remedy=f"use the QEMU that it was recorded with, or {_AGAIN}",
            )
        for name in (REQUEST, LOG):
            shutil.copyfile(self.folder / name, folder / name)
        its = stack.enter_context(memory.for_clones(self.folder / MEMORY, blueprint.qemu.version))
        layers = [[self.folder / name for name in names] for names in self.record["layers"]]
        with (self.folder / STATE).open("rb", buffering=0) as state:
            key = KeyPair.of((self.folder / PRIVATE_KEY).read_text(encoding="utf-8"))
            sealed = Sealed(memory=its, state=state, layers=layers, key=key)
            return RecordedRun.started(
                backend,
                blueprint,
                sealed,
                folder,
                name=str(self.record["guest"]),
                mode="replay",
                stack=stack,
                arguments=[] if gdb is None else ["-gdb", f"tcp:127.0.0.1:{gdb}"],
            )


class RecordedStore(Store[Recorded]):
    """The recorded runs of one cache folder: ``<cache>/recorded/<key>/``."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache, RECORDED, Recorded)

    def keep(
        self,
        run: RecordedRun,
        opened: OpenTemplate,
        *,
        nodeid: str,
        rootdir: Path,
        failure: str,
        digest: str,
        seconds: float,
    ) -> Recorded:
        """Keep a run that has ended. A later one of the same test replaces it.

        Raises:
            CacheError: it cannot be kept.
        """
        parts = json.dumps([os.fspath(rootdir), nodeid])
        template, engine = opened.template, run.guest.engine

        def fill(folder: Path, _lock: int) -> dict[str, object]:
            for name in FILES:
                shutil.copyfile(run.folder / name, folder / name)
            names = [[file.name for file in files] for files in template.layers]
            for name in (MEMORY, STATE, PRIVATE_KEY, *chain.from_iterable(names)):
                _link(template.folder / name, folder / name)
            hardware = asdict(engine.spec)
            kernel = hardware["kernel"]
            return {
                "nodeid": nodeid,
                "rootdir": os.fspath(rootdir),
                "image": engine.image,
                "guest": engine.name,
                "failure": failure,
                "seconds": seconds,
                "saved_at": wall(),
                "digest": digest,
                "qemu": engine.machines.blueprint.qemu.release,
                "hardware": {**hardware, "kernel": None if kernel is None else os.fspath(kernel)},
                "layers": names,
            }

        key = hashlib.sha256(parts.encode()).hexdigest()[:_KEY_DIGITS]
        kept = self.make(key, fill, on_busy=lambda: None, replace=True)
        older = sorted(self.all(), key=lambda it: -float(it.record["saved_at"]))[MOST:]
        self.discard([it.folder for it in older])
        return kept

    def find(self, nodeid: str, here: Path) -> Recorded:
        """The recorded run of a test.

        Args:
            nodeid: its id, with or without the image and the folders at its beginning.
            here: a folder of its project.

        Raises:
            ConfigError: there is none, or there are several.
        """
        every = self.all()
        own = [it for it in every if here.is_relative_to(str(it.record["rootdir"]))]
        found = [it for it in own or every if _is(nodeid, it.nodeid)]
        if len(found) == 1:
            return found[0]
        there = "\n".join(f"  {it.nodeid}" for it in found or every)
        if found:
            raise ConfigError(
                f"{nodeid!r} can be one of {len(found)} recorded tests",
                details=there,
                remedy="give more of its id",
            )
        raise ConfigError(
            f"no run of {nodeid!r} was recorded",
            details=f"recorded are:\n{there}" if every else "",
            remedy="run the test with --vm-record. Only tests inside guests that fail are kept",
        )


def _is(asked: str, nodeid: str) -> bool:
    plain = nodeid.partition("[")[0]
    return any(it == asked or it.endswith((f"/{asked}", f"::{asked}")) for it in (nodeid, plain))


def _link(source: Path, dest: Path) -> None:
    try:
        os.link(source, dest)
    except OSError:  # a file system without hard links
        with source.open("rb", buffering=0) as file, dest.open("x+b", buffering=0) as copy:
            memory.copy(file, copy)
