"""Lines from a guest that is not trusted: messages, or `GuestLost`, and never much memory."""

import json
import tracemalloc
from collections import deque
from itertools import pairwise, repeat

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from pytest_vmsandbox.core.errors import GuestLost
from pytest_vmsandbox.inside import wire
from pytest_vmsandbox.inside.wire import Decoder, broken, encode
from support.reports import JSON, KEYS, check_text

few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
MESSAGES = st.lists(st.dictionaries(KEYS | st.text(), JSON, max_size=4), max_size=5)
SPLITS = st.lists(st.integers(0, 300), max_size=8)
LINES = st.lists(
    st.binary(max_size=30)
    | MESSAGES.map(lambda it: b"".join(map(encode, it)))
    | st.sampled_from([b"\n", b"{", b"}", b'"', b"[", b"\\", b"{}\n", b"\xef\xbb\xbf{}", b"\xff"]),
    max_size=6,
).map(b"".join)


def pieces(data, splits):
    cuts = sorted({0, len(data), *(min(it, len(data)) for it in splits)})
    return [data[start:end] for start, end in pairwise(cuts)]


def decoded(parts):
    """All messages, or None for a guest that is lost."""
    decoder = Decoder()
    try:
        return [message for part in parts for message in decoder.feed(part)]
    except GuestLost as lost:
        check_text(str(lost))
        return None


@few
@given(MESSAGES, SPLITS)
def test_what_is_sent_arrives(messages, splits):
    assert decoded(pieces(b"".join(map(encode, messages)), splits)) == messages


@few
@given(LINES, SPLITS)
def test_whatever_comes_is_messages_or_the_guest_is_lost(data, splits):
    found = decoded([data])
    assert found is None or all(isinstance(message, dict) for message in found)
    assert decoded(pieces(data, splits)) == found


@few
@given(LINES)
def test_one_byte_at_a_time(data):
    assert decoded([bytes([it]) for it in data]) == decoded([data])


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"1",
        b'"text"',
        b"null",
        b"{}{}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1' + b"0" * 400 + b"}",
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": "\xff"}',
        b'{"a": "\n"}',
        b"\xef\xbb\xbf{}",
        b"{\x00}\x00",
        "{}".encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 61 + b"]" * 61 + b"}",
        b'{"a":' + b'{"a":' * 60 + b"1" + b"}" * 61,
        b"\x1b[2J",
    ],
)
def test_a_line_that_is_no_message(line):
    with pytest.raises(GuestLost, match="protocol") as caught:
        Decoder().feed(line + b"\n")
    check_text(str(caught.value))
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("depth", [1, 2, wire.MAX_DEPTH - 1])
def test_depth_that_is_allowed(depth):
    line = b'{"a":' + b"[" * depth + b"]" * depth + b"}\n"
    (message,) = Decoder().feed(line)
    assert list(message) == ["a"]


def test_a_number_that_is_allowed():
    number = 10**wire.MAX_DIGITS - 1
    assert Decoder().feed(encode({"a": number, "b": 1e300})) == [{"a": number, "b": 1e300}]


def test_a_number_of_many_digits_is_quick():
    line = b'{"a": 0.' + b"1" * 1_000_000 + b"}\n"
    assert 0.11 < Decoder().feed(line)[0]["a"] < 0.12


def test_a_line_without_an_end_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(wire, "MAX_LINE", 1 << 20)
    decoder, piece = Decoder(), b"x" * (1 << 16)
    tracemalloc.start()
    try:
        with pytest.raises(GuestLost, match="line of more than"):
            deque(map(decoder.feed, repeat(piece, 1 << 14)), maxlen=0)  # a gigabyte
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_line_that_is_long_at_once(monkeypatch):
    monkeypatch.setattr(wire, "MAX_LINE", 1000)
    with pytest.raises(GuestLost, match="a line of"):
        Decoder().feed(b'{"a": "' + b"x" * 1000 + b'"}\n')
    assert Decoder().feed(b'{"a":"' + b"x" * 992 + b'"}\n')


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0", b'""'])
def test_a_line_of_many_small_values(monkeypatch, value):
    """A few bytes of a line are fifty of memory."""
    monkeypatch.setattr(wire, "MAX_VALUES", 50_000)
    monkeypatch.setattr(wire, "_LONG", 1 << 16)
    line = b'{"a":[' + b",".join([value] * 50_001) + b"]}\n"
    tracemalloc.start()
    try:
        with pytest.raises(GuestLost, match="more than 50000 values"):
            Decoder().feed(line)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(line)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [",[{" * 500_000, '",\\"[' * 300_000, "\\" * 600_000])
def test_text_does_not_count_as_values(text):
    assert Decoder().feed(encode({"a": text})) == [{"a": text}]


@few
@given(MESSAGES)
@example([{"output": "x" * 100}])
def test_live_output_has_no_weight(messages):
    decoder = Decoder()
    decoder.feed(b"".join(map(encode, messages)))
    kept = [len(encode(it)) - 1 for it in messages if "output" not in it]
    assert decoder.weight == sum(kept)


@few
@given(JSON)
def test_an_error_is_short_and_harmless(value):
    lost = broken("it is broken", value)
    check_text(str(lost))
    assert len(str(lost)) < 600


def test_a_message_is_one_line():
    line = encode({"a": "\n\u2028\x85", "b": [None, True]})
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"a": "\n\u2028\x85", "b": [None, True]}
