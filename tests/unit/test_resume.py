"""How guests that were saved are put right when they go on."""

import pytest

from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import ConfigError, GuestLost
from pytest_vmsandbox.guests.lead import Drift, Lead
from pytest_vmsandbox.guests.running import resume


class Fakes:
    """A machine and its helper; what was done to them is in `done`.

    Attributes:
        errors: of the guest's clock, each time that it is set; the last one stays.
        spans: by how much it is ahead, at least and at most, each time that it is read; likewise.
    """

    def __init__(self, *errors, spans=()):
        self.errors = list(errors)
        self.spans = list(spans)
        self.lead = Lead()
        self.is_frozen = False
        self.is_away = False
        self.monitor = self
        self.resets = []
        self.done = []
        self.seeds = []
        self.files = {}
        self.fault = None

    def _do(self, what):
        self.done.append(what)
        if self.fault == what:
            raise GuestLost(f"no {what}", stage="command")

    # -- of a machine

    def resume(self):
        self._do("resume")

    def pause(self):
        self._do("pause")

    # -- of a helper

    def events(self):
        return [
            {"event": "RESET", "timestamp": {"seconds": int(at), "microseconds": 500_000}}
            for at in self.resets
        ]

    def read_lead(self, timeout=None):
        self._do(f"read {timeout}")
        return self.spans.pop(0) if len(self.spans) > 1 else self.spans[0]

    def assume(self):
        self._do("assume")

    def seed(self, data):
        self._do("seed")
        self.seeds.append(data)

    def set_hostname(self, hostname):
        self._do(f"name {hostname}")

    def write_file(self, path, data):
        self._do(f"write {path}")
        self.files[path] = data.decode()

    def _error(self):
        return self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]

    def set_clock(self):
        self._do("clock")
        return self._error()

    def send_clock(self):
        self._do("send")
        return 7

    def clock_error(self, number, started):
        assert number == 7
        assert abs(started - wall()) < 10
        self._do("answer")
        return self._error()


def from_state(fakes):
    resume.from_state(fakes, fakes)


def rename(fakes, hostname, *, in_files):
    resume.rename(fakes, hostname, in_files=in_files)


def pause(fakes, timeout=None):
    resume.pause(fakes, fakes, timeout)


def from_pause(fakes):
    resume.from_pause(fakes, fakes)


class TestFromState:
    def test_in_this_order(self):
        """The numbers are stirred before anything of the guest's can use them."""
        fakes = Fakes(0.001)
        from_state(fakes)
        assert fakes.done == ["assume", "resume", "seed", "clock"]

    def test_with_other_numbers_each_time(self):
        fakes = Fakes(0.0)
        for _ in range(3):
            from_state(fakes)
        assert len(set(fakes.seeds)) == 3
        assert {len(seed) for seed in fakes.seeds} == {64}

    def test_a_clock_that_is_set_late_is_set_again(self):
        fakes = Fakes(3.0, 0.2, resume.CLOCK_SECONDS)
        from_state(fakes)
        assert fakes.done.count("clock") == 3

    def test_a_clock_that_is_never_right(self):
        fakes = Fakes(3.0, 0.25, 2.0)
        with pytest.raises(GuestLost, match=r"the guest's clock is wrong by 0\.250 s") as caught:
            from_state(fakes)
        assert 5 < fakes.done.count("clock") < 100
        assert "overloaded" in caught.value.remedy

    @pytest.mark.parametrize("what", ["assume", "resume", "seed", "clock"])
    def test_what_goes_wrong_is_told(self, what):
        fakes = Fakes(0.0)
        fakes.fault = what
        with pytest.raises(GuestLost, match=f"no {what}"):
            from_state(fakes)
        assert fakes.done[-1] == what


class TestName:
    def test_where_a_boot_names_the_kernel_only(self):
        fakes = Fakes(0.0)
        rename(fakes, "tiny-3", in_files=False)
        assert fakes.done == ["name tiny-3"]

    def test_where_a_boot_writes_files_too(self):
        fakes = Fakes(0.0)
        rename(fakes, "debian-13-3", in_files=True)
        assert fakes.done[0] == "name debian-13-3"
        assert fakes.files["/etc/hostname"] == "debian-13-3\n"
        assert fakes.files["/etc/hosts"].splitlines() == [
            "127.0.0.1 localhost",
            "127.0.1.1 debian-13-3",
            "::1 localhost ip6-localhost ip6-loopback",
        ]

    def test_what_goes_wrong_is_told(self):
        fakes = Fakes(0.0)
        fakes.fault = "write /etc/hosts"
        with pytest.raises(GuestLost, match="no write /etc/hosts"):
            rename(fakes, "it", in_files=True)


