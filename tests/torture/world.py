"""What `keep.py`, `faults.py` and `clusters.py` share: one cache for all rounds, and how a round begins and ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from torture import kill

BEGIN_SECONDS = 120.0  # for what pytest is killed in
GRACE = 20.0  # for all processes to be gone: this machine may be busy
ORDERLY = 60.0  # for pytest to end after SIGINT: it completes what it keeps
MEMORY = "160MiB"


class World(ABC):
    """The images, and a template that the first guest leaves. A round is one pytest that is killed."""

    begun: ClassVar[str]  # the file that says that the moment has come, below the round's folder
    may_end: ClassVar[bool]  # pytest may be over before it is killed
    options: ClassVar[tuple[str, ...]] = ()  # of pytest

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        kill.make_cache(self.cache)

    @classmethod
    def main(cls, about: str) -> int:
        """Run the rounds that the command line asks for; 0 if nothing was ever wrong."""
        args, rounds = kill.begin(about, longest=3.0)
        with tempfile.TemporaryDirectory(prefix="vmsandbox-torture-") as scratch:
            world = cls(Path(scratch))
            with ThreadPoolExecutor(args.jobs) as pool:
                bad = sum(pool.map(world.play, rounds))
            bad += not world.summary()
        print(f"{args.kills - bad} passed, {bad} failed")
        return 1 if bad else 0

    @abstractmethod
    def suite(self, one: kill.Round) -> str:
        """The tests of a round."""

    @abstractmethod
    def judge(self, folder: Path, left: set[str]) -> list[str]:
        """What is wrong with the files that a round left."""

    @abstractmethod
    def summary(self) -> bool:
        """Tell what all rounds came to; whether that is as it must be."""

    def label(self, one: kill.Round) -> str:
        """What a round is about."""
        return ""

    def factory(self) -> contextlib.AbstractContextManager[GuestFactory]:
        settings = Settings(cache=self.cache, runtime=self.folder / "runtime", clones="demand")
        return GuestFactory.open(settings)

    def play(self, one: kill.Round) -> bool:
        """Play a round; whether something was wrong."""
        folder = self.folder / f"round{one.number}"
        folder.mkdir()
        (folder / "test_suite.py").write_text(self.suite(one))
        cache = folder / "cache"
        cache.mkdir(mode=0o700)
        for name in ("images", "accelerator", "templates"):
            (cache / name).symlink_to(self.cache / name)
        mark = f"{os.getpid()}.{one.number}"
        env = {
            **os.environ, "VMSANDBOX_CACHE": str(cache), "VMSANDBOX_RUNTIME": str(folder / "runtime"),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": str(folder), "VMSANDBOX_TORTURE": mark,
        }  # fmt: skip
        before = kill.files(folder)
        argv = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "vmsandbox", *self.options]
        pytest = subprocess.Popen(
            [sys.executable, *argv, f"--basetemp={folder / 'base'}", "test_suite.py"],
            cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=(folder / "output").open("wb"),
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        kill.OURS.add(pytest.pid)
        wrong = self._kill(pytest, one, folder / self.begun)
        wrong += [f"{pid} {kill.cmdline(pid)}" for pid in alive(f"VMSANDBOX_TORTURE={mark}")]
        with GuestFactory.open(Settings(cache=cache, runtime=folder / "runtime")) as factory:
            factory.backend.clean()  # the next start removes what a dead run could not
        wrong += self.judge(folder, kill.files(folder) - before)
        state = "over" if pytest.returncode == 1 else "killed"
        print(
            f"{one.number:4} {self.label(one):8} {one.signal.name:8} after {one.after:5.2f} s "
            f"({state}): {'WRONG' if wrong else 'clean'}",
            *wrong, sep="\n  ", flush=True,
        )  # fmt: skip
        if wrong:
            print((folder / "output").read_text(errors="replace"), flush=True)
        shutil.rmtree(folder)
        return bool(wrong)

    def _kill(self, pytest: subprocess.Popen[bytes], one: kill.Round, begun: Path) -> list[str]:
        """Kill pytest in its moment. Returns what was wrong."""
        since = time.monotonic()
        while not begun.exists() and pytest.poll() is None:
            if time.monotonic() - since > BEGIN_SECONDS:
                break
            time.sleep(0.005)
        wrong = [] if begun.exists() else [f"{self.begun} never came"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.wait(one.after)
            if not self.may_end:
                wrong.append("pytest was over before it was killed")
        pytest.send_signal(one.signal)
        try:
            pytest.wait(ORDERLY)
        except subprocess.TimeoutExpired:
            wrong.append(f"pytest did not end within {ORDERLY:g} s after {one.signal.name}")
            pytest.kill()
            pytest.wait()
        return wrong


class Acting(World):
    """Pytest is killed in a test that does something again and again."""

    begun = "begun"
    may_end = False
    tests: ClassVar[str]  # a file, in which `{memory}`, `{disk}` and `{body}` are filled in
    actions: ClassVar[dict[str, str]]
    disks: ClassVar[list[str]] = []

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._played: Counter[str] = Counter()
        self.mine = dict(self.actions)
        with self.factory() as factory, factory.boot("tiny", memory=MEMORY, disks=self.disks) as vm:
            self.look(vm)

    def look(self, vm: Guest) -> None:
        """Find out what a guest can do. Its template is kept for the rounds."""

    def label(self, one: kill.Round) -> str:
        return [*self.mine][one.number % len(self.mine)]

    def suite(self, one: kill.Round) -> str:
        name = self.label(one)
        self._played[name] += 1
        body = "".join(f"        {line}\n" for line in self.mine[name].splitlines())
        return self.tests.format(memory=MEMORY, disk=[*self.disks, ""][0], body=body)

    def judge(self, folder: Path, left: set[str]) -> list[str]:
        return sorted(path for path in left - {self.begun} if not is_in_use(folder / path))

    def summary(self) -> bool:
        print("killed:", ", ".join(f"{count} {name}" for name, count in self._played.items()))
        return True


def is_in_use(path: Path) -> bool:
    """Whether a living process has a file open: other runs have theirs in shared memory, too."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.samefile(path):
                return True
        except OSError:
            continue
    return False


def alive(mark: str) -> list[int]:
    """The processes of a round that do not end. They are killed."""
    began = time.monotonic()
    while found := kill.marked(mark):
        if time.monotonic() - began > GRACE:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return found
        time.sleep(0.05)
    return []
