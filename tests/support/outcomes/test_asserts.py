import helper
import pytest
from conftest import Thing


def test_numbers():
    value = 1
    assert value + 1 == 3


def test_long_texts():
    left = "\n".join(f"line {n}" for n in range(60))
    assert left == left.replace("line 30", "line thirty") + "\nmore"


def test_lists():
    assert list(range(100)) == [*range(50), 0, *range(51, 100)]


def test_dicts():
    assert {n: str(n) * 30 for n in range(20)} == {n: str(n) * 30 for n in range(1, 21)}


def test_sets():
    assert {1, 2} == {2, 3}


def test_things():
    assert Thing(1) == Thing(2)


def test_approx():
    assert 0.1 + 0.2 == pytest.approx(0.4)


def test_message():
    assert not [1], "with a message\nof two lines"


def test_in():
    assert "needle" in "hay" * 100


def test_call():
    def value():
        return {"a": [1, {"b": None}]}

    assert value()["a"][1]["b"] is not None


def test_helper():
    helper.check(2)


def test_deep():
    helper.deep(3)


def test_recursion():
    def again():
        return again()

    again()


def test_raises():
    with pytest.raises(ValueError, match="one"):
        raise ValueError("two")


def test_raises_nothing():
    with pytest.raises(ValueError):
        pass


def test_chain():
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error
    except ValueError:
        raise TypeError("third")  # noqa: B904


def test_suppressed_chain():
    try:
        raise KeyError("first")
    except KeyError:
        raise ValueError("second") from None


def test_group():
    def fail():
        raise ExceptionGroup("several", [ValueError("a"), ExceptionGroup("b", [KeyError("c")])])

    fail()


def test_raises_group():
    with pytest.RaisesGroup(ValueError):
        raise ExceptionGroup("one", [TypeError("another")])


def test_notes():
    error = ValueError("noted")
    error.add_note("a note\nof two lines")
    raise error


def test_locals():
    number, text, long = 1, "text", list(range(1000))
    thing = Thing(number)
    assert thing is long, text


def test_syntax_error():
    compile("a b", "<text>", "exec")


def test_bad_repr():
    class Bad:
        def __repr__(self):
            raise RuntimeError("no repr")

    bad = Bad()
    assert bad == 1


def test_message_with_odd_characters():
    raise ValueError("nul \x00 bell \x07 red \x1b[31m clear \x1b[2J high \x9b lone \udcff é 日本 \u2028")


def test_empty_message():
    raise ValueError


def test_very_long_message():
    raise ValueError("long " * 20_000)
