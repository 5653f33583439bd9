"""Questions and answers of DNS: only what a guest needs to find the addresses of a name."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

IPV4_ADDRESS, IPV6_ADDRESS = 1, 28  # types of records: A and AAAA
NO_ERROR, FAILED, NO_SUCH_NAME = 0, 2, 3
_HEADER = struct.Struct("!6H")
_INTERNET = 1
_QUESTION = 0xC00C  # a pointer to the name in the question
_MOST_BYTES = 512  # of an answer by UDP


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question for one name.

    Attributes:
        number: the asker's.
        is_recursive: whether the asker wants more than what the server knows.
        name: in lower case, without the last dot.
        kind: the type of record.
        raw: the question in the message.
    """

    number: int
    is_recursive: bool
    name: str
    kind: int
    raw: bytes

    def answer(self, code: int, addresses: Iterable[bytes] = ()) -> bytes:
        """A message with addresses of 4 or 16 bytes, as many as it holds. Nobody may keep them."""
        records: list[bytes] = []
        room = _MOST_BYTES - _HEADER.size - len(self.raw)
        for address in addresses:
            record = struct.pack("!HHHIH", _QUESTION, self.kind, _INTERNET, 0, len(address))
            if room < len(record) + len(address):
                break
            room -= len(record) + len(address)
            records.append(record + address)
        flags = 0x8080 | code | (0x0100 if self.is_recursive else 0)
        head = _HEADER.pack(self.number, flags, 1, len(records), 0, 0)
        return head + self.raw + b"".join(records)


def question(message: bytes) -> Question | None:
    """The question in a message; None if it is none that we understand."""
    if len(message) < _HEADER.size:
        return None
    number, flags, questions, *_ = _HEADER.unpack_from(message)
    if flags & 0xF800 or questions != 1:  # an answer, or another operation than a question
        return None
    labels: list[bytes] = []
    at = _HEADER.size
    while at < len(message) and (size := message[at]):
        if size > 63 or len(labels) > 127:
            return None
        labels.append(message[at + 1 : at + 1 + size])
        at += 1 + size
    raw = message[_HEADER.size : at + 5]
    if at + 5 > len(message) or int.from_bytes(raw[-2:]) != _INTERNET:
        return None
    name = b".".join(labels).decode("ascii", "replace").lower()
    kind = int.from_bytes(raw[-4:-2])
    return Question(number=number, is_recursive=bool(flags & 0x0100), name=name, kind=kind, raw=raw)
