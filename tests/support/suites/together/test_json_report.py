import logging

import pytest


def test_metadata(json_metadata):
    json_metadata["words"] = ["a", {"b": None}]
    print("some output")
    logging.getLogger("mine").warning("a warning")


@pytest.mark.parametrize("value", [1, 2])
def test_parameters(value):
    assert value == 1


@pytest.mark.skip(reason="it is")
def test_skipped():
    pass


@pytest.mark.xfail(reason="known")
def test_expected():
    raise OSError("why")
