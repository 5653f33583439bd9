"""A guest is saved in whatever state it is, and goes on only if it ran."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox import GuestLost, MonitorError
from pytest_vmsandbox.guests.freezing import freeze
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.machine.disk import NO_DISKS


class Machine:
    """Notes what is done to it."""

    spec = SimpleNamespace(more_args=("-device", "x"))
    console = SimpleNamespace(saved="on the console", text="on the console")

    def __init__(self, status="running", *, fault=None, dies=False):
        self.status, self.fault, self.dies = status, fault, dies
        self.done = []
        self.sizes = []  # of the state when the guest goes on
        self.state = None

    def execute(self, command):
        assert command == "query-status"
        return {"status": self.status}

    def ended(self):
        return -9 if self.dies and self.fault and "save" in self.done else None

    def pause(self):
        self.done.append("pause")

    def resume(self):
        self.done.append("resume")
        self.sizes += [self.state.stat().st_size] if self.state.exists() else []

    def save(self, file, *, with_memory):
        assert with_memory
        self.done.append("save")
        file.write(b"state")
        if self.fault:
            raise self.fault


class Helper:
    lead = Lead(3.0)
    is_frozen = False
    is_away = False

    def __init__(self, *, answers=True):
        self.answers = answers

    def read_lead(self, timeout):
        assert timeout == 5.0  # it is not waited for as for a command
        if not self.answers:
            raise GuestLost("it does not answer")
        return (60.0, 60.0)

    def send_clock(self):
        return 1

    def clock_error(self, number, started):
        return 0.0


@pytest.fixture
def frozen(tmp_path):
    """Freezes a machine; what is known of it, and what was done to it."""

    def do(machine, helper=None, *, resting=False, unsaved="", way_in=True):
        machine.state = tmp_path / "state"
        blueprint = SimpleNamespace(
            unsaved=unsaved, has_way_in=way_in, stretch=lambda seconds: seconds * 10
        )
        running: Any = SimpleNamespace(
            machine=machine, helper=helper, resident=helper or Helper(), resting=resting,
            blueprint=blueprint,
        )  # fmt: skip
        machines: Any = SimpleNamespace(
            spec=lambda: SimpleNamespace(more_args=("off",)),
            unsaved=unsaved, name="tiny-1", key=SimpleNamespace(public="ssh-ed25519 x"), disks=NO_DISKS,
            freeze_disks=lambda it: machine.done.append("disks" if it else "disks of one that is off")
            or NO_DISKS,
            tpm_files=dict,
        )  # fmt: skip
        with ExitStack() as stack:
            return freeze(machines, running, machine.state, stack)

    return do


def test_one_that_runs_goes_on_with_its_clock(frozen, tmp_path):
    machine = Machine()
    it = frozen(machine, Helper())
    assert machine.done == ["pause", "disks", "save", "resume"]
    assert (it.has_memory, it.has_helper, it.answers, it.lead) == (True, True, True, Lead(60.0))
    assert it.console == "on the console"
    assert it.more_args == ("-device", "x")
    assert (tmp_path / "state").read_bytes() == b"state"


def test_one_that_hangs_is_saved_as_it_is(frozen):
    machine = Machine()
    it = frozen(machine, Helper(answers=False))
    assert machine.done == ["pause", "disks", "save", "resume"]
    assert (it.has_memory, it.has_helper, it.answers) == (True, False, False)


@pytest.mark.parametrize("status", ["guest-panicked", "paused"])
def test_one_that_did_not_run_does_not_go_on(frozen, status):
    machine = Machine(status)
    it = frozen(machine, Helper())
    assert machine.done == ["disks", "save"]
    assert (it.has_memory, it.answers) == (True, False)


def test_one_that_rests_goes_on_resting(frozen):
    machine = Machine("paused")
    it = frozen(machine, Helper(), resting=True)
    assert machine.done == ["disks", "save"]
    assert (it.has_helper, it.answers, it.lead) == (True, True, Lead(3.0))


@pytest.mark.parametrize("way_in", [True, False])
def test_one_without_a_helper_is_reached_by_ssh_if_at_all(frozen, way_in):
    machine = Machine()
    it = frozen(machine, None, way_in=way_in)
    assert machine.done == ["pause", "disks", "save", "resume"]
    assert (it.has_helper, it.answers) == (False, way_in)


def test_one_whose_state_qemu_does_not_save_keeps_its_disks(frozen, tmp_path):
    machine = Machine()
    it = frozen(machine, Helper(), unsaved="QEMU 7.2 does not save its timers")
    assert machine.done == ["pause", "disks", "resume"]
    assert not it.has_memory
    assert not (tmp_path / "state").exists()


def test_a_full_disk_has_room_again_before_it_goes_on(frozen):
    machine = Machine(fault=MonitorError("no room"))
    with pytest.raises(MonitorError, match="no room"):
        frozen(machine, Helper())
    assert machine.done == ["pause", "disks", "save", "resume"]
    assert machine.sizes == [0]


def test_that_the_disk_is_full_is_said_though_qemu_does_not(frozen, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    machine = Machine(fault=MonitorError("QEMU failed to save or load the guest's state"))
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(MonitorError, match="No space left on device"):
        frozen(machine, Helper())
    assert machine.sizes == [0]


def test_one_whose_qemu_dies_meanwhile_keeps_its_disks(frozen, tmp_path):
    machine = Machine(fault=GuestLost("QEMU ended"), dies=True)
    it = frozen(machine, Helper())
    assert machine.done[-1] == "disks of one that is off"
    assert (it.has_memory, it.answers) == (False, False)
    assert it.console == "on the console"
    assert not (tmp_path / "state").exists()
