import pytest

pytest.importorskip("no_such_module_anywhere", reason="the whole module needs it")


def test_a():
    pass
