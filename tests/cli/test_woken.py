"""Several commands in guests that one of them has woken. The guests are played."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from pytest_vmsandbox.cli import woken
from pytest_vmsandbox.core.errors import GuestLost
from pytest_vmsandbox.guests.kept import Group

GROUP = Group(id="a1", guests=("db1-1", "db2-1"), networks=())


def kept(name):
    return SimpleNamespace(key=name, guest=f"{name}-1", moment=SimpleNamespace(folder="/p"))


def guest(name):
    found = SimpleNamespace(returncode=0)
    return SimpleNamespace(
        name=name, ssh_command=f"ssh {name}", engine=SimpleNamespace(loss=None),
        run=lambda argv, check: found,
    )  # fmt: skip


@contextmanager
def visiting(root, group=GROUP):
    with woken.entrance(root, group) as visit:
        assert isinstance(visit, woken.Visit)
        yield visit


@pytest.fixture
def door(tmp_path):
    with woken.entrance(tmp_path, GROUP) as door:
        assert isinstance(door, woken.Door)
        yield door


@pytest.fixture
def opened(door):
    guests = [guest("db1"), guest("db2")]
    with door.opened(guests, [kept("db1"), kept("db2")]):
        yield guests


def test_the_second_one_gets_the_way_in(door, opened, tmp_path):
    with visiting(tmp_path) as visit:
        way = visit.way(kept("db2"))
        assert (way.ssh, way.folder, way.loss()) == ("ssh db2", "/p", None)
        opened[1].engine.loss = GuestLost("db2-1: QEMU ended", details="its console")
        assert way.loss().brief == "db2-1: QEMU ended"
        with pytest.raises(GuestLost, match="its console\nRemedy: enter it again"):
            visit.way(kept("db2"))


def test_it_waits_until_they_are_woken(door, tmp_path):
    found = []

    def visit():
        with visiting(tmp_path) as visit:
            found.append(visit.way(kept("db1")).ssh)

    thread = threading.Thread(target=visit)
    thread.start()
    with door.opened([guest("db1")], [kept("db1")]):
        thread.join(60)
    assert found == ["ssh db1"]


def test_the_first_one_waits_for_the_others(door, opened, tmp_path):
    told: list[int] = []
    door.await_others(told.append)
    assert told == []
    come, leave = threading.Event(), threading.Event()

    def visit():
        with visiting(tmp_path) as visit:
            visit.way(kept("db1"))
            come.set()
            leave.wait(60)

    thread = threading.Thread(target=visit)
    thread.start()
    assert come.wait(60)

    def tell(count):
        told.append(count)
        leave.set()

    door.await_others(tell)
    thread.join(60)
    assert told == [1]


def test_others_hear_that_the_first_one_has_ended(door, opened, tmp_path):
    with visiting(tmp_path) as visit:
        way = visit.way(kept("db2"))
        door.close()
        assert "the command that woke it has ended" in way.loss().brief
        with pytest.raises(GuestLost, match="has ended"):
            visit.way(kept("db2"))
    with woken.entrance(tmp_path, GROUP) as next_one:
        assert isinstance(next_one, woken.Door)


def test_a_killed_one_leaves_nothing(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from pytest_vmsandbox.cli import woken\n"
        "from pytest_vmsandbox.guests.kept import Group\n"
        "with woken.entrance(Path(sys.argv[1]), Group(id='a1', guests=(), networks=())): print(1, flush=True), time.sleep(600)"
    )
    words = [sys.executable, "-c", program, os.fspath(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with visiting(tmp_path) as visit:
            process.kill()
            with pytest.raises(GuestLost, match="the command that woke it has ended"):
                visit.way(kept("db1"))
        process.wait(60)
    with woken.entrance(tmp_path, GROUP) as next_one:
        assert isinstance(next_one, woken.Door)


def test_another_group_or_cache_is_another_one(door, tmp_path):
    other = Group(id="b2", guests=("db1-1",), networks=())
    for root, group in ((tmp_path, other), (tmp_path / "other", GROUP), (tmp_path, None)):
        with woken.entrance(root, group) as entrance:
            assert isinstance(entrance, woken.Door)


def test_another_user_is_not_heard(door, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(woken, "_TRY_SECONDS", 0)
    monkeypatch.setattr(woken, "_is_ours", lambda _: False)
    with woken.entrance(tmp_path, GROUP) as entrance:
        assert isinstance(entrance, woken.Door)  # that lets nobody in
    assert opened[0].engine.loss is None