class TestPause:
    def pause(self, *spans, timeout=None):
        fakes = Fakes(spans=spans)
        pause(fakes, timeout)
        return fakes

    @pytest.mark.parametrize(
        ("span", "lead"),
        [
            ((1e9, 1e9 + 0.02), 1e9 + 0.01),
            ((-3600.01, -3599.99), -3600.0),
            ((2.1, 2.1), 2.1),
            ((-1.22, -1.2), 0.0),  # that is how a clock is after a boot
            ((-0.001, 0.001), 0.0),
        ],
    )
    def test_what_was_done_to_the_clock_is_known_then(self, span, lead):
        fakes = self.pause(span)
        assert fakes.lead.at(0) == pytest.approx(lead)
        assert fakes.done == ["read None", "pause"]

    def test_what_is_known_best_counts(self):
        fakes = self.pause((-5.0, 5.0), (59.9, 60.1), (50.0, 70.0), (0.0, 0.0), timeout=1.0)
        assert fakes.lead.at(0) == pytest.approx(60.0)
        assert fakes.done == ["read 1.0"] * 3 + ["pause"]

    def test_a_guest_that_does_not_answer_is_not_paused(self):
        fakes = Fakes(spans=[(0.0, 0.0)])
        fakes.fault = "read None"
        with pytest.raises(GuestLost, match="no read"):
            pause(fakes)
        assert fakes.done == ["read None"]

    def test_what_a_fault_does_to_the_clock_is_not_what_the_test_did(self):
        """Even a fault of less than two seconds is kept, and its rate."""
        fakes = Fakes(spans=[(1.0, 1.0)])
        drift = Drift(offset=1.0, rate=0.9, since=wall())
        fakes.lead = Lead().with_drift(drift)
        pause(fakes)
        assert (fakes.lead.seconds, fakes.lead.drifts) == (0.0, (drift,))
        fakes.spans = [(61.0, 61.0)]
        pause(fakes)
        assert fakes.lead.seconds == pytest.approx(60.0, abs=1.0)
        assert fakes.lead.drifts == (drift,)

    def test_a_reset_has_ended_what_faults_did_before(self):
        fakes = Fakes(spans=[(0.0, 0.0)])
        before, after = Drift(60.0, since=wall() - 100), Drift(0.5, since=wall())
        fakes.lead = Lead(0.0, (before, after))
        fakes.resets = [wall() - 200, wall() - 50]
        pause(fakes)
        assert fakes.lead == Lead(0.0, (after,))

    def test_a_leap_second_to_come_is_left_alone(self):
        fakes = Fakes(spans=[(0.0, 0.0)])
        fakes.lead = lead = Lead().with_drift(Drift(9.0, since=wall(), is_free=True))
        pause(fakes)
        from_pause(fakes)
        from_state(fakes)
        assert fakes.lead == lead
        done = ["pause", "resume", "read None", "assume", "resume", "seed", "read None"]
        assert fakes.done == done

    def test_a_frozen_guest_is_not_paused(self):
        fakes = Fakes()
        fakes.is_away = True
        with pytest.raises(ConfigError, match="answering cannot be saved"):
            pause(fakes)
        assert fakes.done == []

    @pytest.mark.parametrize(
        ("error", "resumed"), [(KeyboardInterrupt(), ["resume"]), (GuestLost("gone"), [])]
    )
    def test_after_an_interrupt_the_guest_goes_on(self, monkeypatch, error, resumed):
        fakes = Fakes(spans=[(0.0, 0.0)])

        def fail():
            fakes.done.clear()
            raise error

        monkeypatch.setattr(fakes, "pause", fail)
        with pytest.raises(type(error)):
            pause(fakes)
        assert fakes.done == resumed


class TestFromPause:
    def test_the_clock_waits_there_when_the_processors_go_on(self):
        fakes = Fakes(0.004)
        from_pause(fakes)
        assert fakes.done == ["send", "resume", "answer"]

    def test_a_clock_that_is_set_late_is_set_again(self):
        fakes = Fakes(0.3, 0.1, 0.01)
        from_pause(fakes)
        assert fakes.done == ["send", "resume", "answer", "clock", "clock"]

    def test_a_clock_that_is_never_right(self):
        with pytest.raises(GuestLost, match=r"wrong by 1\.500 s"):
            from_pause(Fakes(1.5))

    @pytest.mark.parametrize("what", ["send", "resume", "answer"])
    def test_what_goes_wrong_is_told(self, what):
        fakes = Fakes(0.0)
        fakes.fault = what
        with pytest.raises(GuestLost, match=f"no {what}"):
            from_pause(fakes)
