from . import test_names


def test_where(where, order):
    assert where == "sub"


def test_relative_import():
    assert test_names.NAME == "sub.test_names"
