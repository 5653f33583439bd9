"""Programs that faults run in a guest."""

from __future__ import annotations

from pytest_vmsandbox.guests.commands import Command, check_status, text_of
from pytest_vmsandbox.guests.engine import Engine


def run_as_root(engine: Engine, script: str, *words: object) -> str:
    """Run a script with the guest's ``/bin/sh`` as root, and return its standard output.

    Args:
        words: its arguments.

    Raises:
        CommandError: it returned non-zero.
        CommandTimeout: it did not end in time.
    """
    argv = ("/bin/sh", "-c", script, "sh", *map(str, words))
    result = text_of(engine.run(Command(argv=argv, user="root")))
    check_status(result)
    return result.stdout
