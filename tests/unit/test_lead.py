"""How far a guest's clock is meant to be wrong."""

import pytest

from pytest_vmsandbox.guests.lead import Drift, Lead


def test_faults_add_up():
    jump, slow = Drift(offset=60.0, since=100.0), Drift(offset=-1.0, rate=0.9, since=200.0)
    lead = Lead(5.0).with_drift(jump).with_drift(slow)
    assert lead.at(200.0) == pytest.approx(64.0)
    assert lead.at(300.0) == pytest.approx(54.0)
    assert lead.rate == pytest.approx(0.9)
    assert lead.without(jump).at(300.0) == pytest.approx(-6.0)
    assert lead.without(jump).without(slow) == Lead(5.0)
    assert lead.without(Drift()) == lead


def test_equal_faults_are_two():
    one, other = Drift(offset=1.0), Drift(offset=1.0)
    lead = Lead().with_drift(one).with_drift(other)
    assert lead.without(one).drifts == (other,)


def test_a_reset_ends_what_was_before():
    early, late = Drift(1.0, since=100.0), Drift(2.0, since=200.0)
    lead = Lead(0.0, (early, late))
    assert lead.after_resets([]) == lead
    assert lead.after_resets([150.0, 90.0]).drifts == (late,)
    assert lead.after_resets([250.0]).drifts == ()


def test_a_leap_second_lets_nobody_set_the_clock():
    assert not Lead(3.0).is_free
    assert Lead().with_drift(Drift(is_free=True)).is_free
