def test_is_committed():
    pass
