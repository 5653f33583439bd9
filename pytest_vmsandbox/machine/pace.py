"""How slow this machine is, as seen so far: limits on QEMU and on guests follow it.

A limit that suits most machines ends guests of a slow one that are well. The accelerator's name says
only half of it: KVM inside an emulated host is as slow as emulation.
"""

from __future__ import annotations

import threading

USUAL_GREETING = 0.25  # seconds; QEMU greets within 0.04 s on an idle machine
USUAL_PROOF = 3.0  # seconds; a kernel that runs natively starts its first program within about 1 s
MOST = 30.0  # how far limits are stretched, emulation included


class Pace:
    """What one process has seen of its machine; used from any thread.

    Attributes:
        slowness: by how much this machine is slower than one on which the usual limits do; at least 1.

    Example:
        >>> pace = Pace()
        >>> pace.took(2.0, usual=0.25)
        >>> pace.stretch(30.0)
        240.0
    """

    def __init__(self) -> None:
        self.slowness = 1.0
        self._lock = threading.Lock()

    def took(self, seconds: float, *, usual: float) -> None:
        """Learn from something that took so many seconds, and at most `usual` elsewhere."""
        self._learn(seconds / usual)

    def was_late(self) -> None:
        """Learn from a limit that has just passed: it was too short, or what it was for hangs."""
        self._learn(2 * self.slowness)

    def stretch(self, seconds: float, scale: float = 1.0) -> float:
        """A limit for this machine.

        Args:
            seconds: the limit on a usual one.
            scale: by how much guests are slower than natively, as far as the accelerator's name tells.
        """
        return seconds * max(scale, min(scale * self.slowness, MOST))

    def _learn(self, slowness: float) -> None:
        with self._lock:
            self.slowness = min(max(self.slowness, slowness), MOST)
