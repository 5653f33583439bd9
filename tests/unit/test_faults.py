"""What becomes of a fault that Ctrl-C interrupts, that a snapshot meets, or that a preparation leaves."""

from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox import CommandTimeout, ConfigError, GuestLost
from pytest_vmsandbox.guests.faults import clock, memory, outage, processors
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.faults.faults import Faults
from pytest_vmsandbox.guests.faults.memory import MemoryFaults
from pytest_vmsandbox.guests.faults.processors import ProcessorFaults
from pytest_vmsandbox.guests.running.ledger import Ledger


class FakeMachine:
    """A machine whose CPUs can be paused, and whose process can be stopped."""

    def __init__(self):
        self.done = []
        self.stops = 0
        self.process = SimpleNamespace(stopped=self.stopped)

    def pause(self):
        self.done.append("pause")

    def resume(self):
        self.done.append("resume")

    def ended(self):
        return None

    @contextmanager
    def stopped(self):
        self.stops += 1
        yield


class FakeEngine:
    """The engine of a guest without a helper."""

    name = "tiny-1"
    loss = None
    explained = staticmethod(nullcontext)

    def __init__(self):
        self.machines = SimpleNamespace(faults=Ledger(None))
        self.running = self.switched_on()

    def switched_on(self):
        resident = SimpleNamespace(is_frozen=False, is_away=False)
        return SimpleNamespace(
            machine=FakeMachine(), stack=ExitStack(), resident=resident, helper=None
        )

    @contextmanager
    def use(self):
        yield self.running

    @contextmanager
    def still(self, running):
        yield


class FakeFault(Fault):
    """A fault that can fail."""

    def __init__(self, engine, start=None, stop=None):
        super().__init__(engine, "deaf")
        self.start, self.stop = start, stop
        self.stopped = 0

    def _start(self):
        if self.start:
            raise self.start

    def _stop(self):
        self.stopped += 1
        if (error := self.stop) is not None:
            self.stop = None
            raise error


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def ledger(engine):
    return engine.machines.faults


@pytest.fixture
def faults(engine):
    made = ProcessorFaults()
    made.engine = engine
    return made


def interrupt(*_):
    raise KeyboardInterrupt


