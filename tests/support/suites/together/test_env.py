import os


def test_variable():
    assert os.environ["FROM_PYTEST_ENV"] == "of pytest-env"
