"""How limits follow what a machine has been seen to take."""

import pytest

from pytest_vmsandbox.machine.host import MOST_SLOWNESS, Pace


class TestPace:
    def test_a_usual_machine_has_the_usual_limits(self):
        pace = Pace()
        pace.took(0.04, usual=0.25)
        assert pace.stretch(30) == 30
        assert pace.stretch(30, 10) == 300

    def test_a_slow_one_has_longer_ones(self):
        pace = Pace()
        pace.took(1.0, usual=0.25)
        assert pace.stretch(30) == 120

    def test_what_was_slow_once_counts(self):
        pace = Pace()
        pace.took(1.0, usual=0.25)
        pace.took(0.04, usual=0.25)
        assert pace.slowness == 4

    def test_a_limit_that_passed_doubles_them(self):
        pace = Pace()
        for _ in range(3):
            pace.was_late()
        assert pace.stretch(10) == 80

    @pytest.mark.parametrize("scale", [1.0, 10.0])
    def test_nothing_is_waited_for_without_end(self, scale):
        pace = Pace()
        pace.took(1e6, usual=0.25)
        pace.was_late()
        assert pace.stretch(1.0, scale) == MOST_SLOWNESS

    def test_no_limit_is_shorter_than_the_accelerator_asks_for(self):
        assert Pace().stretch(1.0, 2 * MOST_SLOWNESS) == 2 * MOST_SLOWNESS
