import calc


def test_sign():
    assert calc.sign(3) == 1
