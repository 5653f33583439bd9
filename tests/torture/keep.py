"""Kill pytest while it keeps guests of failed tests: only guests that are kept completely may be left.

    python tests/torture/keep.py --seed 1 --kills 100 --jobs 2

Each round runs tests of `tiny` that all fail, with ``--vm-keep=failed``. When pytest begins to keep the
first guest, it is killed with SIGKILL, SIGTERM or SIGINT, at a random moment of the next seconds. Then no
process that came from it may be alive. After the next start there may be no file of it but kept guests,
each of whose files is as it was when it was written, for this user only. The same seed kills at the same
moments. At the end, one of the kept guests is entered.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pytest_vmsandbox.cache.store import IN_USE
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import parse_size
from pytest_vmsandbox.guests.entering import entered
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.kept import KeptGuest, KeptStore
from pytest_vmsandbox.guests.templates import TemplateStore
from torture import kill
from torture.world import MEMORY, World

SUITE = f"""
import pytest

pytestmark = pytest.mark.vm("tiny", memory="{MEMORY}")


@pytest.mark.parametrize("number", range(8))
def test_fails(vm, number):
    vm.write_text("/here", "kept")
    assert 0
"""


class Keeping(World):
    """Pytest is killed while it keeps the guests of tests that fail."""

    begun = "cache/kept"
    may_end = True
    options = ("--vm-keep=failed",)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._complete = 0
        self._one = folder / "one"  # a cache with one of the kept guests
        self._counting = threading.Lock()
        copy_templates(self.cache)
        with self.factory() as factory, factory.boot("tiny", memory=MEMORY):
            pass

    def suite(self, one: kill.Round) -> str:
        return SUITE

    def judge(self, folder: Path, left: set[str]) -> list[str]:
        store, faults = KeptStore(folder / "cache"), []
        whole = {store.root, *store.root.glob("*.lock")}
        for place in store.folders():
            kept = store.get(place.name)
            fault = store.unreadable(place.name) if kept is None else fault_of(kept)
            if kept is None or fault:
                faults.append(f"{place}: {fault}")
                continue
            whole |= {place, *place.rglob("*")}
            with self._counting:
                self._complete += 1
                if not self._one.exists():
                    shutil.copytree(place, self._one / "kept" / kept.key)
        return [*faults, *sorted(left - {str(path.relative_to(folder)) for path in whole})]

    def summary(self) -> bool:
        print(f"complete guests that were left: {self._complete}")
        return not self._complete or self._can_be_entered()

    def _can_be_entered(self) -> bool:
        """Whether a kept guest goes on as it was."""
        settings = Settings(cache=self._one, runtime=self.folder / "runtime")
        with GuestFactory.open(settings) as factory:
            (kept,) = KeptStore(self._one).all()
            with entered(factory, kept) as vm:
                return vm.read_text("/here") == "kept"


def copy_templates(cache: Path) -> None:
    """Copy templates of the same size from the user's cache: a copy is as good as a new one."""
    store = TemplateStore(cache_dir())
    for template in store.all():
        same = template.image == "tiny" and template.memory.stat().st_size == parse_size(
            MEMORY, "memory"
        )
        with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
            if same:
                with store.hold(template.folder):
                    shutil.copytree(template.folder, cache / "templates" / template.folder.name)


def fault_of(kept: KeptGuest) -> str:
    """What is wrong with the files of a kept guest; empty if nothing is."""
    known = {*kept.record["digests"], IN_USE, "kept.json"}
    for path in kept.folder.rglob("*"):
        name, status = os.fspath(path.relative_to(kept.folder)), path.stat()
        if path.is_file() and name not in known:
            return f"{name} is not in its record"
        if path.is_file() and status.st_nlink == 1 and status.st_mode & 0o077:
            return f"others can read {name}"
    return kept.damage()


if __name__ == "__main__":
    sys.exit(Keeping.main(__doc__))
