"""The pool of armed clones, with clones that are nothing but a record of what happened to them."""

import fcntl
import os
import threading
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from pytest_vmsandbox.core.errors import GuestLost, LaunchError
from pytest_vmsandbox.core.spec import GIB, Hardware
from pytest_vmsandbox.guests.cloning import making as cloning, pool as pool_module
from pytest_vmsandbox.guests.cloning.making import Clone
from pytest_vmsandbox.guests.cloning.pool import CLAIM, Pool
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.quota import Quota

SECONDS = 20  # more than anything here takes
DEPTH = 3


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def settled():
    """Give fillers the time to do what they should not."""
    time.sleep(0.05)


class FakeMachine:
    """A machine and its helper; `fault` is raised when it is to go on."""

    lead = Lead()

    def __init__(self):
        self.running = False
        self.fault = None
        self.status = None

    def ended(self):
        return self.status

    def send_clock(self):
        return 1

    def clock_error(self, number, started):
        return 0.0

    def resume(self):
        if self.fault:
            raise self.fault
        self.running = True


class FakePool(Pool):
    """A pool that arms nothing real.

    Attributes:
        made: all clones, in order.
        makers: the names of the threads that made them.
        closed: the names of those that are gone, in order.
        gate: nothing is armed as long as it is not set.
        fault: raised instead of arming.
        tries: how often anything was to be armed.
    """

    def __init__(self, backend, *args, **kwargs):
        super().__init__(self._arm_nothing, *args, **kwargs)
        self._backend = backend
        self.made, self.makers, self.closed = [], [], []
        self.gate = threading.Event()
        self.gate.set()
        self.fault = None
        self.tries = 0
        self.resume_fault = None

    def _arm_nothing(self, opened, blueprint, *, arm):
        self.tries += 1
        assert self.gate.wait(SECONDS)
        if self.fault is not None:
            raise self.fault
        name = self._backend.name(blueprint.image)
        machine = FakeMachine()
        machine.fault = self.resume_fault
        machine.running = not arm
        stack = ExitStack()
        stack.callback(self.closed.append, name)
        clone = clone_of(name, machine, stack, is_armed=arm)
        self.made.append(clone)
        self.makers.append(threading.current_thread().name)
        return clone

    def kind(self, opened, network="isolated"):
        return self._kinds[opened.template.key, network]

    def armed(self, opened, count, network="isolated"):
        """Wait until so many are."""
        wait_for(lambda: len(self.kind(opened, network).armed) == count)


def clone_of(name, machine, stack, *, is_armed):
    return Clone(
        is_armed=is_armed,
        machines=anything(SimpleNamespace(name=name)),
        running=anything(SimpleNamespace(machine=machine)),
        helper=machine,
        stack=stack,
    )


def anything(value):
    """The same, for the type checker's eyes."""
    return value


def template(key="a-key"):
    return SimpleNamespace(template=SimpleNamespace(key=key))


def blueprint_on(network="isolated"):
    return SimpleNamespace(image="debian-13", hardware=Hardware(network=network))


OPENED, BLUEPRINT = anything(template()), anything(blueprint_on())


@pytest.fixture
def quota(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "total_memory", lambda: 100 * GIB)
    folder = tmp_path / f"{os.getpid()}-00000000"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Quota(folder)


@contextmanager
def running(quota, fillers=2):
    count = iter(range(1, 10_000))
    backend = SimpleNamespace(name=lambda image: f"{image}.{next(count)}")
    with FakePool(anything(backend), quota, fillers=fillers) as pool:
        assert isinstance(pool, FakePool)
        try:
            yield pool
        finally:
            pool.gate.set()
    names = [clone.machines.name for clone in pool.made]
    assert sorted(pool.closed) == sorted(names)  # each once
    assert quota._claimed == 0
    assert not [it for it in threading.enumerate() if it.name == "vmsandbox-filler"]


@pytest.fixture
def pool(quota):
    """At its end all clones must be gone, and all claims, and all threads."""
    with running(quota) as pool:
        yield pool


def lease(pool, opened=OPENED, blueprint=BLUEPRINT, *, more=False):
    return pool.lease(opened, blueprint, more=more)


