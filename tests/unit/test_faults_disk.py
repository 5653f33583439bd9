"""What can be asked of a faulty disk, and what QEMU is told."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox import ConfigError
from pytest_vmsandbox.core.spec import MIB, Hardware
from pytest_vmsandbox.guests.faults import disk
from pytest_vmsandbox.machine.disk import Disks
from pytest_vmsandbox.machine.filters import ERRORS, Filter, Filters, Place

PLACE = Place(below="disk0", id="filter-1", files=(), has_failed=False)


@pytest.fixture
def faults():
    made = disk.DiskFaults()
    disks = Disks(base=None, overlays=(), sizes=(MIB,))
    blueprint = SimpleNamespace(hardware=Hardware(disks=(MIB,)))
    machines = SimpleNamespace(name="tiny-1", disks=disks, blueprint=blueprint)
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
    (only,) = made.filters()
    rules = only.device(PLACE)["inject-error"]
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

    def test_which_one_has_failed(self, filters):
        filters.monitor.events = lambda: [
            self.event(filters._layers["disk0"][-1].node, os.strerror(5))
        ]
        assert filters.has_failed(self.lower)
        assert not filters.has_failed(self.upper)
