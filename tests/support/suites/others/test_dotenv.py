import os


def test_variable():
    assert os.environ["FROM_DOTENV"] == "of pytest-dotenv"
