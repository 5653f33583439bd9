import pytest

SEEN = []


@pytest.mark.order(after="test_second")
def test_third():
    SEEN.append(3)
    assert SEEN == [1, 2, 3]


@pytest.mark.order(after="test_first")
def test_second():
    SEEN.append(2)


def test_first():
    SEEN.append(1)
