import time

import pytest


def test_before():
    pass


@pytest.mark.timeout(0.5)
def test_hangs():
    time.sleep(60)


@pytest.fixture
def slow():
    time.sleep(0.6)


@pytest.mark.timeout(0.5, func_only=True)
def test_is_quick_itself(slow):
    pass
