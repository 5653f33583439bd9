"""Block filters under the disks of a real QEMU. No guest is there that would read or write them."""

import errno
import itertools
import os
from contextlib import ExitStack
from dataclasses import replace

import pytest

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import MonitorError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.machine.disk import PluggedDisk, empty_overlay
from pytest_vmsandbox.machine.filters import ERRORS, RECORDER, THROTTLE, Filter


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "log").open("w+b") as file:
        yield file


@pytest.fixture
def each(log):
    """A filter of each order, the highest one first."""

    def errors(place):
        rule = {"event": "none", "iotype": "flush", "errno": errno.EIO}
        return {"driver": "blkdebug", "image": place.below, "inject-error": [rule]}

    def recorder(place):
        log = {"driver": "file", "filename": place.files[0]}
        return {"driver": "blklogwrites", "file": place.below, "log": log}

    def throttle(place):
        return {"driver": "throttle", "file": place.below, "throttle-group": place.id}

    group = {"qom-type": "throttle-group", "limits": {"iops-total": 5}}
    return [
        Filter(order=ERRORS, device=errors, reasons={os.strerror(errno.EIO)}),
        Filter(order=THROTTLE, device=throttle, object=group),
        Filter(order=RECORDER, device=recorder, files=[log]),
    ]


def held(machine):
    """Block devices, sets of descriptors, and throttle groups."""
    nodes = machine.execute("query-named-block-nodes", {"flat": True})
    objects = machine.execute("qom-list", {"path": "/objects"})
    return (
        {it["node-name"] for it in nodes},
        {it["fdset-id"] for it in machine.execute("query-fdsets")},
        {it["name"] for it in objects},
    )


def chain(machine, disk):
    """The drivers from a disk down to its storage, as QEMU knows them."""
    devices = machine.execute("query-block")
    (image,) = (it["inserted"] for it in devices if f"/disk-{disk}/" in it["qdev"])
    nodes = {
        it["node-name"]: it for it in machine.execute("query-named-block-nodes", {"flat": True})
    }
    found, name = [], image["node-name"]
    edges = machine.execute("x-debug-query-block-graph")
    ids = {it["id"]: it["name"] for it in edges["nodes"]}
    below = {(ids[it["parent"]], it["name"]): ids[it["child"]] for it in edges["edges"]}
    while True:
        found.append(nodes[name]["drv"])
        if found[-1] == "qcow2":
            return found, name
        name = below[name, "image" if found[-1] == "blkdebug" else "file"]


@pytest.mark.parametrize("running", [True, False])
def test_in_any_order(real, disks, each, running):
    names = ["blkdebug", "throttle", "blklogwrites"]
    with real.machine(disks=disks) as machine:
        if not running:
            machine.pause()
        before = held(machine)
        for order in itertools.permutations(range(3)):
            for number in order:
                machine.drives.insert("disk0", each[number])
                machine.drives.insert("disk0", each[number])
            assert chain(machine, "disk0") == ([*names, "qcow2"], "disk0")
            for step, number in enumerate(order, 1):
                machine.drives.remove("disk0", each[number])
                left = [it for n, it in enumerate(names) if n not in order[:step]]
                assert chain(machine, "disk0") == ([*left, "qcow2"], "disk0")
                machine.drives.remove("disk0", each[number])
            nodes, sets, objects = held(machine)
            assert (nodes, objects) == (before[0], before[2])
            if running:  # else QEMU before 10.0 keeps descriptors that it does not use
                assert sets == before[1]


def test_above_what_is_put_on_top(real, disks, each, state, tmp_path):
    """And they do not keep the guest from being saved."""
    with real.machine(disks=disks) as machine, ExitStack() as stack:
        for it in each:
            machine.drives.insert("root", it)
        machine.pause()
        for _ in range(2):
            fresh = [stack.enter_context(empty_overlay(size, tmp_path)) for size in disks.sizes]
            machine.drives.put_on_top(fresh)
        machine.save(state, with_memory=True)
        machine.resume()
        drivers, storage = chain(machine, "root")
        assert drivers == ["blkdebug", "throttle", "blklogwrites", "qcow2"]
        assert storage.startswith("top-")
        for it in each:
            machine.drives.remove("root", it)
        assert chain(machine, "root") == (["qcow2"], storage)


def test_a_disk_that_is_pulled_out(real, disks, each, tmp_path):
    """Its filters come back with it, also those that were put in meanwhile. A recording is over."""
    errors, throttle, recorder = each
    with real.machine(disks=disks) as machine, empty_overlay(MIB, tmp_path) as layer:
        disk = PluggedDisk(
            name="data", port="port0", size=MIB, read_only=False, base=None, layers=(layer,)
        )
        before = held(machine)
        machine.drives.plug(disk)
        for it in recorder, errors:
            machine.drives.insert("data", it)
        for _ in range(2):
            assert machine.drives.unplug("data", Deadline(0), machine.check) is False
            machine.execute("system_reset")
            assert machine.drives.unplug("data", Deadline(30), machine.check) is True
            assert held(machine) == before
            machine.drives.insert("data", throttle)
            machine.drives.plug(disk)
            assert chain(machine, "data") == (["blkdebug", "throttle", "qcow2"], "at-data")
            machine.drives.remove("data", throttle)
            assert chain(machine, "data") == (["blkdebug", "qcow2"], "at-data")
        machine.drives.remove("data", errors)
        assert chain(machine, "data") == (["qcow2"], "at-data")


def test_what_cannot_be_made(real, disks, each, log):
    with real.machine(disks=disks) as machine:
        before = held(machine)
        bad = {"driver": "no-such-driver"}
        wrong = Filter(order=RECORDER, device=lambda _: bad, object=each[1].object, files=[log])
        with pytest.raises(MonitorError, match="no-such-driver"):
            machine.drives.insert("root", wrong)
        assert held(machine) == before
        with pytest.raises(MonitorError, match="limit"):
            machine.drives.insert(
                "root",
                replace(wrong, object={"qom-type": "throttle-group", "limits": {"limit": 1}}),
            )
        assert held(machine) == before
        machine.drives.insert("no-such-disk", each[0])
        machine.drives.insert("no-such-disk", each[0])
        machine.drives.remove("no-such-disk", each[0])
        assert held(machine) == before
