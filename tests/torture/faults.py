"""Kill pytest while tests have faults in force, or compute power cuts: nothing may be left.

    python tests/torture/faults.py --seed 1 --kills 100 --jobs 2

Each round runs one test of `tiny`: its QEMU is stopped, paused or stalled, its disk is slow, fails or
vanishes, its file system is full, its writes are recorded, states after power cuts are checked, or it
migrates. All of them have noise, which stops QEMU again and again. When that has begun, pytest is killed
with SIGKILL, SIGTERM or SIGINT, at a random moment of the next seconds. Then no process that came from it may be alive, also no stopped one. After the next start there may
be no file of it. The same seed kills at the same moments.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.guest import Guest
from torture.world import Acting

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
    "noise": "begun()",
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


class Faults(Acting):
    """The action is a fault."""

    tests = SUITE
    actions = FAULTS
    options = ("--vm-noise",)
    disks: ClassVar = ["64MiB"]

    def look(self, vm: Guest) -> None:
        try:
            vm.faults.migrate()
        except ConfigError as error:
            print(f"no kills while a guest moves: {error.brief}", flush=True)
            del self.mine["moves"]


if __name__ == "__main__":
    sys.exit(Faults.main(__doc__))
