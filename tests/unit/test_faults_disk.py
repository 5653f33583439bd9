"""What can be asked of a faulty disk, and what QEMU is told."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox import ConfigError, GuestLost
from pytest_vmsandbox.core.spec import MIB, Hardware
from pytest_vmsandbox.guests.faults import disk
from pytest_vmsandbox.guests.running.ledger import Ledger
from pytest_vmsandbox.machine.disk import Disks
from pytest_vmsandbox.machine.filters import ERRORS, RECORDER, THROTTLE, Filter, Filters, Place

PLACE = Place(below="disk0", id="filter-1", files=(), has_failed=False)


@pytest.fixture
def faults():
    made = disk.DiskFaults()
    disks = Disks(base=None, overlays=(), sizes=(MIB,))
    blueprint = SimpleNamespace(hardware=Hardware(disks=(MIB,)))
    ledger = Ledger(None)
    machines = SimpleNamespace(name="tiny-1", disks=disks, blueprint=blueprint, faults=ledger)
    engine: Any = SimpleNamespace(name="tiny-1", machines=machines)
    made.engine = engine
    return made


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "what is wrong"),
        ({"rate": "fast"}, "rate='fast' is not a size"),
        ({"rate": 0}, "rate=0 is not a size"),
        ({"rate": True}, "rate=True is not a size"),
        ({"iops": 0}, "iops=0 is not"),
        ({"iops": "5"}, "iops='5' is not"),
        ({"fail": "trim"}, "fail='trim' is not"),
        ({"fail": ()}, r"fail=\(\) is not"),
        ({"fail": "read", "error": "EVIL"}, "error='EVIL' is not"),
        ({"once": True}, "about requests that fail"),
        ({"rate": 1, "sectors": [1]}, "about requests that fail"),
        ({"fail": "flush", "sectors": [1]}, "a flush has no sectors"),
        ({"fail": "read", "sectors": [2048]}, "has 2048, which is not a sector"),
        ({"fail": "read", "sectors": [-1]}, "has -1, which"),
        ({"fail": "read", "sectors": []}, "no sectors"),
        ({"gone": True, "rate": 1}, "cannot be combined"),
        ({"gone": True, "once": True}, "cannot be combined"),
        ({"disk": "root", "gone": True}, "has no disk 'root'"),
    ],
)
def test_what_is_refused(faults, wanted, message):
    with pytest.raises(ConfigError, match=message) as caught:
        faults.disk(**{"disk": "disk0", **wanted})
    assert caught.value.remedy


@pytest.mark.parametrize("wanted", [{"rate": 1000}, {"fail": "read"}, {"gone": True}])
def test_a_disk_that_is_recorded(faults, wanted):
    faults.engine.machines.faults.recorded["disk0"] = print
    with pytest.raises(ConfigError, match="can begin while tiny-1 records it") as caught:
        faults.disk("disk0", **wanted)
    assert "before the block of crash_points" in caught.value.remedy
    assert faults.engine.machines.faults.in_force == []


def failing(fail, **wanted):
    made = disk._failing(
        fail, **{"error": "EIO", "sectors": None, "once": False, "size": MIB, **wanted}
    )
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("fail", "once", "kinds", "text"),
    [
        ("write", False, ["write", "write-zeroes"], "writes fail with EIO"),
        ("write", True, ["write"], "writes fail with EIO, once"),
        (["flush", "read"], True, ["flush", "read"], "flushes and reads fail with EIO, once"),
        (("read", "all"), False, [None], "all requests fail with EIO"),
    ],
)
def test_rules(fail, once, kinds, text):
    made = failing(fail, once=once)
    rules = [rule for it in made.filters() for rule in it.device(PLACE)["inject-error"]]
    assert [rule.get("iotype") for rule in rules] == kinds
    assert all(rule["errno"] == 5 and rule["once"] is once for rule in rules)
    assert str(made) == text


def test_many_sectors_are_in_several_filters():
    made = failing("read", sectors=range(1000))
    found = [rule["sector"] for it in made.filters() for rule in it.device(PLACE)["inject-error"]]
    assert found == list(range(1000))
    assert len(made.filters()) == 4
    assert str(made) == "reads of 1000 sectors from 0 on fail with EIO"


class TestWhoFailed:
    """An error that a filter makes is told from one of this host."""

    def event(self, node, reason):
        data = {"node-name": node, "reason": reason}
        return {"event": "BLOCK_IO_ERROR", "data": data}

    @pytest.fixture
    def filters(self):
        monitor: Any = SimpleNamespace(events=list)
        made = Filters(lambda *_, **__: {}, monitor)
        self.lower = Filter(order=ERRORS, device=lambda _: {}, reasons={os.strerror(5)})
        self.upper = Filter(order=ERRORS, device=lambda _: {}, reasons={os.strerror(30)})
        for it in self.lower, self.upper:
            made.insert("disk0", "disk0", it, read_only=False)
        return made

    def test_the_highest_one_has_the_name_of_all(self, filters):
        top = filters._layers["disk0"][-1].node
        for number in 5, 30:
            assert not filters.hides_failure(self.event(top, os.strerror(number)))
        assert filters.hides_failure(self.event(top, os.strerror(28)))
        assert not filters.hides_failure(self.event("another", os.strerror(28)))
        assert not filters.hides_failure({"event": "STOP", "data": {}})


class TestWhichHasFailed:
    """Of filters that fail once, QEMU's counters tell which have done so. Not each failure has an event."""

    @pytest.fixture
    def counted(self):
        return {"failed_rd_operations": 0, "failed_wr_operations": 0, "failed_flush_operations": 0}

    @pytest.fixture
    def filters(self, counted):
        def execute(command, arguments, **more):
            if "stats" not in self.qemu:
                raise GuestLost("QEMU has ended")
            return [self.qemu] if command == "query-blockstats" else {"fdset-id": 1}

        self.qemu = {"qdev": "/machine/peripheral/disk-disk0/virtio-backend", "stats": counted}
        self.events = []
        monitor: Any = SimpleNamespace(events=lambda: self.events)
        return Filters(execute, monitor)

    def put(self, filters, *more):
        for it in more:
            filters.insert("disk0", "disk0", it, read_only=False)

    def test_of_several_kinds(self, filters, counted):
        read, flush = failing(("read", "flush"), once=True).filters()
        counted["failed_rd_operations"] = 5  # before it came
        self.put(filters, read, flush)
        assert not filters.has_failed(read)
        counted["failed_rd_operations"] += 1
        assert (filters.has_failed(read), filters.has_failed(flush)) == (True, False)
        counted["failed_flush_operations"] += 1
        filters.forget("disk0")  # without a look before
        assert not filters.has_failed(flush)

    def test_the_highest_one_is_the_first(self, filters, counted):
        (lower,) = failing("write", once=True).filters()
        (upper,) = failing("write", once=True, error="ENOSPC").filters()
        (always,) = failing("write", error="EROFS").filters()
        self.put(filters, lower, upper)
        counted["failed_wr_operations"] += 1
        assert (filters.has_failed(lower), filters.has_failed(upper)) == (False, True)
        self.put(filters, always)
        counted["failed_wr_operations"] += 9
        assert not filters.has_failed(lower)
        filters.remove("disk0", "disk0", always, read_only=False)
        counted["failed_wr_operations"] += 1
        assert filters.has_failed(lower)

    def test_all_parts_of_a_fault(self, filters, counted):
        parts = failing("read", once=True, sectors=range(1000)).filters()
        self.put(filters, *parts)
        counted["failed_rd_operations"] += 1
        assert all(map(filters.has_failed, parts))

    def test_after_the_end_of_qemu(self, filters):
        """Only the events are left."""
        read, flush = failing(("read", "flush"), once=True).filters()
        self.put(filters, read, flush)
        data = {"node-name": filters._layers["disk0"][-1].node, "reason": os.strerror(5)}
        self.events = [{"event": "BLOCK_IO_ERROR", "data": {**data, "operation": "read"}}]
        del self.qemu["stats"]
        assert (filters.has_failed(read), filters.has_failed(flush)) == (True, False)

    def test_after_a_move(self, filters, counted):
        """Names are not used again: the former events are not about the new filters."""
        (which,) = failing("read", once=True).filters()
        self.put(filters, which)
        counted["failed_rd_operations"] += 1
        assert filters.has_failed(which)
        former = set(filters._through)
        other = Filters(filters.execute, filters.monitor)
        other.follow(filters)
        assert other.has_failed(which)
        self.put(other, Filter(order=ERRORS, device=lambda _: {}))
        assert set(other._through) > former


