"""A guest that restarts by itself: who waits, and for what."""

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pytest_vmsandbox.core.errors import GuestLost
from pytest_vmsandbox.guests.running import restarts as module
from pytest_vmsandbox.guests.running.restarts import Restarts

SECONDS = 20


class Guest:
    """The machine, and the helper in it."""

    is_there = True
    stage = "kernel"
    lost = False
    closed = 0

    def __init__(self):
        self.now = 5.0
        self.monitor = self
        self.resets = []
        self.looked = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.settled = []
        self.in_work = threading.Semaphore(0)

    def events(self):
        return [{"event": "SHUTDOWN"}, *self.resets]

    def reset(self):
        self.now += 0.5
        stamp = {"seconds": int(self.now), "microseconds": int(self.now % 1 * 1e6)}
        self.resets.append({"event": "RESET", "timestamp": stamp})
        self.now += 0.5

    def check(self):
        self.looked.set()
        if self.lost:
            raise GuestLost("it is gone")

    def console_lines(self):
        return "the console"

    def close(self):
        self.closed += 1

    def restarts(self, seconds=SECONDS, setup=None):
        def again():
            restarts.await_end()  # what sets it up uses it
            self.in_work.release()
            assert self.may_go_on.wait(SECONDS)
            self.settled.append(True)

        restarts = Restarts(cast("Any", self), cast("Any", self), setup, seconds, again)
        return restarts


@pytest.fixture
def guest(monkeypatch):
    guest = Guest()
    monkeypatch.setattr(module, "wall", lambda: guest.now)
    return guest


@pytest.fixture
def waiting():
    """Starts a thread that waits for the end of a restart. The result tells whether it still waits."""
    threads = []

    def start(guest, restarts):
        guest.looked.clear()
        threads.append(threading.Thread(target=restarts.await_end))
        threads[-1].start()
        assert guest.looked.wait(SECONDS)
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_nobody_waits_without_a_restart(guest):
    guest.reset()  # before it answered
    restarts = guest.restarts()
    restarts.await_end()
    assert not restarts.goes_on


def test_a_call_waits_until_the_guest_is_set_up(guest, waiting):
    restarts = guest.restarts()
    guest.reset()
    thread = waiting(guest, restarts)
    guest.may_go_on.clear()
    guest.returned()
    assert restarts.goes_on
    assert thread.is_alive()
    assert guest.settled == []
    guest.may_go_on.set()
    thread.join(SECONDS)
    assert guest.settled == [True]
    assert not restarts.goes_on


def test_one_without_a_reset_is_set_up_too(guest):
    """A system that starts another kernel, or only its helper."""
    restarts = guest.restarts()
    guest.may_go_on.clear()
    guest.returned()
    assert restarts.goes_on
    guest.may_go_on.set()
    restarts.await_end()
    assert guest.settled == [True]


def test_a_restart_that_was_asked_for_is_set_up_alone(guest):
    """One by itself that comes meanwhile is set up after it."""
    restarts = guest.restarts()
    order = []

    def asked_for():
        restarts.await_end()
        guest.reset()
        guest.returned()
        assert not guest.in_work.acquire(blocking=False)
        order.append(list(guest.settled))

    restarts.settle(asked_for)
    restarts.await_end()
    assert order == [[]]
    assert guest.settled == [True]


def test_an_error_does_not_count_if_it_restarts_once_more(guest):
    restarts = guest.restarts()

    def fails():
        raise GuestLost("the helper restarted")

    def restarts_again():
        guest.reset()
        guest.returned()
        fails()

    restarts.settle(restarts_again)
    restarts.await_end()
    assert guest.settled == [True]
    with pytest.raises(GuestLost, match="the helper restarted"):
        restarts.settle(fails)
    assert not restarts.goes_on


def test_one_that_is_lost_meanwhile(guest):
    restarts = guest.restarts()
    guest.reset()
    guest.lost = True
    with pytest.raises(GuestLost, match="it is gone"):
        restarts.await_end()


def test_one_that_does_not_come_back(guest):
    restarts = guest.restarts(seconds=0.0)
    guest.reset()
    with pytest.raises(GuestLost, match="has not come back within 0 s") as lost:
        restarts.await_end()
    assert lost.value.remedy


def test_a_helper_that_nobody_starts_is_forgotten(guest):
    restarts = guest.restarts(setup=SimpleNamespace(is_by_hand=True))
    restarts.await_end()
    assert guest.closed == 0
    guest.reset()
    restarts.await_end()
    assert guest.closed == 1