class TestAhead:
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 50])
    def test_no_more_than_are_expected_and_no_more_than_it_is_deep(self, pool, quota, count):
        pool.expect(OPENED, BLUEPRINT, count)
        pool.armed(OPENED, min(count, DEPTH))
        settled()
        assert len(pool.made) == min(count, DEPTH)
        assert quota._claimed == len(pool.made) * CLAIM

    def test_nothing_without_being_told(self, pool):
        with lease(pool) as (_, was_armed):
            settled()
        assert not was_armed
        assert len(pool.made) == 1
        assert not any(thread.is_alive() for thread in pool._threads)

    def test_all_that_were_expected_come_from_it(self, pool):
        pool.expect(OPENED, BLUEPRINT, 10)
        for _ in range(10):
            wait_for(lambda: pool.kind(OPENED).armed)
            with lease(pool) as (clone, was_armed):
                assert was_armed
                assert clone.running.machine.running
        settled()
        assert len(pool.made) == 10
        assert set(pool.makers) == {"vmsandbox-filler"}

    def test_the_oldest_comes_first(self, quota):
        with running(quota, fillers=1) as pool:
            pool.expect(OPENED, BLUEPRINT, DEPTH)
            pool.armed(OPENED, DEPTH)
            for _ in range(DEPTH):
                with lease(pool):
                    pass
            assert pool.closed == [clone.machines.name for clone in pool.made]

    def test_expectations_add_up(self, pool):
        for _ in range(2):
            pool.expect(OPENED, BLUEPRINT, 1)
        pool.armed(OPENED, 2)

    def test_one_ahead_when_two_were_taken_that_nobody_expected(self, pool):
        with lease(pool, more=True):
            settled()
            assert len(pool.made) == 1
        with lease(pool, more=True):
            pool.armed(OPENED, 1)
            settled()
        assert len(pool.made) == 3

    def test_who_has_taken_one_has_a_head_start_as_long_as_there_are_more(self, pool, monkeypatch):
        monkeypatch.setattr("pytest_vmsandbox.guests.cloning.pool._HEAD_START_SECONDS", 2 * SECONDS)
        pool.expect(OPENED, BLUEPRINT, 10)
        pool.armed(OPENED, DEPTH)
        for _ in range(DEPTH - 1):
            with lease(pool):
                settled()
        assert len(pool.made) == DEPTH
        with lease(pool):
            wait_for(lambda: len(pool.made) > DEPTH)

    def test_a_paused_clone_goes_on_only_when_it_is_leased(self, pool):
        pool.expect(OPENED, BLUEPRINT, 2)
        pool.armed(OPENED, 2)
        with lease(pool):
            (waiting,) = pool.kind(OPENED).armed
            assert [
                clone.running.machine.running for clone in pool.made if clone is not waiting
            ] == [True]
            assert not waiting.running.machine.running

    def test_one_whose_qemu_something_has_killed_is_not_given_out(self, pool):
        pool.expect(OPENED, BLUEPRINT, DEPTH)
        pool.armed(OPENED, DEPTH)
        *dead, last = pool.kind(OPENED).armed  # two fillers may end in another order
        for clone in dead:
            clone.running.machine.status = -9
        with lease(pool) as (clone, was_armed):
            assert clone is last
            assert was_armed
            assert pool.closed == [clone.machines.name for clone in dead]

    def test_one_stays_if_who_asks_gives_up_now(self, pool):
        """Ctrl-C ends a thread at any look at a deadline, such as that for whether QEMU has ended."""
        pool.expect(OPENED, BLUEPRINT, 1)
        pool.armed(OPENED, 1)
        machine = pool.made[0].running.machine
        machine.ended = MagicMock(side_effect=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt), pool.lease(OPENED, BLUEPRINT, more=False):
            pass
        assert list(pool.kind(OPENED).armed) == pool.made[:1]

    def test_kinds_do_not_mix(self, pool):
        """Other templates, and other networks of the same."""
        other, nat = anything(template("another-key")), anything(blueprint_on("nat"))
        pool.expect(OPENED, BLUEPRINT, 1)
        pool.armed(OPENED, 1)
        with lease(pool, other) as (_, was_armed):
            assert not was_armed
        with lease(pool, OPENED, nat) as (_, was_armed):
            assert not was_armed
        with lease(pool) as (clone, was_armed):
            assert was_armed
            assert clone is pool.made[0]

    def test_who_wants_most_comes_first(self, quota):
        other = anything(template("another-key"))
        with running(quota, fillers=1) as pool:
            pool.gate.clear()
            pool.expect(other, BLUEPRINT, 1)
            wait_for(lambda: pool.tries == 1)
            pool.expect(other, BLUEPRINT, 1)
            pool.expect(OPENED, BLUEPRINT, 3)
            pool.gate.set()
            pool.armed(OPENED, 3)
            pool.armed(other, 2)


