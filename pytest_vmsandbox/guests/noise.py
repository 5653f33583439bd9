"""Noise: QEMU is paused again and again, which makes short timeouts in the guest expire more often."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from pytest_vmsandbox.guests.faults.processors import stall
from pytest_vmsandbox.guests.guest import Guest

PAUSE, PERIOD = 0.002, 0.020  # seconds
TEXT = f"pauses of {1000 * PAUSE:g} in {1000 * PERIOD:g} ms"


class Noise:
    """Noise in guests, until `close`.

    It is no fault: tests do not see it in `Faults.in_force`, and it hinders no fault of theirs.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def disturb(self, guest: Guest) -> None:
        """Begin in a guest. It lasts also after its reboot, and ends at the latest with the guest."""
        stopped = partial(_stopped, guest)
        share = PAUSE / PERIOD
        thread = threading.Thread(
            target=stall,
            args=[stopped, self._over, share, PERIOD],
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


@contextmanager
def _stopped(guest: Guest) -> Iterator[None]:
    """Stop the process of a guest while this lasts, if it has one."""
    running = guest.engine.running  # its machine may be replaced meanwhile
    if running is None:
        yield
        return
    with running.machine.process.stopped():
        yield
