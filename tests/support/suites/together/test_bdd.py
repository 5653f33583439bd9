from pytest_bdd import given, parsers, scenarios, then

scenarios("steps.feature")


@given(parsers.parse("the numbers {a:d} and {b:d}"), target_fixture="numbers")
def of_numbers(a, b):
    return a, b


@then(parsers.parse("their sum is {c:d}"))
def their_sum(numbers, c):
    assert sum(numbers) == c
