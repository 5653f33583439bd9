"""The names that users import."""

import pytest_vmsandbox


def test_they_are_shown_before_they_are_used():
    assert set(pytest_vmsandbox.__all__) <= set(dir(pytest_vmsandbox))


def test_each_is_there():
    assert set(pytest_vmsandbox.__all__) == set(pytest_vmsandbox._HOME_OF)
    for name in pytest_vmsandbox.__all__:
        assert getattr(pytest_vmsandbox, name).__name__ == name