def test_a_filter_is_told_when_qemu_flushes_it():
    """QEMU flushes what is below a block device when it deletes that."""
    monitor: Any = SimpleNamespace(events=list)
    told: list[str] = []
    calls: list[str] = []

    def execute(command, *_, **__):
        calls.append(command)
        return {}

    def flushed():
        assert "blockdev-del" not in calls
        told.append("flushed")

    def made(order, **more):
        return Filter(order=order, device=lambda _: {}, **more)

    filters = Filters(execute, monitor)
    recorder = made(RECORDER, flushed=flushed)
    early, late = made(THROTTLE), made(ERRORS)

    def change(what, which):
        calls.clear()
        told.clear()
        what("disk0", "disk0", which, read_only=False)
        return list(told)

    assert change(filters.insert, early) == []
    assert change(filters.insert, recorder) == []  # the other one is made again above it
    assert change(filters.insert, late) == []
    assert change(filters.remove, late) == ["flushed"]
    assert change(filters.remove, recorder) == []


@pytest.mark.parametrize(
    "wanted",
    [{"fail": True}, {"fail": "read", "once": "yes"}, {"gone": "no"}, {"fail": "read", "sectors": 5},
     {"iops": 0.5}, {"rate": 10**30}],
    ids=str,
)  # fmt: skip
def test_arguments_of_another_type_or_size(faults, wanted):
    with pytest.raises(ConfigError, match=list(wanted)[-1]):
        faults.disk("disk0", **wanted)