class TestWithoutOne:
    def test_who_asks_makes_one_and_it_runs(self, pool):
        with lease(pool) as (clone, was_armed):
            assert not was_armed
            assert clone.running.machine.running
            assert pool.closed == []
        assert pool.makers == [threading.current_thread().name]

    def test_one_that_is_on_its_way_is_waited_for(self, pool):
        """It is there sooner than one that is begun now."""
        pool.gate.clear()
        pool.expect(OPENED, BLUEPRINT, 1)
        wait_for(lambda: pool.tries == 1)
        got = []

        def use():
            with lease(pool) as (clone, was_armed):
                got.append((clone, was_armed))

        thread = threading.Thread(target=use)
        thread.start()
        settled()
        assert got == []
        pool.gate.set()
        thread.join(SECONDS)
        assert got == [(pool.made[0], False)]
        assert len(pool.made) == 1

    def test_more_ask_than_are_on_their_way(self, pool):
        pool.gate.clear()
        pool.expect(OPENED, BLUEPRINT, 1)
        wait_for(lambda: pool.tries == 1)
        got = []

        def use():
            with lease(pool) as (clone, _):
                got.append(clone.machines.name)
                wait_for(lambda: len(got) == 4)  # all at a time

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        settled()
        pool.gate.set()
        for thread in threads:
            thread.join(SECONDS)
        assert len(set(got)) == 4

    def test_there_is_no_room_for_spare_ones(self, pool, quota, monkeypatch):
        """Whoever asks gets one all the same."""
        monkeypatch.setattr(host, "total_memory", lambda: 0)
        pool.expect(OPENED, BLUEPRINT, 3)
        wait_for(lambda: pool.kind(OPENED).failure is not None)
        assert "no memory left" in pool.kind(OPENED).failure.brief
        assert quota._claimed == 0
        with lease(pool) as (_, was_armed):
            assert not was_armed
            assert quota._claimed == CLAIM


class TestFailure:
    def test_of_who_asks(self, pool, quota):
        pool.fault = LaunchError("no QEMU today")
        with pytest.raises(LaunchError, match="no QEMU today"), lease(pool):
            pass
        assert quota._claimed == 0

    @pytest.mark.parametrize(
        ("fault", "brief"),
        [
            (LaunchError("no QEMU today"), "no QEMU today"),
            (GuestLost("it does not answer"), "it does not answer"),
            (RuntimeError("a mistake"), "could not be armed: RuntimeError('a mistake')"),
            (OSError("no descriptors"), "could not be armed: OSError('no descriptors')"),
        ],
    )
    def test_of_a_filler_and_then_it_goes_on(self, pool, quota, fault, brief):
        """It does not try again and again; who asks next tries, and all is well after that."""
        pool.fault = fault
        pool.expect(OPENED, BLUEPRINT, 50)
        wait_for(lambda: pool.kind(OPENED).failure is not None and not pool.kind(OPENED).arming)
        settled()
        assert pool.tries <= 2  # there are two fillers
        assert brief in pool.kind(OPENED).failure.brief
        assert quota._claimed == 0
        with pytest.raises(type(fault)), lease(pool, more=True):
            pass
        wait_for(lambda: not pool.kind(OPENED).arming)
        pool.fault = None
        with lease(pool, more=True), lease(pool, more=True):
            pass
        pool.armed(OPENED, DEPTH)

    def test_while_somebody_waits(self, pool):
        """Who waited for it tries by itself, and tells the error."""
        pool.gate.clear()
        pool.fault = LaunchError("no QEMU today")
        pool.expect(OPENED, BLUEPRINT, 1)
        wait_for(lambda: pool.tries == 1)
        timer = threading.Timer(0.05, pool.gate.set)
        timer.start()
        with pytest.raises(LaunchError, match="no QEMU today"), lease(pool):
            pass
        timer.join()
        assert pool.tries == 2

    def test_one_that_does_not_go_on_is_gone(self, pool, quota):
        pool.resume_fault = GuestLost("it does not answer")
        pool.expect(OPENED, BLUEPRINT, 1)
        pool.armed(OPENED, 1)
        with pytest.raises(GuestLost, match="does not answer"), lease(pool):
            pass
        assert pool.closed == [pool.made[0].machines.name]
        assert quota._claimed == 0

    def test_of_its_user(self, pool, quota):
        with pytest.raises(KeyError), lease(pool):
            raise KeyError
        assert pool.closed == [pool.made[0].machines.name]
        assert quota._claimed == 0


