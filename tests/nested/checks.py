"""What run.py has tested in the emulated host, besides some of our other tests: KVM is the real one."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.machine.progress import guest_time

IMAGE = "debian-13"
CLOCK_SOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
SUITE = """
import os


def test_where():
    assert os.environ["VMSANDBOX_GUEST"].startswith("debian-13")
    with open("/sys/devices/system/clocksource/clocksource0/current_clocksource") as file:
        assert file.read() == "kvm-clock\\n"
"""


def test_auto() -> None:
    """It finds out that KVM runs guests, however slow this host is. Other steps build on that."""
    shutil.rmtree(cache_dir() / "accelerator", ignore_errors=True)
    with GuestFactory.open(Settings(), Announcer(print)) as factory:
        verdict = factory.backend.accelerator("tiny")
    print(dataclasses.asdict(verdict))
    assert verdict.accelerator == "kvm"


def test_three_clones_and_a_rollback(vm_factory: GuestFactory) -> None:
    randoms = set()
    for number in range(3):
        started = time.monotonic()
        with vm_factory.boot(IMAGE) as vm:
            print(f"guest {number} ({vm.engine.origin}) after {time.monotonic() - started:.1f} s")
            assert vm.engine.origin in {"cloned", "armed"}
            assert vm.qmp("query-kvm") == {"enabled": True, "present": True}
            assert guest_time(vm.engine.pid)  # what the proof of KVM looks at
            assert vm.read_text(CLOCK_SOURCE) == "kvm-clock\n"
            assert vm.run(["systemd-detect-virt"]).stdout == "kvm\n"
            assert vm.run(["systemctl", "is-system-running", "--wait"]).stdout == "running\n"
            randoms.add(vm.read_text("/proc/sys/kernel/random/uuid"))
            before = time.time()
            there = float(vm.run(["date", "+%s.%N"]).stdout)
            assert before - 1 < there < time.time() + 1
            if number == 2:
                vm.write_text("/root/file", "before")
                with vm.snapshot():
                    vm.write_text("/root/file", "after")
                    vm.run(["sync"])
                    vm.write_text("/dev/shm/file", "in memory")
                assert vm.read_text("/root/file") == "before"
                assert vm.run(["ls", "/dev/shm/file"], check=False).returncode != 0
                vm.reboot()
                assert vm.read_text("/root/file") == "before"
    assert len(randoms) == 3


def test_inside(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-P", "-m", "pytest", "-v", "--in-vm", f"--vm={IMAGE}"]
    done = subprocess.run(
        [*command, "--vm-accel=kvm"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    print(done.stdout + done.stderr)
    assert done.returncode == 0
    assert "1 passed" in done.stdout
