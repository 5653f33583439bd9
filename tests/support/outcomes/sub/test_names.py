NAME = __name__


def test_name(of_package, order):
    assert NAME.endswith("test_names")
