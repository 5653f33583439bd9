"""Text from guests, made fit to be shown."""

from __future__ import annotations

import re

# Control sequences and control characters that a guest could use to play tricks on a terminal, and
# half characters, which cannot be written.
_UNPRINTABLE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Text without control sequences; only tabs and line ends are left of control characters.

    Example:
        >>> printable("\x1b[31mred\x1b[0m\r\n")
        'red\n'
    """
    return _UNPRINTABLE.sub("", text)
