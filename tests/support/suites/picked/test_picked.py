def test_is_new():
    pass


def test_is_new_too():
    raise OSError
