import pytest

TRIES = []


@pytest.mark.flaky(retries=2)
def test_third_time():
    TRIES.append(1)
    assert len(TRIES) == 3


@pytest.mark.flaky(retries=2)
def test_never():
    assert not TRIES


def test_passes():
    pass
