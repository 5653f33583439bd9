"""Text from guests and from files of strangers that is safe to show."""

from __future__ import annotations

import re

# Control sequences and control characters, which a guest could use to deceive you on a terminal, and
# lone surrogates, which cannot be written.
_UNPRINTABLE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Text without control sequences. Of control characters, only tabs and line ends stay.

    Example:
        >>> printable("\x1b[31mred\x1b[0m\r\n")
        'red\n'
    """
    return _UNPRINTABLE.sub("", text)


def one_line(text: str) -> str:
    r"""Text without control sequences, and with spaces instead of its line ends.

    Example:
        >>> one_line("a\x1b[2J\nRemedy: b")
        'a Remedy: b'
    """
    return " ".join(printable(text).splitlines())
