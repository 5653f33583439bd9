"""The guests that somebody has; those that nobody talks to are paused where many run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.guests.engine import Engine

_RUNNING_PER_PROCESSOR = 8  # guests; an idle one takes about 0.04 of a processor, emulated
_IDLE_SECONDS = 0.5  # before a guest may be paused


class IdleGuests:
    """Pauses guests that are idle, if more run than the host's processors can bear."""

    def __init__(self) -> None:
        self._engines: list[Engine] = []

    @contextmanager
    def holding(self, engine: Engine) -> Iterator[None]:
        """Let a guest be paused while this lasts, and others for it."""
        self._engines.append(engine)
        try:
            self.pause_some()
            yield
        finally:
            self._engines.remove(engine)

    def pause_some(self) -> None:
        """Pause guests that nobody has talked to for longest, until few enough run.

        They go on when somebody asks them for something. A guest is never paused in which something
        was started that goes on, or of which a port is open.
        """
        engines = list(self._engines)
        running = len(engines) - sum(engine.resting for engine in engines)
        most = _RUNNING_PER_PROCESSOR * (os.cpu_count() or 1)
        for engine in sorted(engines, key=lambda engine: engine.idle_seconds, reverse=True):
            if running <= most or engine.idle_seconds < _IDLE_SECONDS:
                return
            with suppress(VMSandboxError):  # whoever asks it for something next is told
                engine.rest()
                running -= 1
