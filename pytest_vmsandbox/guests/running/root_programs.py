"""Scripts that run in a guest as root, because a part of ours needs them there."""

from __future__ import annotations

from pytest_vmsandbox.core.errors import CommandResult
from pytest_vmsandbox.guests.reaching.commands import Command, check_status, text_of
from pytest_vmsandbox.guests.running.engine import Engine


def run_as_root(
    engine: Engine, script: str, *words: object, check: bool = True
) -> CommandResult[str]:
    """Run a script with the guest's ``/bin/sh`` as root.

    Args:
        words: its arguments.
        check: raise an error if it returns non-zero.

    Raises:
        CommandError: it returned non-zero.
        CommandTimeout: it did not end in time.
    """
    argv = ("/bin/sh", "-c", script, "sh", *map(str, words))
    result = text_of(engine.run(Command(argv=argv, user="root")))
    if check:
        check_status(result)
    return result
