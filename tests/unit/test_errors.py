"""The text of errors."""

from pytest_vmsandbox.core.errors import (
    INFRASTRUCTURE,
    BootError,
    CommandError,
    CommandResult,
    CommandTimeout,
    ImageError,
)


def test_what_a_program_said_plays_no_tricks_on_the_terminal():
    said = "\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[0m\tü\r\nnext\x9b"
    result = CommandResult(argv=("x",), returncode=1, stdout=said, stderr="", duration=0)
    assert CommandError("x", result=result).details == "--- stdout\nred\tü\nnext"
    error = CommandTimeout("x", seconds=1, stderr=said.encode())
    assert error.details == "--- stderr\nred\tü\nnext"
    assert error.stderr == said.encode()


def test_what_is_not_the_fault_of_the_test_names_its_stage():
    assert all(kind.stage for kind in INFRASTRUCTURE if kind is not BootError)


def test_names_of_strangers_add_no_line_and_no_escape_to_an_error():
    name = "\x1b]0;title\x07\x1b[2Ja\nRemedy: b\u2028Remedy: c\r\x9b"
    error = ImageError(f"{name} is damaged", details=f"{name}\x1b[31m", remedy=f"look at {name}")
    error.details += "\x1b[31mred\x1b[0m"
    lines = str(error).splitlines()
    assert lines[0] == f"[image] {error.brief}" == "[image] a Remedy: b Remedy: c is damaged"
    assert lines[-1] == "Remedy: look at a Remedy: b Remedy: c"
    assert str(error).replace("\n", "").replace("\u2028", "").isprintable()
    assert error.args == (error.brief,)
