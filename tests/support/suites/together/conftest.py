import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_metadata(metadata):
    metadata["added"] = "by a hook"