class TestEnd:
    def test_of_those_that_nobody_takes(self, quota, monkeypatch):
        monkeypatch.setattr(pool_module, "IDLE_SECONDS", 0.1)
        with running(quota) as pool:
            pool.expect(OPENED, BLUEPRINT, 3)
            # On a busy machine the time may be over before all three are there.
            wait_for(lambda: pool.made and pool.kind(OPENED).last.expired)
            wait_for(lambda: not pool.kind(OPENED).arming and quota._claimed == 0)
            made = len(pool.made)
            settled()
            assert len(pool.made) == len(pool.closed) == made
            monkeypatch.setattr(pool_module, "IDLE_SECONDS", 60)
            with lease(pool, more=True) as (_, was_armed):  # and they come back with demand
                assert not was_armed
                wait_for(lambda: pool.kind(OPENED).armed)

    def test_of_all(self, quota):
        with running(quota) as pool:
            pool.expect(OPENED, BLUEPRINT, 3)
            pool.armed(OPENED, 3)
            assert pool.closed == []
        assert len(pool.closed) == 3

    def test_while_some_are_being_armed(self, quota):
        with running(quota) as pool:
            pool.gate.clear()
            pool.expect(OPENED, BLUEPRINT, 3)
            wait_for(lambda: pool.tries == 2)
        assert len(pool.closed) == 2

    def test_after_an_error(self, quota):
        pools = []

        def fail():
            with running(quota) as pool:
                pools.append(pool)
                pool.expect(OPENED, BLUEPRINT, 3)
                pool.armed(OPENED, 3)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert len(pools[0].closed) == 3
        assert quota._claimed == 0

    def test_of_one_that_never_began(self, quota):
        with running(quota):
            pass

    def test_of_what_came_from_a_template(self, pool, quota):
        other = anything(template("another-key"))
        pool.expect(OPENED, BLUEPRINT, 2)
        pool.expect(OPENED, anything(blueprint_on("nat")), 1)
        pool.expect(other, BLUEPRINT, 1)
        wait_for(lambda: len(pool.made) == 4)
        pool.armed(other, 1)
        pool.armed(OPENED, 2)
        pool.armed(OPENED, 1, "nat")
        pool.forget(OPENED)
        assert len(pool.closed) == 3
        assert quota._claimed == CLAIM
        settled()
        assert len(pool.made) == 4

    def test_of_what_is_on_its_way_from_a_template(self, pool, quota):
        pool.gate.clear()
        pool.expect(OPENED, BLUEPRINT, 1)
        wait_for(lambda: pool.tries == 1)
        pool.forget(OPENED)
        pool.gate.set()
        wait_for(lambda: pool.closed)
        wait_for(lambda: quota._claimed == 0)

    def test_forgetting_what_nobody_knows(self, pool):
        pool.forget(OPENED)


@pytest.mark.parametrize("expected", [0, 10, 40])
def test_many_at_once(pool, quota, expected):
    """Nobody gets one that somebody else has had, and none is left."""
    got, failures = [], []
    pool.expect(OPENED, BLUEPRINT, expected)

    def use():
        try:
            for _ in range(5):
                with lease(pool, more=True) as (clone, _):
                    got.append(clone.machines.name)
                    assert clone.machines.name not in pool.closed
                    time.sleep(0.001)
                assert clone.machines.name in pool.closed
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert failures == []
    assert len(got) == len(set(got)) == 40
    settled()
    kind = pool.kind(OPENED)
    assert len(kind.armed) <= DEPTH
    assert quota._claimed == len(kind.armed) * CLAIM


class TestArm:
    def test_the_network_of_the_first_clone_of_a_template_is_looked_at(self, monkeypatch):
        """In each run, also where another one has made the template."""
        looked = []

        def refusal(address, _timeout):
            looked.append(address)
            return True

        monkeypatch.setattr(cloning, "refusal", refusal)
        monkeypatch.setattr(cloning, "Machines", MagicMock())
        opened, blueprint = MagicMock(checked=threading.Event()), MagicMock()
        for _ in range(2):
            cloning.cloned(MagicMock(), opened, blueprint, arm=True).stack.close()
        assert len(looked) == 1

    @pytest.mark.parametrize("refused", [True, False])
    def test_a_guest_that_refuses_a_connection_is_reached(self, monkeypatch, refused):
        """Where none is refused, its SSH server has to greet."""
        monkeypatch.setattr(cloning, "refusal", lambda address, _: address and refused)
        greeted = MagicMock()
        monkeypatch.setattr(cloning, "check_network", greeted)
        opened = MagicMock(checked=threading.Event())
        cloning._check_reachable(MagicMock(), opened, MagicMock())
        assert greeted.called is not refused
