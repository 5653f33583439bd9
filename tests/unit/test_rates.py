"""The interval of a failure rate holds the true rate as often as it says."""

import random

import pytest

from pytest_vmsandbox.plugin.rates import described, interval


@pytest.mark.parametrize(
    ("failed", "runs", "low", "high"),
    [  # from the tables of the beta distribution, which the bounds are quantiles of
        (0, 1, 0.0, 0.975),
        (1, 1, 0.025, 1.0),
        (0, 10, 0.0, 0.3085),
        (1, 10, 0.0025, 0.4450),
        (5, 10, 0.1871, 0.8129),
        (3, 100, 0.0062, 0.0852),
        (97, 100, 0.9148, 0.9938),
        (10, 100, 0.0490, 0.1762),
        (0, 1000, 0.0, 0.00368),
    ],
)
def test_known_values(failed, runs, low, high):
    assert interval(failed, runs) == pytest.approx((low, high), abs=0.00006)


@pytest.mark.parametrize("runs", [20, 100])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_it_holds_the_true_rate(rate, runs):
    chance = random.Random(16)
    held = 0
    for _ in range(10_000):
        low, high = interval(sum(chance.random() < rate for _ in range(runs)), runs)
        held += low <= rate <= high
    assert held >= 9_450


def test_many_runs():
    low, high = interval(3_000, 10_000)
    assert low < 0.3 < high
    assert high - low < 0.02


def test_described():
    assert described(3, 100) == "failed 3 of 100 (3.0 %, 95 % interval 0.6 to 8.5 %)"
    assert described(1, 1000) == "failed 1 of 1000 (0.10 %, 95 % interval 0.00 to 0.56 %)"
