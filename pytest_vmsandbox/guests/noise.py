"""Noise: QEMU is stopped again and again, at random, as on a busy host. So short timeouts in the guest fail more often."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import exp, log

from pytest_vmsandbox.guests.guest import Guest

# Seconds. A pause delays what is due meanwhile, so that two events that are further apart become due at
# one moment. Pauses of 2 ms found only tests with less to spare, and those of one length fit to some.
_SHORTEST, _LONGEST = 0.001, 0.05
TEXT = f"stopped at random, for {1000 * _SHORTEST:g} to {1000 * _LONGEST:g} ms, half of the time"


class Noise:
    """Noise in guests, until `close`.

    It is no fault: tests do not see it in `Faults.in_force`, and it hinders no fault of theirs.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def disturb(self, guest: Guest) -> None:
        """Begin in a guest. It lasts also after its reboot, and ends at the latest with the guest."""
        thread = threading.Thread(
            target=_stutter,
            args=[guest, self._over],
            name=f"vmsandbox-noise-{guest.name}",
            daemon=True,
        )
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """End it in all guests."""
        self._over.set()
        for thread in self._threads:
            thread.join()


def _stutter(guest: Guest, over: threading.Event) -> None:
    """Stop a guest and let it run in turn, until it is over."""
    while not over.is_set():
        with _stopped(guest):
            over.wait(_span())
        over.wait(_span())


def _span() -> float:
    """Some seconds, at random. Half of all are shorter than the geometric mean."""
    exponent = random.uniform(log(_SHORTEST), log(_LONGEST))  # noqa: S311  # no secret
    return exp(exponent)


@contextmanager
def _stopped(guest: Guest) -> Iterator[None]:
    """Stop the process of a guest while this lasts, if it has one."""
    running = guest.engine.running  # its machine may be replaced meanwhile
    if running is None:
        yield
        return
    with running.machine.process.stopped():
        yield
