import pytest

TRIES = []


@pytest.mark.flaky(max_runs=3)
def test_third_time():
    TRIES.append(1)
    assert len(TRIES) == 3


@pytest.mark.flaky(max_runs=3)
def test_never():
    assert not TRIES


def test_passes():
    pass
