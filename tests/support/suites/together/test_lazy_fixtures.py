import pytest
from pytest_lazy_fixtures import lf


@pytest.fixture
def one():
    return 1


@pytest.fixture
def two(one):
    return one + one


@pytest.mark.parametrize(("value", "wanted"), [(lf("one"), 1), (lf("two"), 2), (lf("two"), 3)])
def test_values(value, wanted):
    assert value == wanted
