import pytest


@pytest.mark.parametrize("letter", list("abcdef"))
def test_number(letter):
    pass


def test_last():
    raise OSError
