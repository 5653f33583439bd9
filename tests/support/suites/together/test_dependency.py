import pytest


@pytest.mark.dependency
def test_fails():
    raise OSError


@pytest.mark.dependency
def test_passes():
    pass


@pytest.mark.dependency(depends=["test_fails"])
def test_is_skipped():
    pass


@pytest.mark.dependency(depends=["test_passes"])
def test_runs():
    pass
