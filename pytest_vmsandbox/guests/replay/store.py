"""Recorded runs of tests, in the user's cache. Each has all that it needs to be repeated but the image.

The files of its template are linked, if the file system can do so. Nobody writes to them.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from pytest_vmsandbox.cache.copying import link
from pytest_vmsandbox.cache.store import PRIVATE_KEY, RECORDED
from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.cloning.template_builder import OpenTemplate
from pytest_vmsandbox.guests.of_test import OfTest, StoreOfTests, Words, key_of
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.replay.run import (
    FILES,
    LOG,
    REQUEST,
    BeforeRun,
    RecordedRun,
    check_recordable,
)
from pytest_vmsandbox.guests.templates import MEMORY, STATE
from pytest_vmsandbox.machine import memory

MOST = 10  # recorded runs; the oldest are removed first
_AGAIN = "record it again: pytest --vm-record"


class Recorded(OfTest):
    """A run that was recorded."""

    @property
    def failure(self) -> str:
        """How the test failed, as pytest showed it."""
        return str(self.record["failure"])

    @property
    def seconds(self) -> float:
        """How long the recording took."""
        return float(self.record["seconds"])

    def replayed(
        self, backend: Backend, folder: Path, stack: ExitStack, *, is_debugged: bool = False
    ) -> RecordedRun:
        """A guest that repeats the run. It is paused; `stack` ends it.

        Args:
            folder: an empty one, for what the guest writes.
            is_debugged: whether a debugger will come, see `RecordedRun.await_debugger`.

        Raises:
            ConfigError: what it depends on has changed.
            LaunchError: QEMU cannot be started.
        """
        blueprint = backend.blueprint(self.image, self.hardware)
        check_recordable(blueprint)
        if blueprint.digest != self.record["digest"]:
            what, remedy = "pytest-vmsandbox or its settings have changed", _AGAIN
            if blueprint.qemu.build != self.record["qemu_build"]:
                here = blueprint.qemu.release
                what = f"it was recorded with QEMU {self.record['qemu']}, and here is another one: {here}"
                remedy = f"use that QEMU (VMSANDBOX_QEMU), or {_AGAIN}"
            elif blueprint.built.build_id != self.record["image_build"]:
                what = f"the image {blueprint.image} was built again since then"
            raise ConfigError(
                f"the recorded run of {self.nodeid} cannot be repeated: {what}", remedy=remedy
            )
        for name in (REQUEST, LOG):
            shutil.copyfile(self.folder / name, folder / name)
        its = stack.enter_context(memory.for_clones(self.folder / MEMORY, blueprint.qemu.version))
        layers = [[self.folder / name for name in names] for names in self.record["layers"]]
        with (self.folder / STATE).open("rb", buffering=0) as state:
            key = KeyPair.of(self.private_key)
            before = BeforeRun(memory=its, state=state, layers=layers, key=key)
            return RecordedRun.started(
                backend,
                blueprint,
                before,
                folder,
                name=self.guest,
                mode="replay",
                stack=stack,
                is_debugged=is_debugged,
            )


class RecordedStore(StoreOfTests[Recorded]):
    """The recorded runs of one cache folder: ``<cache>/recorded/<key>/``."""

    words = Words(
        tests="tests with a recorded run",
        none="no run of {} was recorded",
        why="the test was not run with --vm-record, it passed, it did not run inside a guest, or the run was removed",
        there="recorded are those of:",
        remedy="run the test with --vm-record",
    )

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
            GuestLost: its log is not complete.
        """
        run.check_log()
        template, engine = opened.template, run.guest.engine
        blueprint = engine.machines.blueprint

        def fill(folder: Path, _lock: int) -> dict[str, object]:
            for name in FILES:
                shutil.copyfile(run.folder / name, folder / name)
            names = [[file.name for file in files] for files in template.layers]
            for name in (MEMORY, STATE, PRIVATE_KEY, *chain.from_iterable(names)):
                link(template.folder / name, folder / name)
            return {
                "nodeid": nodeid,
                "rootdir": os.fspath(rootdir),
                "image": engine.image,
                "guest": engine.name,
                "failure": failure,
                "seconds": seconds,
                "saved_at": wall(),
                "digest": digest,
                "qemu": blueprint.qemu.release,
                "qemu_build": blueprint.qemu.build,
                "image_build": blueprint.built.build_id,
                "hardware": asdict(engine.spec),
                "layers": names,
            }

        key = key_of(os.fspath(rootdir), nodeid)
        kept = self.make(key, fill, on_busy=lambda: None, replace=True)
        older = sorted(self.all(), key=lambda it: -it.saved_at)[MOST:]
        self.discard([it.folder for it in older])
        return kept
