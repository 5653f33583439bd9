import pytest


@pytest.fixture
def where(where):
    return f"deeper {where}"
