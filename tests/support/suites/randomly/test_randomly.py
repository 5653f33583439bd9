import random

import pytest


@pytest.mark.parametrize("letter", list("abcdef"))
def test_number(letter, record_property):
    record_property("drawn", random.randrange(1_000_000))


class TestMore:
    def test_one(self):
        pass

    def test_two(self):
        pass
