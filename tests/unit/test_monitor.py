"""How long this side waits for QEMU's monitor."""

from contextlib import suppress

import pytest

from pytest_vmsandbox.core.errors import MonitorError
from pytest_vmsandbox.machine.host import Pace
from pytest_vmsandbox.machine.loop import LoopThread
from pytest_vmsandbox.machine.qmp import Monitor


@pytest.fixture
def waits(monkeypatch):
    """Asks QEMU, which answers or not, and returns for how many seconds that was waited for."""
    found = []

    def wait(_, work, timeout, what):
        work.close()
        found.append(timeout)
        if what != "answers":
            raise MonitorError(what, transient=what == "stopped")

    def ask(what, **arguments):
        with suppress(MonitorError):
            monitor.execute(what, **arguments)
        return found.pop()

    monkeypatch.setattr(Monitor, "_await", wait)
    with LoopThread() as loop:
        monitor = Monitor(loop, None, Pace())
        yield ask


def test_a_stopped_qemu_is_not_waited_for_as_long_again(waits):
    assert waits("stopped", timeout=30) == 30
    assert waits("stopped", timeout=30) == 1
    assert waits("stopped", timeout=0.5) == 0.5


@pytest.mark.parametrize("then", ["answers", "refuses"])
def test_one_that_answers_again_is(waits, then):
    waits("stopped")
    waits(then)
    assert waits("answers", timeout=20) == 20


def test_events_go_on_when_a_guest_moves():
    with LoopThread() as loop:
        before = Monitor(loop, None, Pace(), [{"event": "RESET"}])
        after = Monitor(loop, None, Pace(), before.events())
        before._events.append({"event": "STOP"})
        after.follow(before)
        assert [event["event"] for event in after.events()] == ["RESET", "STOP"]
        assert after.wait_event("STOP", since=1, timeout=0) == {"event": "STOP"}
