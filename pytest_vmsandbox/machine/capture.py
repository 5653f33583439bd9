"""Captures a guest's network, in the format of pcap, which tcpdump and Wireshark read; and its screen.

QEMU's filter-dump writes into a pipe, and we write what comes out of it into a file. So the file has a limit,
belongs to us even if QEMU runs as another user, and goes on when the guest gets a new QEMU.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

from pytest_vmsandbox.core.errors import MonitorError, VMSandboxError
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.cmdline import NETDEV
from pytest_vmsandbox.machine.loop import LoopThread
from pytest_vmsandbox.machine.switch.pcap import LIMIT

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.machine import Machine

NAME, NOTE, SCREEN = "network.pcap", "network-note.txt", "screenshot.png"  # the files
_MOST_OF_PACKET = 65_536  # bytes; the default of filter-dump
_HEADER, _PACKET = (
    24,
    struct.Struct("=8xI4x"),
)  # of the file; of a packet, with the bytes that follow
_PIPE = 1 << 20  # bytes that QEMU can write before it waits for us


class Capture:
    """Takes what one QEMU captures, and adds whole packets to a file.

    Args:
        file: what earlier machines of the guest have captured.
        note: a file for a line that says why packets are missing.
    """

    def __init__(self, file: IO[bytes], note: Path) -> None:
        self._file = file
        self._note = note
        self._rest = bytearray()
        self._has_begun = False
        self._is_over = False

    def feed(self, data: bytes) -> None:
        """Take what QEMU wrote."""
        if self._is_over:
            return
        self._rest += data
        if not self._has_begun:
            if len(self._rest) < _HEADER:
                return
            self._has_begun = True
            if not self._file.tell():
                self._write(self._rest[:_HEADER])
            del self._rest[:_HEADER]
        end = 0
        while len(self._rest) >= end + _PACKET.size:
            (size,) = _PACKET.unpack_from(self._rest, end)
            if size > _MOST_OF_PACKET:
                self.stop("QEMU has written a packet that is too large")
                return
            if len(self._rest) < end + _PACKET.size + size:
                break
            end += _PACKET.size + size
        self._write(self._rest[:end])
        del self._rest[:end]

    def stop(self, why: str) -> None:
        """Take no more packets, and write down why."""
        self._is_over = True
        self._rest.clear()
        with suppress(OSError):
            self._note.write_text(f"{NAME} is not complete: {why}\n", "utf-8")

    def _write(self, data: bytearray) -> None:
        if self._file.tell() + len(data) > LIMIT:
            self.stop(f"it has reached its limit, {format_size(LIMIT)}")
            return
        try:
            self._file.write(data)
        except OSError as error:
            self.stop(f"it cannot be written: {error.strerror}")


@contextmanager
def capturing(machine: Machine, loop: LoopThread, folder: Path) -> Iterator[None]:
    """Capture the network of a machine into a folder. If QEMU cannot do it, a note there says why."""
    file_name = os.fspath(folder / NAME)
    with open(file_name, "ab", buffering=0, opener=host.private) as file:
        capture = Capture(file, folder / NOTE)
        read, write = os.pipe()
        with os.fdopen(read, "rb", buffering=0) as ours:
            with os.fdopen(write, "wb", buffering=0) as theirs:
                with suppress(OSError):  # this user may have too much in pipes already
                    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, _PIPE)
                if (identity := host.guest_identity(machine.spec.accelerator)) is not None:
                    os.fchown(write, identity.uid, identity.gid)  # QEMU opens it by a name
                try:
                    _dump(machine, theirs)
                except MonitorError as error:
                    capture.stop(error.brief)
            with loop.reading(ours, capture.feed):
                yield


def screen(machine: Machine) -> bytes:
    """A machine's screen, as PNG.

    Raises:
        MonitorError: QEMU cannot do it (older than 7.1, or built without PNG), or a fault has stopped it.
    """
    if machine.monitor.is_stopped:
        raise MonitorError(
            "QEMU cannot show the screen, because a fault has stopped it",
            remedy="end the fault first",
        )
    with TemporaryFile() as picture:  # a kill leaves nothing
        own = Path(f"/proc/self/fd/{picture.fileno()}")
        with own.open("wb") as file:
            machine.screenshot(file)
        if data := picture.read():
            return data
    raise MonitorError(
        "QEMU has written an empty screenshot",
        remedy="use QEMU 7.1 or newer, built with PNG support",
    )


@contextmanager
def screen_if_it_fails(machine: Machine, folder: Path | None) -> Iterator[None]:
    """If the block fails, such as a boot, put the machine's screen into a folder. It may be gone already."""
    try:
        yield
    except VMSandboxError:
        if folder is not None:
            with suppress(VMSandboxError, OSError):
                picture = screen(machine)
                with open(folder / SCREEN, "wb", opener=host.private) as file:
                    file.write(picture)
        raise


def _dump(machine: Machine, pipe: IO[bytes]) -> None:
    """Let QEMU write all packets into a pipe, until it ends. It opens the pipe by its name.

    Raises:
        MonitorError: QEMU cannot do it.
    """
    added: Any = machine.execute("add-fd", fd=pipe.fileno())
    arguments = {"netdev": NETDEV, "file": f"/proc/self/fd/{added['fd']}"}
    machine.execute("object-add", {"qom-type": "filter-dump", "id": "capture", **arguments})
    machine.execute("remove-fd", {"fdset-id": added["fdset-id"]})
