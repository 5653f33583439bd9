from hypothesis import given, settings, strategies as st


@settings(derandomize=True, max_examples=20)
@given(st.integers())
def test_passes(number):
    assert number == int(str(number))


@settings(max_examples=200, report_multiple_bugs=False)
@given(st.integers())
def test_fails(number):
    assert number < 1000
