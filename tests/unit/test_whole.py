"""Clones of a whole cluster that nobody asks for any more."""

import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.guests.cloning import pool
from pytest_vmsandbox.guests.clusters import whole
from pytest_vmsandbox.guests.clusters.sealed import SealedCluster
from support.resident import wait_for


@pytest.fixture
def clones(monkeypatch):
    """Clones of a cluster without machines. Events tell which of those that are armed have ended."""

    class Fakes(whole.Clones):
        def __init__(self):
            settings = SimpleNamespace(clones="armed")
            backend: Any = SimpleNamespace(settings=settings, hypervisor=None)
            networks: Any = None
            super().__init__(backend, networks, SealedCluster({}, {}, ExitStack()))
            self.armed = []

        def _made(self, *, arm):
            stack = ExitStack()
            if arm:
                self.armed.append(threading.Event())
                stack.callback(self.armed[-1].set)
            return whole.Whole(networks={}, seats={}, clones={}, is_armed=arm, stack=stack)

    monkeypatch.setattr(whole, "go_on", lambda _: None)
    fakes = Fakes()
    yield fakes
    fakes.close()
    assert all(ended.is_set() for ended in fakes.armed)


def lend(clones):
    with clones.lent():
        pass


def test_one_that_nobody_wants_ends(clones, monkeypatch):
    lend(clones)
    assert clones.armed == []
    monkeypatch.setattr(pool, "IDLE_SECONDS", 0)
    lend(clones)
    (unused,) = clones.armed
    assert unused.wait(60)
    monkeypatch.setattr(pool, "IDLE_SECONDS", 600)
    lend(clones)  # and they come back with demand
    lend(clones)
    wait_for(lambda: len(clones.armed) == 3)
    assert [ended.is_set() for ended in clones.armed] == [True, True, False]
