"""Guests that are only firmware, saved and cloned: the machine's side of clones with each accelerator.

KVM runs firmware also on hosts where it runs no kernel, so its path is tried wherever there is a
device. A firmware that finds nothing to boot waits, and begins again when its time is up; meanwhile
it counts ticks of its clock in memory.
"""

from __future__ import annotations

import hashlib
import os
import struct
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.spec import MIB, Hardware
from pytest_vmsandbox.machine import host, memory
from pytest_vmsandbox.machine.cmdline import MachineSpec, Start, processor_models
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.qemu import find_qemu

X86_64 = ARCHITECTURES["x86_64"]
SECONDS = 60.0
WAITS, GOES_ON, BANNER = "No bootable device", "Rebooting", "SeaBIOS"
TICKS = 0x46C  # where every BIOS counts them, 18 in a second
UNTRIED = host.kvm_problem()
KVM = pytest.param(
    "kvm", marks=pytest.mark.skipif(bool(UNTRIED), reason=f"KVM cannot be tried: {UNTRIED}")
)


class Firmware:
    """A guest that was saved while its firmware was waiting, and its clones."""

    def __init__(self, folder: Path, hypervisor: Hypervisor, accelerator: str) -> None:
        self.accelerator = accelerator
        self.memory = folder / "memory"
        self.state = folder / "state"
        self._hypervisor = hypervisor
        self._qemu = find_qemu(X86_64.name)
        hardware = Hardware(memory=128 * MIB)
        identity = host.guest_identity(accelerator)
        with memory.create(self.memory, hardware.memory) as ram, self.state.open("x+b") as state:
            if identity is not None:
                os.fchown(ram.fileno(), identity.uid, identity.gid)
            with self._running(Start.TO_BE_SAVED, memory=ram) as machine:
                machine.console.wait_for(WAITS, SECONDS)
                machine.save(state, with_memory=False)
                assert machine.execute("query-status")["status"] == "postmigrate"
                assert machine.end(0) is False
        for path in (self.memory, self.state):
            os.chown(path, os.geteuid(), os.getegid())
            path.chmod(0o644)

    @contextmanager
    def _running(self, start, **files):
        spec = MachineSpec(
            name="firmware",
            qemu=str(self._qemu.path),
            version=self._qemu.version,
            architecture=X86_64,
            accelerator=self.accelerator,
            processor=processor_models(X86_64, self.accelerator, self._qemu.version)[-1],
            hardware=Hardware(memory=128 * MIB),
            start=start,
            more_args=("-boot", "reboot-timeout=2000"),
        )
        with Machine.running(self._hypervisor, spec, **files) as machine:
            yield machine

    @contextmanager
    def clone(self):
        """A clone; it is paused."""
        with (
            memory.for_clones(self.memory, self._qemu.version) as ram,
            self.state.open("rb") as state,
            self._running(Start.CLONED, memory=ram, state=state) as machine,
        ):
            yield machine

    @property
    def ticks(self):
        """As they were when the guest was saved."""
        with self.memory.open("rb") as file:
            return struct.unpack("<I", os.pread(file.fileno(), 4, TICKS))[0]

    def digests(self):
        found = []
        for path in (self.memory, self.state):
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        return found


@pytest.fixture(scope="module", params=["tcg", KVM])
def firmware(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("firmware")
    with Hypervisor.running(runtime=folder / "run", cache=folder / "cache") as hypervisor:
        yield Firmware(folder, hypervisor, request.param)


def ticks(machine):
    answer = machine.human(f"xp /1wx {TICKS:#x}")
    return int(answer.split()[1], 16)


def wait_for_ticks(machine, more_than):
    deadline = Deadline(SECONDS)
    while ticks(machine) <= more_than:
        assert not deadline.expired
        deadline.pause(0.02)


def status(machine):
    machine.check()
    return machine.execute("query-status")["status"]


def test_clones_go_on_where_it_was_saved(firmware):
    with ExitStack() as stack:
        clones = [stack.enter_context(firmware.clone()) for _ in range(3)]
        assert [ticks(it) for it in clones] == [firmware.ticks] * 3
        for clone in clones:
            assert status(clone) in {"inmigrate", "paused", "prelaunch"}
            clone.resume()
        for clone in clones:
            assert clone.execute("query-kvm")["enabled"] is (firmware.accelerator == "kvm")
            wait_for_ticks(clone, firmware.ticks)
            assert status(clone) == "running"
            # It has waited long enough, and begins anew: what comes first is not the banner.
            clone.console.wait_for(GOES_ON, SECONDS)
            assert BANNER not in clone.console.text.partition(GOES_ON)[0]
            clone.console.wait_for(BANNER, SECONDS)


def test_a_clone_can_be_reset(firmware):
    with firmware.clone() as clone:
        clone.resume()
        since = len(clone.monitor.events())
        clone.execute("system_reset")
        event = clone.monitor.wait_event("RESET", since=since, timeout=SECONDS)
        assert event is not None
        assert event["data"]["guest"] is False
        clone.console.wait_for(BANNER, SECONDS)
        clone.console.wait_for(WAITS, SECONDS)
        assert status(clone) == "running"


def test_clones_share_nothing(firmware):
    """What one writes is seen neither by another, nor in the files that both came from."""
    before, start = firmware.digests(), firmware.ticks
    with firmware.clone() as busy, firmware.clone() as other:
        busy.resume()
        wait_for_ticks(busy, start + 5)
        assert ticks(other) == start
        busy.execute("system_reset")  # the firmware writes much of its memory anew
        busy.console.wait_for(WAITS, SECONDS)
        assert ticks(other) == start
        other.resume()
        wait_for_ticks(other, start)
    assert firmware.digests() == before
    with firmware.clone() as late:
        assert ticks(late) == start


def test_a_clone_can_be_paused(firmware):
    with firmware.clone() as clone:
        clone.resume()
        wait_for_ticks(clone, firmware.ticks)
        clone.pause()
        assert status(clone) == "paused"
        stands = ticks(clone)
        assert ticks(clone) == stands
        clone.resume()
        wait_for_ticks(clone, stands)


def test_a_clone_can_be_saved_with_its_memory(firmware, tmp_path):
    """As a snapshot is; what goes on from it has memory of its own."""
    with (tmp_path / "state").open("x+b") as state:
        with firmware.clone() as clone:
            clone.resume()
            wait_for_ticks(clone, firmware.ticks)
            clone.save(state, with_memory=True)
            stands = ticks(clone)
        assert stands > firmware.ticks
        os.lseek(state.fileno(), 0, os.SEEK_SET)
        with firmware._running(Start.RESTORED, state=state) as again:
            assert ticks(again) == stands
            again.resume()
            again.console.wait_for(GOES_ON, SECONDS)
            assert status(again) == "running"


def test_its_memory_is_mapped_privately(firmware):
    with firmware.clone() as clone:
        maps = Path(f"/proc/{clone.process.pid}/maps").read_text(encoding="utf-8").splitlines()
        mapped = [it for it in maps if it.endswith(str(firmware.memory)) or "memfd:vmsandbox" in it]
        assert mapped
        assert all(it.split()[1].endswith("p") for it in mapped)
