import pytest


@pytest.fixture
def where(where):
    return f"sub of {where}"


@pytest.fixture(scope="package", autouse=True)
def package_talks():
    print("the package is set up")
    yield
    print("the package is torn down")


def pytest_itemcollected(item):
    item.add_marker(pytest.mark.dynamic)
