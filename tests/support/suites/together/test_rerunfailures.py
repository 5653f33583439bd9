import pytest

TRIES = []


@pytest.mark.flaky(reruns=3)
def test_third_time():
    TRIES.append(1)
    assert len(TRIES) == 3


@pytest.mark.flaky(reruns=1)
def test_never():
    assert not TRIES
