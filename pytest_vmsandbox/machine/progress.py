"""Whether a guest that boots gets on, by what its processors do and what it writes to its console."""

from __future__ import annotations

from pathlib import Path

_GUEST_TIME = 43  # of /proc/PID/stat, counted from 1; see proc(5)


class Standstill:
    """Measures how long nothing has changed.

    Attributes:
        seconds: since the last change.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._signs: object = None
        self._since = 0.0

    def look(self, signs: object, clock: float) -> None:
        """Note what is seen now.

        Args:
            signs: whatever differs as long as the guest gets on.
            clock: seconds on a clock of the caller's.
        """
        if signs != self._signs:
            self._signs, self._since = signs, clock
        self.seconds = clock - self._since


def guest_time(pid: int) -> int | None:
    """How long processors have run a guest's own code, in clock ticks; None where nobody tells.

    It is what the host's kernel has accounted to the guest. Where KVM has to emulate a guest's
    instructions one by one, it stays zero.
    """
    try:
        return parse_guest_time(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8"))
    except OSError:
        return None


def parse_guest_time(stat: str) -> int:
    """The guest's time, from what the kernel tells of a process."""
    fields = stat.rpartition(")")[2].split()  # what follows the second one, the program's name
    return int(fields[_GUEST_TIME - 3])


def time_waited(pid: int) -> float:
    """Seconds that the thread of a process that waited longest has waited for a processor."""
    waited = [0]
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            waited.append(int(file.read_text().split()[1]))
        except (OSError, IndexError):  # the thread is gone, or the kernel does not count
            continue
    return max(waited) / 1e9
