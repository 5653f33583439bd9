from pytest_check import check


def test_several():
    check.equal(1, 2)
    with check:
        assert "a" == "b"
    check.is_true(True)


def test_passes():
    check.equal(1, 1)
