def test_snapshot(snapshot):
    assert snapshot == {"a": [1, 2], "b": "text"}


class TestNamed:
    def test_two(self, snapshot):
        assert snapshot == "one"
        assert snapshot(name="another") == "two"
