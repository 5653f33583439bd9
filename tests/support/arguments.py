"""Commands around the length that a guest takes, for each way into one."""

from __future__ import annotations

from pytest_vmsandbox.guests.reaching.commands import Command

WORD = 131_071  # bytes of the longest word

FITS = {
    "the longest word": Command(argv=("printf", "%s", "x" * WORD)),
    "the longest word of quotes": Command(argv=("printf", "%s", "'" * WORD)),
    "the longest variable": Command(argv=("sh", "-c", 'echo "$A"'), env={"A": "x" * (WORD - 2)}),
    "the most words": Command(argv=("printf", "%s", *["x"] * 65_533)),
    "long words": Command(argv=("printf", "%s", *["é" * 50_000] * 19)),
}
TOO_LONG = {
    "a word": Command(argv=("true", "x" * (WORD + 1))),
    "a word that is much too long": Command(argv=("true", "x" * 3_000_000)),
    "a word of more bytes than characters": Command(argv=("true", "é" * 65_536)),
    "a variable": Command(argv=("true",), env={"A": "x" * (WORD - 1)}),
    "too many words": Command(argv=("true", *["x"] * 65_535)),
    "too many variables": Command(argv=("true",), env={f"A{n}": "" for n in range(65_536)}),
    "all together": Command(argv=("true", *["x" * 100_000] * 21)),
}


def output_of(command: Command) -> bytes:
    """What a command of `FITS` prints."""
    if command.env:
        return command.env["A"].encode() + b"\n"
    return "".join(command.argv[2:]).encode()
