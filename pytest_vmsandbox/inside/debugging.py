"""Debuggers in guests: they get the terminal of this side, by the system's SSH client.

While a debugger is open, what the guest writes goes to the terminal as it is.
"""

from __future__ import annotations

import shlex

from pytest_vmsandbox.core import foreground
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import InterpreterLost
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.kept import Moment
from pytest_vmsandbox.guests.reaching.access import require_client
from pytest_vmsandbox.inside.connection import Connection, GuestPaths
from pytest_vmsandbox.inside.install import BASE

_ANSWER_SECONDS = 60.0  # for the session that stands at a failure
# Ends if the guest is gone, even while nobody types.
_ALIVE = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8")


def check_client() -> None:
    """Check that this machine has an SSH client, which a debugger in a guest needs.

    Raises:
        LaunchError: it has none.
    """
    require_client("a debugger in a guest needs an SSH client on this machine, and there is none")


def lend_terminal(guest: Guest, place: GuestPaths) -> int:
    """Lend our terminal (0, 1 and 2) to the session in a guest, until it gives it back.

    Returns:
        The exit status of the SSH client: 255 if it could not connect, −N if signal N ended it.

    Raises:
        GuestLost: the guest does not answer on SSH.
        KeyboardInterrupt: somebody has sent SIGINT. The terminal's own Ctrl-C goes to the guest.
    """
    client, *options = shlex.split(guest.ssh_command)
    lender = shlex.join((place.python, "-I", "-S", place.runner, "lend", place.folder))
    return foreground.run([client, "-tt", *_ALIVE, *options, lender])


def debug(guest: Guest, moment: Moment, *, patience: float = 1.0) -> int:
    """Open the debugger of an interpreter that stands at a failure, on our terminal.

    Args:
        guest: the kept guest, which goes on from that moment.
        patience: by how much the guest is slower than one on real hardware.

    Returns:
        0 when the user has left the debugger; see `lend_terminal`.

    Raises:
        InterpreterLost: no interpreter waits there any more.
        GuestLost: the guest is gone.
    """
    check_client()
    place = GuestPaths(python=moment.python, runner=f"{BASE}/runner", folder=f"{BASE}/run")
    with Connection.attached(guest, place, patience=patience, serve=False) as connection:
        connection.ask({"do": "debug"})
        deadline = Deadline(_ANSWER_SECONDS * patience)
        try:
            while "terminal" not in (message := connection.hear(deadline.remaining())):
                if deadline.expired or "exit" in message:
                    raise TimeoutError
        except TimeoutError:
            raise InterpreterLost(
                f"no interpreter waits at the failure in {guest.name} any more",
                remedy="look around in the guest without --pdb",
            ) from None
        return lend_terminal(guest, place)
