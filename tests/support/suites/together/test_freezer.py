import datetime

import pytest


def test_moves(freezer):
    freezer.move_to("2001-02-03")
    assert datetime.date.today().isoformat() == "2001-02-03"


@pytest.mark.freeze_time("1999-12-31")
def test_stands_still():
    assert datetime.date.today().isoformat() == "1999-12-31"
