"""The guests that somebody has; those that nobody talks to are paused where many run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.guests.guest import Guest

_RUNNING_PER_PROCESSOR = 8  # guests; an idle one takes about 0.04 of a processor, emulated
_IDLE_SECONDS = 0.5  # before a guest may be paused


class IdleGuests:
    """Pauses guests that are idle, if more run than the host's processors can bear."""

    def __init__(self) -> None:
        self._guests: list[Guest] = []

    @contextmanager
    def holding(self, guest: Guest) -> Iterator[None]:
        """Let a guest be paused while this lasts, and others for it."""
        self._guests.append(guest)
        try:
            self.pause_some()
            yield
        finally:
            self._guests.remove(guest)

    def pause_some(self) -> None:
        """Pause guests that nobody has talked to for longest, until few enough run.

        They go on when somebody asks them for something. A guest is never paused in which something
        was started that goes on, or of which a port is open.
        """
        guests = list(self._guests)
        running = len(guests) - sum(guest.resting for guest in guests)
        most = _RUNNING_PER_PROCESSOR * (os.cpu_count() or 1)
        for guest in sorted(guests, key=lambda guest: guest.idle_seconds, reverse=True):
            if running <= most or guest.idle_seconds < _IDLE_SECONDS:
                return
            with suppress(VMSandboxError):  # whoever asks it for something next is told
                guest.rest()
                running -= 1