class TestInterrupted:
    @pytest.mark.parametrize(
        "error", [KeyboardInterrupt(), pytest.fail.Exception(), TimeoutError()]
    )
    def test_an_end_can_be_repeated(self, engine, ledger, error):
        fault = FakeFault(engine, stop=error)
        with pytest.raises(type(error)), fault.begin():
            pass
        assert fault.in_force
        ledger.end_all()
        assert (fault.in_force, fault.stopped, ledger.in_force) == (False, 2, [])
        fault.end()
        assert fault.stopped == 2

    def test_a_beginning_counts_as_in_force(self, engine, ledger):
        fault = FakeFault(engine, start=TimeoutError())  # of the handler of a signal
        with pytest.raises(TimeoutError):
            fault.begin()
        assert fault.in_force
        ledger.end_all()
        assert (fault.in_force, fault.stopped) == (False, 1)

    def test_what_fails_is_over(self, engine, ledger):
        fault = FakeFault(engine, start=GuestLost("gone"))
        with pytest.raises(GuestLost):
            fault.begin()
        assert (fault.in_force, ledger.in_force) == (False, [])
        fault = FakeFault(engine, stop=GuestLost("gone")).begin()
        with pytest.raises(GuestLost):
            fault.end()
        assert (fault.in_force, ledger.in_force) == (False, [])

    def test_no_guest_stays_frozen(self, engine, ledger, faults, monkeypatch):
        """The thread goes on, so the CPUs are paused and resumed as if nothing had happened."""
        running, start = engine.running, processors._Freeze._start_thread

        def start_and_interrupt(fault):
            start(fault)
            fault._known.wait = interrupt

        monkeypatch.setattr(processors._Freeze, "_start_thread", start_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            faults.freeze()
        (entry,) = ledger.in_force
        with monkeypatch.context() as patch:
            patch.setattr("threading.Thread.join", interrupt)
            with pytest.raises(KeyboardInterrupt):
                entry.fault.end()
        assert ledger.in_force == [entry]
        ledger.end_all()
        assert running.machine.done == ["pause", "resume"]
        assert not running.resident.is_frozen
        assert ledger.in_force == []


def test_nothing_is_filled_while_a_disk_is_recorded(engine, ledger):
    ledger.recorded["disk0"] = print
    with pytest.raises(ConfigError, match="while a disk is recorded: disk0") as caught:
        Faults(engine).full("/")
    assert "before the block of crash_points" in caught.value.remedy
    assert ledger.in_force == []


def test_a_guest_that_is_removed_has_no_fault(engine, ledger):
    fault = FakeFault(engine).begin()
    ledger.is_closed = True  # as Machines.close does
    assert (fault.in_force, ledger.in_force, Faults(engine).in_force) == (False, [], ())


@pytest.mark.parametrize(
    ("offset", "text"),
    [
        (-34_560_000, "400 days behind"),
        (86_400, "24 h ahead"),
        (5400, "90 min ahead"),
        (-61, "61 s behind"),
        (0.25, "0.25 s ahead"),
        (3_000_000_000.5, "3000000000.5 s ahead"),
    ],
)
def test_how_far_a_clock_is_off_in_words(offset, text):
    assert clock._offset_text(offset) == text


class TestBlocks:
    def test_a_fault_that_was_ended_has_no_further_block(self, engine):
        fault = FakeFault(engine).begin()
        with fault:
            pass
        for used in (fault, FakeFault(engine).begin()):
            used.end()
            with pytest.raises(ConfigError, match="cannot be used again: deaf") as caught, used:
                pass
            assert "call the method" in caught.value.remedy

    def test_one_that_is_over_by_itself_has_one(self, engine):
        fault = FakeFault(engine).begin()
        fault.lapse()
        with fault:
            assert not fault.in_force
        with pytest.raises(ConfigError, match="cannot be used again"), fault:
            pass


class TestRollback:
    """A snapshot is restored. What is in the guest is as it was then."""

    def test_what_was_ended_since_is_ended_again(self, engine, ledger):
        outer, inner = FakeFault(engine).begin(), FakeFault(engine).begin()
        then = ledger.in_force
        inner.end()
        ledger.rolled_back(then)
        assert (inner.stopped, inner.in_force) == (2, False)
        assert (outer.stopped, outer.in_force) == (0, True)

    def test_what_began_since_is_gone(self, engine, ledger):
        then = ledger.in_force
        fault = FakeFault(engine).begin()
        ledger.rolled_back(then)
        assert (fault.stopped, fault.in_force, ledger.in_force) == (0, False, [])

    def test_a_stall_stays_in_force(self, engine, ledger, faults):
        then = ledger.in_force
        with faults.stall(0.5, period=0.001) as fault:
            former, engine.running = engine.running, engine.switched_on()
            former.stack.close()
            ledger.switched_on(engine.running.machine)
            ledger.rolled_back(then)
            assert fault.in_force
            fault._thread.join(0.01)
        assert engine.running.machine.stops
        assert not fault._thread.is_alive()


class TestLimitsOfOneService:
    """They overlap. The smallest one in force holds, and then what was there before."""

    @pytest.fixture
    def limits(self, engine, monkeypatch):
        """A service whose limits are those of the last call."""
        known = ["MemoryMax=infinity", "MemorySwapMax=infinity"]

        def run(_, script, name, *limits):
            assert name == "it.service"
            if "set-property" not in script:
                return SimpleNamespace(stdout="\n".join(known))
            known[:] = limits
            return SimpleNamespace(stdout="")

        monkeypatch.setattr(memory, "run_as_root", run)
        self.faults = MemoryFaults()
        self.faults.engine = engine
        return known

    @pytest.mark.parametrize("first", [0, 1])
    def test_they_end_in_any_order(self, limits, first):
        before = [*limits]
        sizes = [20, 10]
        made = [self.faults.memory(size, of="it.service") for size in sizes]
        assert limits == ["MemoryMax=10", "MemorySwapMax=0"]
        made.pop(first).end()
        assert limits[0] == f"MemoryMax={sizes[1 - first]}"
        made.pop().end()
        assert limits == before

    def test_one_that_cannot_begin_leaves_nothing(self, limits, ledger, monkeypatch):
        before, run = [*limits], vars(memory)["run_as_root"]

        def late(engine, script, *words):
            run(engine, script, *words)
            if "MemoryMax=10" in words:
                raise CommandTimeout("late", seconds=1)
            return SimpleNamespace(stdout="\n".join(before))

        monkeypatch.setattr(memory, "run_as_root", late)
        with pytest.raises(CommandTimeout):
            self.faults.memory(10, of="it.service")
        assert limits == before
        assert ledger.in_force == []


class TestOwed:
    """A fault has ended while the guest was off."""

    @pytest.fixture
    def owed(self, ledger):
        done = []

        def restore():
            done.append("tried")
            raise ConfigError("no room", remedy="make some")

        ledger.owes(restore)
        return done

    def test_what_cannot_be_restored_is_told(self, ledger, owed):
        assert ledger.unrestored == []
        ledger.answered()
        assert ledger.unrestored == ["the guest could not be restored: no room"]
        ledger.answered()
        assert owed == ["tried"]

    def test_nothing_is_owed_to_the_past(self, ledger, owed):
        ledger.rolled_back([])
        ledger.answered()
        assert owed == []


def test_a_preparation_may_not_leave_any(engine, ledger):
    ledger.refuse_left()
    with FakeFault(engine).begin():
        with pytest.raises(ConfigError, match="has left faults in force: deaf") as caught:
            ledger.refuse_left()
        assert "vm.faults.end_all()" in caught.value.remedy
    ledger.refuse_left()


class TestWhileTheGuestIsAway:
    def test_a_fault_that_needs_answers_is_refused_at_once(self, engine, ledger):
        engine.running.resident.is_away = True
        with pytest.raises(ConfigError, match="cannot begin now: deaf"):
            FakeFault(engine).begin()
        assert ledger.in_force == []

    def test_other_faults_begin(self, engine):
        engine.running.resident.is_away = True
        fault = FakeFault(engine)
        fault.needs_answers = False
        assert fault.begin().in_force

    def test_a_guest_that_is_off_decides_itself(self, engine):
        engine.running = None
        assert FakeFault(engine).begin().in_force


class TestHints:
    def test_name_what_is_in_force(self, engine, ledger):
        first, second = FakeFault(engine).begin(), FakeFault(engine).begin()
        assert ledger.hints() == ["faults in force: deaf; deaf"]
        first.end()
        second.end()
        assert ledger.hints() == []


@pytest.mark.parametrize(
    ("begin", "why"),
    [
        (lambda faults: faults.clock(-86_400 * 36_500), "before 1970"),
        (lambda faults: faults.clock(), "what is wrong"),
        (lambda faults: faults.freeze(float("inf")), "seconds=inf"),
        (lambda faults: faults.stall(0.5, period=1e-9), "period=1e-09"),
        (lambda faults: faults.suspend(0), "seconds=0"),
        (lambda faults: faults.suspend("1"), "seconds='1'"),
        (lambda faults: faults.full(""), "path='' is not a path"),
        (lambda faults: faults.full(None), "path=None is not a path"),
        (lambda faults: faults.full("/", left=True), "left=True is not a size"),
    ],
)
def test_arguments_that_mean_no_fault(engine, begin, why):
    with pytest.raises(ConfigError, match=why):
        begin(Faults(engine))


@pytest.mark.parametrize("has_come", [True, False])
def test_a_guest_that_is_away_before_its_program_is_known_to_have_started(has_come):
    def start(*_):
        raise GuestLost("kernel panic")

    engine: Any = SimpleNamespace(
        command_seconds=1.0, name="tiny-1", spec=SimpleNamespace(user="root")
    )
    running: Any = SimpleNamespace(start=start)
    words = {"what": "panic", "needs": "sysrq"}
    if has_come:
        assert outage.provoked(engine, running, "x", lambda: True, **words) is None
        return
    with pytest.raises(GuestLost, match="kernel panic"):
        outage.provoked(engine, running, "x", lambda: False, **words)
