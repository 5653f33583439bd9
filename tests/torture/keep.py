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
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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

BEGIN_SECONDS = 120.0  # for the first guest to be kept
GRACE = 5.0  # for all processes to be gone
ORDERLY = 30.0  # for pytest to end after SIGINT: it completes what it keeps
MEMORY = "160MiB"
SUITE = f"""
import pytest

pytestmark = pytest.mark.vm("tiny", memory="{MEMORY}")


@pytest.mark.parametrize("number", range(8))
def test_fails(vm, number):
    vm.write_text("/here", "kept")
    assert 0
"""


def main() -> int:
    """Run the rounds; 0 if nothing but complete guests was ever left."""
    args, rounds = kill.begin(__doc__, longest=3.0)
    with tempfile.TemporaryDirectory(prefix="vmsandbox-torture-") as scratch:
        world = World(Path(scratch))
        with ThreadPoolExecutor(args.jobs) as pool:
            bad = sum(pool.map(world.play, rounds))
        print(f"complete guests that were left: {world.complete}")
        if world.complete and not world.can_be_entered():
            bad += 1
    print(f"{args.kills - bad} passed, {bad} failed")
    return 1 if bad else 0


class World:
    """What the rounds share: the images, and a template. It is built, unless the user's cache has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.complete = 0
        self._one = folder / "one"  # a cache with one of the kept guests
        self._counting = threading.Lock()
        self._cache = folder / "cache"
        kill.make_cache(self._cache)
        copy_templates(self._cache)
        settings = Settings(cache=self._cache, runtime=folder / "runtime", clones="demand")
        with GuestFactory.open(settings) as factory, factory.boot("tiny", memory=MEMORY):
            pass

    def play(self, one: kill.Round) -> bool:
        """Play a round; whether something was wrong afterwards."""
        folder = self.folder / f"round{one.number}"
        folder.mkdir()
        (folder / "test_suite.py").write_text(SUITE)
        cache = folder / "cache"
        cache.mkdir(mode=0o700)
        for name in ("images", "accelerator", "templates"):
            (cache / name).symlink_to(self._cache / name)
        mark = f"VMSANDBOX_TORTURE_KEEP={os.getpid()}.{one.number}"
        env = {
            **os.environ, "VMSANDBOX_CACHE": str(cache), "VMSANDBOX_RUNTIME": str(folder / "runtime"),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": str(folder), **dict([mark.split("=")]),
        }  # fmt: skip
        before = kill.files(folder)
        argv = [
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "vmsandbox",
            "--vm-keep=failed",
            "test_suite.py",
        ]
        pytest = subprocess.Popen(
            [sys.executable, *argv, f"--basetemp={folder / 'base'}"], cwd=folder, env=env,
            stdin=subprocess.DEVNULL, stdout=(folder / "output").open("wb"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        kill.OURS.add(pytest.pid)
        wrong = self._killed(pytest, one, cache / "kept")
        wrong += [f"{pid} {kill.cmdline(pid)}" for pid in self.alive(mark)]
        with GuestFactory.open(Settings(cache=cache, runtime=folder / "runtime")) as factory:
            factory.backend.clean()  # the next start removes what a dead run could not
        whole, faults = self._kept(cache)
        wrong += [*faults, *sorted(kill.files(folder) - before - whole)]
        state = "over" if pytest.poll() == 1 else "killed"
        print(
            f"{one.number:4} {one.signal.name:8} after {one.after:5.2f} s ({state}): "
            f"{'WRONG' if wrong else 'clean'}",
            flush=True,
        )
        for line in wrong:
            print(f"  {line}", flush=True)
        if wrong:
            print((folder / "output").read_text(errors="replace"), flush=True)
        shutil.rmtree(folder)
        return bool(wrong)

    def _killed(self, pytest: subprocess.Popen[bytes], one: kill.Round, kept: Path) -> list[str]:
        """Kill pytest in its moment. Returns what was wrong."""
        began = time.monotonic()
        while not kept.exists() and pytest.poll() is None:
            if time.monotonic() - began > BEGIN_SECONDS:
                break
            time.sleep(0.005)
        wrong = [] if kept.exists() else ["no guest was ever kept"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.wait(one.after)
        pytest.send_signal(one.signal)
        try:
            pytest.wait(ORDERLY)
        except subprocess.TimeoutExpired:
            wrong.append(f"pytest did not end within {ORDERLY:g} s after {one.signal.name}")
        return wrong

    @staticmethod
    def alive(mark: str) -> list[int]:
        """The processes of a round that do not end. They are killed."""
        began = time.monotonic()
        while alive := kill.marked(mark):
            if time.monotonic() - began > GRACE:
                for pid in alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return alive
            time.sleep(0.05)
        return []

    def _kept(self, cache: Path) -> tuple[set[str], list[str]]:
        """The files of guests that are kept completely, relative to the round; and what is wrong with others."""
        store, faults = KeptStore(cache), []
        found = {store.root, *store.root.glob("*.lock")}
        for folder in store.folders():
            kept = store.get(folder.name)
            fault = store.unreadable(folder.name) if kept is None else fault_of(kept)
            if kept is None or fault:
                faults.append(f"{folder}: {fault}")
                continue
            found |= {folder, *folder.rglob("*")}
            with self._counting:
                self.complete += 1
                if not self._one.exists():
                    shutil.copytree(folder, self._one / "kept" / kept.key)
        return {str(path.relative_to(cache.parent)) for path in found}, faults

    def can_be_entered(self) -> bool:
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
    sys.exit(main())
