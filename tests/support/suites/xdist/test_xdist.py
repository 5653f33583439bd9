import os

import pytest


@pytest.mark.parametrize("number", range(6))
def test_worker(worker_id, number):
    assert worker_id == os.environ["PYTEST_XDIST_WORKER"]
    assert number < 5


def test_count(testrun_uid):
    assert os.environ["PYTEST_XDIST_WORKER_COUNT"] == "2"
    assert os.environ["PYTEST_XDIST_TESTRUNUID"] == testrun_uid
