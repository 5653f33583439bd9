def test_where(where):
    assert where == "deeper sub of the root"


def test_name(order):
    pass
