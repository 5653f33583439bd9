"""Kill pytest while tests have faults in force, or compute power cuts: nothing may be left.

    python tests/torture/faults.py --seed 1 --kills 100 --jobs 2

Each round runs one test of `tiny`: its QEMU is stopped, paused or stalled, its disk is slow, fails or
vanishes, its file system is full, its writes are recorded, states after power cuts are checked, or it
migrates. When that has begun, pytest is killed with SIGKILL, SIGTERM or SIGINT, at a random moment of the next
seconds. Then no process that came from it may be alive, also no stopped one. After the next start there may
be no file of it. The same seed kills at the same moments.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.factory import GuestFactory
from torture import keep, kill

BEGIN_SECONDS = 120.0  # for the fault to be in force
MEMORY, DISK = "160MiB", "64MiB"
FAULTS = {  # what a test does again and again, with a guest and its second disk
    "stopped": "with vm.faults.freeze(clock='runs'): begun()",
    "paused": "with vm.faults.freeze(): begun()",
    "stalled": "with vm.faults.stall(0.5): begun(); vm.run(['ls', '-R', '/usr'])",
    "slow": "with vm.faults.disk('disk0', rate='1MiB'): begun(); write()",
    "failing": "with vm.faults.disk('disk0', fail='write'): begun(); write()",
    "gone": "disk = vm.attach_disk(size='8MiB')\nwith vm.faults.disk(disk, gone=True): begun()\nvm.detach(disk)",
    "full": "with vm.faults.full('/mnt'): begun(); write()",
    "off": "with vm.faults.power_cut(): begun()",
    "recorded": "with vm.crash_points('disk0') as cuts: begun(); write()",
    "checked": (
        "with vm.crash_points('disk0') as cuts: write()\nbegun()\n"
        "for _ in range(9): cuts.check(['true'], states=100)"
    ),
    "moves": "begun(); vm.faults.migrate()",
}
SUITE = """
import time
from pathlib import Path

import pytest

@pytest.mark.vm("tiny", memory="{memory}", disks=["{disk}"])
def test_faults(vm):
    device = vm.run(["sh", "-c", "ls /dev/vd[a-z] | tail -n 1"]).stdout.strip()
    vm.run(["mkfs.ext4", "-q", device])
    vm.run(["mount", device, "/mnt"])

    def begun():
        Path("begun").touch()
        time.sleep(0.1)

    def write():
        vm.shell("dd if=/dev/zero of=/mnt/file bs=64k count=16; sync", check=False)

    while True:
{body}
"""


def main() -> int:
    """Run the rounds; 0 if nothing was ever left."""
    args, rounds = kill.begin(__doc__, longest=3.0)
    with tempfile.TemporaryDirectory(prefix="vmsandbox-torture-") as scratch:
        world = World(Path(scratch), SUITE, FAULTS, {"memory": MEMORY, "disks": [DISK]})
        world.forget_moves_if_qemu_cannot()
        with ThreadPoolExecutor(args.jobs) as pool:
            bad = sum(pool.map(world.play, rounds))
    print("killed:", ", ".join(f"{count} {name}" for name, count in world.killed.items()))
    print(f"{args.kills - bad} passed, {bad} failed")
    return 1 if bad else 0


class World:
    """What the rounds share: the images, and a template.

    Args:
        suite: a file of tests, in which `{memory}`, `{disk}` and `{body}` are filled in.
        faults: names → what a test does again and again.
        hardware: of the guests.
    """

    def __init__(
        self, folder: Path, suite: str, faults: dict[str, str], hardware: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.killed: Counter[str] = Counter()
        self._suite = suite
        self._faults = dict(faults)
        self._cache = folder / "cache"
        kill.make_cache(self._cache)
        self._settings = Settings(cache=self._cache, runtime=folder / "runtime", clones="demand")
        self._hardware = hardware
        with GuestFactory.open(self._settings) as factory, factory.boot("tiny", **hardware):
            pass  # the template is there now

    def forget_moves_if_qemu_cannot(self) -> None:
        """Leave out the rounds with a guest that moves, if this QEMU cannot do that."""
        with GuestFactory.open(self._settings) as factory:
            try:
                with factory.boot("tiny", **self._hardware) as guest:
                    guest.faults.migrate()
            except ConfigError as error:
                print(f"no kills while a guest moves: {error.brief}", flush=True)
                del self._faults["moves"]

    def play(self, one: kill.Round) -> bool:
        """Play a round; whether something was wrong."""
        name = [*self._faults][one.number % len(self._faults)]
        folder = self.folder / f"round{one.number}"
        folder.mkdir()
        body = "".join(f"        {line}\n" for line in self._faults[name].splitlines())
        (folder / "test_suite.py").write_text(
            self._suite.format(memory=MEMORY, disk=DISK, body=body)
        )
        cache = folder / "cache"
        cache.mkdir(mode=0o700)
        for shared in ("images", "accelerator", "templates"):
            (cache / shared).symlink_to(self._cache / shared)
        mark = f"VMSANDBOX_TORTURE_FAULTS={os.getpid()}.{one.number}"
        env = {
            **os.environ, "VMSANDBOX_CACHE": str(cache), "VMSANDBOX_RUNTIME": str(folder / "runtime"),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": str(folder), **dict([mark.split("=")]),
        }  # fmt: skip
        before = kill.files(folder)
        argv = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "vmsandbox", "test_suite.py"]
        pytest = subprocess.Popen(
            [sys.executable, *argv, f"--basetemp={folder / 'base'}"], cwd=folder, env=env,
            stdin=subprocess.DEVNULL, stdout=(folder / "output").open("wb"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        kill.OURS.add(pytest.pid)
        wrong = self._killed(pytest, one, name, folder / "begun")
        wrong += [f"{pid} {kill.cmdline(pid)}" for pid in keep.World.alive(mark)]
        with GuestFactory.open(Settings(cache=cache, runtime=folder / "runtime")) as factory:
            factory.backend.clean()  # the next start removes what a dead run could not
        left = kill.files(folder) - before - {"begun"}
        wrong += sorted(path for path in left if not is_in_use(folder / path))
        print(
            f"{one.number:4} {name:8} {one.signal.name:8} after {one.after:5.2f} s: "
            f"{'WRONG' if wrong else 'clean'}",
            flush=True,
        )
        for line in wrong:
            print(f"  {line}", flush=True)
        if wrong:
            print((folder / "output").read_text(errors="replace"), flush=True)
        shutil.rmtree(folder)
        return bool(wrong)

    def _killed(
        self, pytest: subprocess.Popen[bytes], one: kill.Round, name: str, begun: Path
    ) -> list[str]:
        """Kill pytest in its moment. Returns what was wrong."""
        since = time.monotonic()
        while not begun.exists() and pytest.poll() is None:
            if time.monotonic() - since > BEGIN_SECONDS:
                break
            time.sleep(0.005)
        time.sleep(one.after)
        if not begun.exists() or pytest.poll() is not None:
            pytest.kill()
            pytest.wait()
            return ["the fault did not last until the kill"]
        self.killed[name] += 1
        pytest.send_signal(one.signal)
        try:
            pytest.wait(keep.ORDERLY)
        except subprocess.TimeoutExpired:
            pytest.send_signal(signal.SIGKILL)
            pytest.wait()
            return [f"pytest did not end within {keep.ORDERLY:g} s after {one.signal.name}"]
        return []


def is_in_use(path: Path) -> bool:
    """Whether a living process has a file open: other runs have theirs in shared memory, too."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.samefile(path):
                return True
        except OSError:
            continue
    return False


if __name__ == "__main__":
    sys.exit(main())
