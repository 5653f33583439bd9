"""Messages of a guest's test session: JSON objects, one a line. The guest is not trusted (pure)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pytest_vmsandbox.core.errors import GuestLost

MAX_LINE = 32 << 20  # bytes; the runner's own limit is lower
MAX_DEPTH = 60  # levels of nested lists and objects
MAX_DIGITS = 400  # of a number
MAX_VALUES = 1_000_000  # in a message: values take more memory than their text
_LONG = 1 << 20  # bytes; we count the values of longer messages
# The text between strings, each time with the string that follows.
_BETWEEN = re.compile(rb'([^"]++)(?:"(?:[^"\\]++|\\.)*+"?)?', re.DOTALL)

Message = dict[str, Any]


class Decoder:
    """Decodes the bytes that arrive to messages.

    Attributes:
        weight: bytes of all messages so far, except live output, which we do not keep.

    Example:
        >>> decoder = Decoder()
        >>> decoder.feed(b'{"ready"')
        []
        >>> decoder.feed(b": 3}" + bytes([10]))
        [{'ready': 3}]
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self.weight = 0

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete now.

        Raises:
            GuestLost: a message is invalid: too long, not JSON, not an object, or nested too deeply.
        """
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(self._rest) + lines[0]
            self._rest = bytearray(rest)
        else:
            self._rest += rest
        if len(self._rest) > MAX_LINE:
            raise broken(f"it sent a line of more than {MAX_LINE} bytes", bytes(self._rest[:300]))
        messages = [_decode(line) for line in lines]
        for line, message in zip(lines, messages, strict=True):
            self.weight += 0 if "output" in message else len(line)
        return messages


def encode(message: Mapping[str, object]) -> bytes:
    """A message as a line."""
    return json.dumps(message).encode() + b"\n"


def broken(why: str, what: object = None) -> GuestLost:
    """The error for an unexpected or invalid message from a guest."""
    return GuestLost(
        f"protocol error in the guest's test session: {why}",
        details="" if what is None else f"it sent: {what!r:.300}",
        stage="transfer",
        remedy="a test, a conftest.py or a plugin in the guest may disturb the session: look at the console "
        "log among the artifacts. If it happens to a test that does nothing special, report a bug",
    )


def _decode(line: bytes) -> Message:
    if len(line) > MAX_LINE:
        raise broken(f"it sent a line of {len(line)} bytes", line)
    if len(line) > _LONG:
        _check_values(line)
    try:
        message = json.loads(
            line.decode(), parse_constant=_float, parse_int=_integer, parse_float=_float
        )
    except (ValueError, RecursionError) as error:
        raise broken("it sent a line that is not JSON", line) from error
    if not isinstance(message, dict):
        raise broken("it sent a line that is not an object", line)
    if _depth(message) > MAX_DEPTH:
        raise broken(f"it sent more than {MAX_DEPTH} levels of lists and objects", line)
    return message


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError("too many digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def _check_values(line: bytes) -> None:
    """Count the characters between strings that separate values."""
    count = 0
    for between in _BETWEEN.finditer(line):
        count += sum(map(between[1].count, (b",", b"[", b"{")))
        if count > MAX_VALUES:
            raise broken(f"it sent more than {MAX_VALUES} values", line[:300])


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        level = [
            member
            for item in level
            for member in (item.values() if isinstance(item, dict) else item)
        ]
        depth += 1
    return depth
