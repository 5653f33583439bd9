import pytest


def test_pass(subtests):
    for number in range(3):
        with subtests.test("number", number=number):
            print("in", number)


def test_some_fail(subtests):
    for number in range(4):
        with subtests.test(number=number):
            print("in", number)
            assert number % 2 == 0
    print("after")


def test_fails_itself(subtests):
    with subtests.test("inner"):
        assert 1 == 2
    assert 3 == 4


def test_skip_and_xfail(subtests):
    with subtests.test("skips", kind=None):
        pytest.skip("a subtest")
    with subtests.test("xfails"):
        pytest.xfail("a subtest")
    with subtests.test(msg="odd", value=object, text="a\nb"):
        raise ValueError("odd")
