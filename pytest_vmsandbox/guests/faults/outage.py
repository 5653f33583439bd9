"""What faults of the power and the kernel share: the guest is away for some time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import BootError, CommandResult, CommandTimeout, GuestLost
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.reaching.commands import Command, check_status, text_of
from pytest_vmsandbox.guests.reaching.process import RemoteProcess
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Running
from pytest_vmsandbox.machine.machine import Machine

_READ_SECONDS = 5.0
_LOOK_SECONDS = 0.25
_ASK_SECONDS = 2.0  # after which a guest that restarts is asked again


class Outage(Fault):
    """A fault that is over as soon as the guest has a new machine."""

    def switched_on(self, machine: Machine) -> None:  # noqa: ARG002  # whichever it is
        """The guest was switched on, or a snapshot was restored: it is back."""
        self.lapse()


def switch_on_again(engine: Engine) -> None:
    """Switch a guest on that is off, has ended or has panicked. One that runs stays as it is.

    Raises:
        BootError: it did not come up.
    """
    if engine.loss is None:
        return
    if engine.is_on:
        engine.power_cut()
    engine.power_on()


def await_answer(engine: Engine) -> None:
    """Wait until a guest that restarts answers. Its connections were closed.

    If it was switched off meanwhile, it stays so.

    Raises:
        BootError: it did not come up.
    """
    if engine.is_on:
        with engine.use(hold=True) as running:
            running.await_answer(Deadline(engine.boot_seconds))


def await_reset(engine: Engine, running: Running, since: int) -> None:
    """Wait until a guest resets itself, and then until it answers. Its connections were closed.

    Args:
        since: the number of events before.

    Raises:
        BootError: it did not come up.
    """
    deadline, machine = Deadline(engine.boot_seconds), running.machine
    with engine.use(hold=True):
        while not machine.monitor.wait_event("RESET", since=since, timeout=_LOOK_SECONDS):
            machine.check_booting(deadline.elapsed)
            if deadline.expired:
                raise BootError(
                    f"{engine.name} did not restart within {deadline.seconds:g} s",
                    stage=machine.stage,
                    seconds=deadline.elapsed,
                    details=machine.console_lines(),
                )
        running.await_answer(deadline)


def await_restarted(engine: Engine, running: Running) -> None:
    """Wait until a guest answers that has restarted without notice. It may be up already.

    A helper that belongs to the image says hello by itself. So its connection must not be closed: that
    may be the new one.

    Raises:
        BootError: it did not come up.
    """
    machine, helper = running.machine, running.helper
    if helper is None or running.setup is not None:
        running.hang_up()
        running.await_answer(Deadline(engine.boot_seconds))
        return
    deadline = Deadline(engine.boot_seconds)
    while True:
        try:
            helper.ping(deadline.remaining(_ASK_SECONDS))
        except GuestLost:
            if deadline.expired:
                raise
            machine.check_booting(deadline.elapsed)
        else:
            return


def provoked(
    engine: Engine,
    running: Running,
    script: str,
    has_come: Callable[[], bool],
    *,
    what: str,
    needs: str,
) -> RemoteProcess | None:
    """Run a script as root that takes the guest away, and wait for that.

    Args:
        has_come: whether it has come. It waits for a moment.
        what: what the guest should do, for an error.
        needs: what it needs for that.

    Returns:
        The program. It goes on with the guest, or never. The caller closes it. None if the guest was away
        before it told that the program had started.

    Raises:
        CommandError: the script returned non-zero.
        CommandTimeout: nothing came of it.
    """
    deadline = Deadline(engine.command_seconds)
    command = Command(argv=("/bin/sh", "-c", script), user="root")
    with ExitStack() as stack:
        try:
            process = running.start(command, engine.spec.user)
        except GuestLost:
            if has_come():
                return None
            raise
        stack.callback(process.close)
        while not has_come():
            try:
                running.machine.check()
                if process.poll():
                    check_status(text_of(_result(process, deadline)))
            except GuestLost:
                if has_come():
                    break
                raise
            if deadline.expired:
                raise CommandTimeout(
                    f"{engine.name} did not {what} within {deadline.seconds:g} s",
                    seconds=deadline.seconds,
                    remedy=needs,
                )
        stack.pop_all()
        return process


def _result(process: RemoteProcess, deadline: Deadline) -> CommandResult[bytes]:
    """What a program that has ended has written."""
    output, errors = bytearray(), bytearray()
    status = process.communicate(None, output.extend, errors.extend, _READ_SECONDS)
    return CommandResult(
        argv=process.command.argv,
        returncode=status,
        stdout=bytes(output),
        stderr=bytes(errors),
        duration=deadline.elapsed,
    )
