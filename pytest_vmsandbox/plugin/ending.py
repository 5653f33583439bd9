"""How a session in a guest ends: what it leaves comes here, and what went wrong is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.plugin import pulling
from pytest_vmsandbox.plugin.lease import COLLECT_SECONDS, Lease
from pytest_vmsandbox.plugin.measuring import Measuring

if TYPE_CHECKING:
    from pytest_vmsandbox.inside.wire import Message
    from pytest_vmsandbox.plugin.messages import Messages
    from pytest_vmsandbox.plugin.run import Run


def finish(run: Run, messages: Messages, lease: Lease) -> list[str]:
    """Let a session tear down what is left, and end.

    Args:
        messages: is told what the session says meanwhile.

    Returns:
        What went wrong, for people.

    Raises:
        VMSandboxError: it does not end as it should.
    """
    if lease.session is None:
        return []
    if (loss := lease.guest.engine.loss) is not None:
        return [f"after the last test in it: {loss.brief}"]
    said = lease.session.finish(COLLECT_SECONDS * lease.patience)
    lease.is_untouched = any("untouched" in message for message in said)
    if (measuring := Measuring.of(run.config)) is not None:
        measuring.keep(said, lease.payload.tree, lease.guest.name)
    for message in said:
        if "allure" in message:  # of fixtures that the session's end has torn down
            messages.tell(lease, message)
    has_failed = lease.has_failed or lease.session.collected.has_errors
    allowed = {0, 1} if has_failed else {0, 5}  # as pytest ends: 5 is «no tests»
    return [
        _bad_end(lease, message)
        for message in said
        if "exit" in message and message["exit"] not in allowed
    ]


def bring_back(run: Run, lease: Lease) -> list[str]:
    """Bring back what tests have written into the project in a guest whose session is over.

    Returns:
        What went wrong, for people.
    """
    if not lease.has_collected or lease.is_untouched:
        return []
    if lease.guest.engine.loss is not None:
        note_loss(run, lease)
        return []
    try:
        found = pulling.bring_back(run, lease.guest, lease.tree, lease.payload.tree)
    except VMSandboxError as error:
        return [f"what tests wrote in {lease.guest.name} does not come back: {error}"]
    for outcome, paths in found.items():
        pulling.note(run.pulled, outcome.value, paths)
    return []


def note_loss(run: Run, lease: Lease) -> None:
    """Tell, at the end, that what was written in a guest is lost, if tests can have run there."""
    if lease.has_collected:
        pulling.note(run.pulled, pulling.LOST, [lease.guest.name])


def _bad_end(lease: Lease, message: Message) -> str:
    tail = lease.reader.text(printable(str(message.get("tail", ""))))
    return (
        f"{lease.guest.name}: {tail}\n  its pytest ended with status {message['exit']}, "
        "which no test there has caused: a conftest.py or a plugin has"
    )
