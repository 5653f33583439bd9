"""Recording what a guest writes to a disk, and the disk in a state of that."""

from __future__ import annotations

import os
import tempfile
from typing import IO

import pytest

from pytest_vmsandbox import ConfigError, Guest
from pytest_vmsandbox.guests.crash.building import Builder
from pytest_vmsandbox.guests.crash.layers import write_layer
from pytest_vmsandbox.guests.crash.log import SECTOR
from pytest_vmsandbox.guests.crash.recording import Content, content, flatten, recorded
from pytest_vmsandbox.guests.crash.states import State
from pytest_vmsandbox.machine.disk import empty_overlay

SIZE = 64 << 20
DEVICE = "/dev/vda"  # tiny has no root disk


def disk_now(vm: Guest, name: str) -> IO[bytes]:
    """The content of a disk, as a raw file."""
    with vm.engine.use() as running:
        running.machine.pause()
        try:
            frozen = vm.engine.machines.freeze_disks(running.machine)
        finally:
            running.machine.resume()
    file = vm.engine.machines.unnamed_file()
    flatten(content(vm.engine.machines, frozen, name), file)
    return file


def differences(one: IO[bytes], other: IO[bytes]) -> list[int]:
    """The numbers of the sectors in which two disks differ."""
    first, second = (os.pread(file.fileno(), SIZE, 0) for file in (one, other))
    assert len(first) == len(second) == SIZE
    sectors = range(0, SIZE, SECTOR)
    return [at // SECTOR for at in sectors if first[at : at + SECTOR] != second[at : at + SECTOR]]


@pytest.mark.origins("cloned")
@pytest.mark.vm("tiny", disks=["64MiB"])
def test_a_recording_has_all_that_a_guest_writes(vm, tmp_path):
    vm.shell(f"mkfs.ext4 -q {DEVICE}; mkdir /d; mount {DEVICE} /d; seq 9999 >/d/before")
    with recorded(vm.engine, "disk0") as recorder:
        vm.shell("echo one >/d/one; sync /d/one")
        recorder.acknowledge({"done": ["one"]})
        vm.shell("seq 20000 >/d/two; mv /d/two /d/three; rm /d/before; sync; echo four >/d/four")
        vm.shell("umount /d")
    history = recorder.history
    with Builder(recorder.base, recorder.log, history, tmp_path) as builder:
        with builder.state(State(len(history.entries))):
            assert differences(builder.file, disk_now(vm, "disk0")) == []
            hypervisor = vm.engine.machines.hypervisor
            with empty_overlay(SIZE, hypervisor.cache) as layer, tempfile.TemporaryFile() as file:
                state = State(len(history.entries))
                write_layer(
                    recorder.before,
                    recorder.log,
                    history,
                    state,
                    target=layer,
                    hypervisor=hypervisor,
                )
                flatten(Content(SIZE, None, (*recorder.before.layers, layer)), file)
                assert differences(builder.file, file) == []
        (mark,) = history.marks
        promised = State(mark.position)
        assert history.acknowledged(promised) == [{"done": ["one"]}]
        builder.write(promised, tmp_path / "disk.raw")
    attached = vm.attach_disk(tmp_path / "disk.raw")
    vm.shell(f"mount {attached.device} /d")
    assert vm.shell("cat /d/one; wc -l </d/before; ls /d").stdout.split() == [
        "one", "9999", "before", "lost+found", "one",
    ]  # fmt: skip
    vm.shell("umount /d")

    with recorded(vm.engine, attached.name) as other, recorded(vm.engine, "disk0") as recorder:
        writes = ["dd", "if=/dev/urandom", f"of={DEVICE}", "bs=4k", "count=9", "oflag=direct"]
        vm.run(writes)  # direct: they come to the disk without a flush
        vm.run([*writes[:2], f"of={attached.device}", *writes[3:]])
    for one in (recorder, other):
        kinds = [entry.kind for entry in one.history.entries]
        assert kinds == ["write"] * 9, "the host must not add a flush"


@pytest.mark.origins("cloned")
@pytest.mark.vm("tiny", disks=["8MiB"])
def test_what_ends_a_recording(vm):
    def is_refused(what, match):
        with pytest.raises(ConfigError, match=match):
            what()

    def record(name="disk0", meanwhile=()):
        with recorded(vm.engine, name):
            for call in meanwhile:
                call()

    is_refused(lambda: record("disk9"), r"no disk 'disk9' that it can write to")
    with recorded(vm.engine, "disk0") as recorder:
        is_refused(record, "already recorded")
        is_refused(vm.snapshot().__enter__, "while a disk is recorded")
        is_refused(lambda: recorder.acknowledge(object()), "takes a JSON value")
        vm.run(["dd", "if=/dev/zero", f"of={DEVICE}", "bs=512", "count=1", "oflag=direct"])
        recorder.acknowledge(None)
    assert [mark.position for mark in recorder.history.marks] == [1]
    is_refused(lambda: recorder.acknowledge(1), "its block has ended")

    attached = vm.attach_disk(size="1MiB")

    def record_another_late():
        with recorded(vm.engine, "disk0") as recorder:
            record(attached.name)
            recorder.acknowledge(1)
            record(attached.name)  # the guest flushes all disks for that

    is_refused(record_another_late, "another recording has begun after the first acknowledge")
    is_refused(lambda: record(attached.name, [lambda: vm.detach(attached)]), "it was detached")
    pause = [lambda: vm.qmp("stop"), lambda: vm.qmp("cont")]
    is_refused(lambda: record(meanwhile=pause), "was paused")
    is_refused(lambda: record(meanwhile=[vm.power_cut, vm.power_on]), "was switched off")
    with vm.faults.disk("disk0", rate="1GiB") as fault:
        record()  # it begins before and ends after that
        is_refused(lambda: record(meanwhile=[fault.end]), "a fault of the disk has ended")
    fail = [lambda: vm.faults.disk("disk0", fail="read")]
    is_refused(lambda: record(meanwhile=fail), "no fault of the disk 'disk0' can begin")

    def cache(kind, file="cache_type"):
        vm.shell(f"echo write {kind} >/sys/block/vda/{file}")

    for file in ("cache_type", "queue/write_cache"):
        is_refused(
            lambda file=file: record(meanwhile=[lambda: cache("through", file)]), "without a cache"
        )
        is_refused(record, "takes 'disk0' for a disk without a cache")
        cache("back", file)
    record()  # the disk can be recorded again
