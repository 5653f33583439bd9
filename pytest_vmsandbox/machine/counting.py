"""Counts a machine's instructions, so what runs in it can be recorded and repeated (pure).

QEMU records only a machine whose count begins at 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pytest_vmsandbox.core.errors import LaunchError

_SHIFT = 3  # an instruction takes 2 ** 3 ns of the guest's time
# Of QEMU's stream: kind, name, version.
_SUBSECTION = b"\x05\x0ctimer/icount" + struct.pack(">I", 1)
_VALUES = struct.Struct(">qq")  # what is added to the clock, and the instructions so far


@dataclass(frozen=True, kw_only=True)
class RecordingDescriptors:
    """The descriptors of a machine that is recorded, or repeats what was recorded.

    Attributes:
        mode: ``record`` or ``replay``.
        log: the file with what came from outside.
        console, report: the files that its two serial ports write to. A socket may be full for a moment,
            which cannot be repeated.
        snapshots: the qcow2 file for QEMU's snapshots, if a debugger may go backwards; else None.
    """

    mode: str
    log: int
    console: int
    report: int
    snapshots: int | None = None


def arguments(recording: RecordingDescriptors | None, netdev: str) -> list[str]:
    """QEMU's arguments that let a guest's clock depend on nothing but its instructions.

    Args:
        recording: None for a guest that is not recorded yet.
        netdev: the id of its network.
    """
    options = f"shift={_SHIFT}"
    # Only Windows XP uses it. Seen: with it, QEMU hangs when a debugger goes backwards.
    always = ["-global", "apic-common.vapic=off"]
    if recording is None:
        return [*always, "-icount", options]
    options += f",rr={recording.mode},rrfile=/proc/self/fd/{recording.log}"
    # Seen: a reset never ends while QEMU records. It does not answer then either.
    ends = ["-action", "reboot=shutdown"]
    replay = ["-object", f"filter-replay,id=replay,netdev={netdev}"]
    return [*always, "-icount", options, *ends, *replay, *_snapshots(recording.snapshots)]


def _snapshots(file: int | None) -> list[str]:
    """A disk that no guest has. QEMU saves a snapshot when a debugger comes, and goes back to it.

    QEMU takes the first disk that has a name. Seen: any other one waits for a request to end, which does not
    happen while the guest is paused, so QEMU would hang.
    """
    if file is None:
        return []
    drive = f"file=/dev/fdset/{file},format=qcow2,auto-read-only=off,if=none,id=snapshots"
    return ["-add-fd", f"fd={file},set={file}", "-drive", drive]


def from_zero(state: bytes) -> bytes:
    """A saved state whose instructions are counted from 0.

    The guest's clock stays as it is: the time that its instructions have taken is added to what QEMU adds
    to the clock. If the clock went back, the guest's timers would not fire for minutes.

    Args:
        state: of a machine that QEMU ran with ``-icount shift=``.

    Raises:
        LaunchError: it has no count of instructions.
    """
    start = state.find(_SUBSECTION)
    if start < 0 or state.find(_SUBSECTION, start + 1) >= 0:
        raise LaunchError("QEMU did not save the count of instructions, so nothing can be recorded")
    start += len(_SUBSECTION)
    added, count = _VALUES.unpack_from(state, start)
    values = _VALUES.pack(added + (count << _SHIFT), 0)
    return state[:start] + values + state[start + _VALUES.size :]
