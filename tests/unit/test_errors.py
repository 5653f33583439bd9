"""The text of errors."""

from pytest_vmsandbox.core.errors import (
    INFRASTRUCTURE,
    BootError,
    CommandError,
    CommandResult,
    CommandTimeout,
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
