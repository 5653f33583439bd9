"""Starts QEMU: its log files, descriptors, sockets and TPM; and the error if it does not start."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.core.spec import NETWORKS
from pytest_vmsandbox.machine import cmdline, host, memory, tpm
from pytest_vmsandbox.machine.cmdline import Descriptors, MachineSpec
from pytest_vmsandbox.machine.console import Console
from pytest_vmsandbox.machine.counting import RecordingDescriptors
from pytest_vmsandbox.machine.disk import Disks, Recording, image_file
from pytest_vmsandbox.machine.drives import descriptors_of
from pytest_vmsandbox.machine.gate.relay import gated
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.loop import LoopThread
from pytest_vmsandbox.machine.port import Port
from pytest_vmsandbox.machine.process import Launcher, OwnedProcess, status_text, was_killed
from pytest_vmsandbox.machine.tpm import Tpm

_END_SECONDS = 5.0
_SAVED_HERE = "[vmsandbox: the guest was saved here, and went on from here for the test]"


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A machine's console and the helper's port.

    We keep QEMU's ends of their sockets: if the guest moves to another QEMU, that one gets them, too. So
    what nobody has read yet is still there.

    Attributes:
        console: what the guest has written.
        port: the helper's.
        console_end, port_end: QEMU's ends.
    """

    console: Console
    port: Port
    console_end: socket.socket
    port_end: socket.socket

    def hang_up(self) -> None:
        """QEMU is gone: nobody should wait until it reads what is sent."""
        self.console_end.close()
        self.port_end.close()


def lines(stack: ExitStack, loop: LoopThread, folder: Path | None, before: str) -> Lines:
    """A machine's console and the helper's port. `stack` closes their sockets and the log.

    Args:
        folder: for the log of the console, or None.
        before: what the guest had written to its console before it was saved. The log begins with it.
    """
    log: IO[bytes] | None = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: on a full disk, closing a buffered file would fail again.
        log = stack.enter_context(
            open(folder / "console.log", "ab", buffering=0, opener=host.private)  # noqa: SIM115
        )
        if before and not log.tell():  # otherwise an earlier machine of this guest has written it
            with suppress(OSError):  # a full disk: the text is still there
                log.write(f"{before.rstrip()}\n{_SAVED_HERE}\n".encode("utf-8", "replace"))
    console = Console(log, before)
    (console.line, its_end), (our_port, port_end) = socket.socketpair(), socket.socketpair()
    for end in (console.line, its_end, our_port, port_end):
        stack.enter_context(end)
    port = Port(our_port)
    stack.enter_context(loop.reading(console.line, console.feed))
    stack.enter_context(loop.reading(our_port, port.feed))
    return Lines(console=console, port=port, console_end=its_end, port_end=port_end)


def monitor_log(stack: ExitStack, folder: Path | None, argv: list[str]) -> IO[str] | None:
    """The log file for a machine's monitor. Only this user can read it. Another one has the command line."""
    if folder is None:
        return None
    text = "\n".join(argv) + "\n"  # names of files may not be UTF-8
    with open(folder / "qemu.argv", "wb", opener=host.private) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    return stack.enter_context(
        open(folder / "qmp.log", "a", buffering=1, encoding="utf-8", opener=host.private)
    )


def start_tpm(
    stack: ExitStack, hypervisor: Hypervisor, spec: MachineSpec, folder: Path | None
) -> Tpm | None:
    """The machine's TPM, if it has one. `stack` ends it."""
    if not spec.tpm or folder is None:
        return None
    identity = host.guest_identity(spec.accelerator)
    return stack.enter_context(tpm.running(hypervisor.launcher, folder, identity))


def descriptors(
    stack: ExitStack,
    theirs: ExitStack,
    loop: LoopThread,
    spec: MachineSpec,
    ram: IO[bytes] | None,
    disks: Disks,
    machine_tpm: Tpm | None,
) -> tuple[Descriptors, dict[int, int]]:
    """QEMU's descriptors, and its number → ours. `theirs` closes those here that only QEMU uses."""
    given: dict[int, int] = {}

    def give(file: IO[bytes] | socket.socket) -> int:
        number = Descriptors.helper + 1 + len(given)  # `helper` is the last fixed number
        given[number] = file.fileno()
        return number

    def give_image_file(path: Path | None) -> int | None:
        return give(stack.enter_context(image_file(path))) if path is not None else None

    def give_boot_file(path: Path | None) -> int | None:
        """QEMU opens it again, perhaps as a user who cannot read it."""
        if path is None:
            return None
        file: IO[bytes] = stack.enter_context(image_file(path))
        is_open_to_all = os.fstat(file.fileno()).st_mode & 0o004
        if not is_open_to_all and host.guest_identity(spec.accelerator) is not None:
            file = stack.enter_context(memory.in_memory(file))
        return give(file)

    network = spec.hardware.network
    gate: tuple[socket.socket, ...] = ()
    if network not in NETWORKS:
        gate = stack.enter_context(gated(loop, network, theirs))
    fds = Descriptors(
        kernel=give_boot_file(spec.kernel),
        initrd=give_boot_file(spec.initrd),
        modules=give_image_file(spec.modules),
        code=give(disks.flash.code) if disks.flash is not None else None,
        variables=give(disks.flash.variables) if disks.flash is not None else None,
        tpm=give(machine_tpm.channel) if machine_tpm is not None else None,
        gate=tuple(map(give, gate)),
        memory=give(ram) if ram is not None else None,
        base=give(disks.base) if disks.base is not None else None,
        overlays=tuple(tuple(map(give, layers)) for layers in disks.overlays),
        plugged=tuple(descriptors_of(disk, give) for disk in disks.plugged_in),
        cards=tuple((it.card, give(it.end) if it.end else None) for it in spec.cards),
        request=give(disks.request) if disks.request is not None else None,
        recording=_of_recording(disks.recording, give),
    )
    return fds, given


def _of_recording(
    recording: Recording | None, give: Callable[[IO[bytes]], int]
) -> RecordingDescriptors | None:
    if recording is None:
        return None
    return RecordingDescriptors(
        mode=recording.mode,
        log=give(recording.log),
        console=give(recording.console),
        report=give(recording.report),
        snapshots=None if recording.snapshots is None else give(recording.snapshots),
    )


def channel(
    ours: ExitStack, theirs: ExitStack, given: dict[int, int], number: int
) -> socket.socket:
    """Our end of a socket pair. QEMU gets the other end as descriptor `number`."""
    our, their = socket.socketpair()
    ours.enter_context(our)
    theirs.enter_context(their)
    given[number] = their.fileno()
    return our


def spawned(
    launcher: Launcher, spec: MachineSpec, argv: list[str], given: dict[int, int]
) -> AbstractContextManager[OwnedProcess]:
    """QEMU, started with these descriptors."""
    is_emulated_clone = spec.start is cmdline.Start.CLONED and spec.accelerator == "tcg"
    return launcher.spawn(
        argv,
        fds=given,
        env={"PATH": os.defpath, "LC_ALL": "C"},
        identity=host.guest_identity(spec.accelerator),
        # There may be many clones, and under emulation huge pages do not help.
        small_pages=is_emulated_clone,
    )


def did_not_start(process: OwnedProcess, machine_tpm: Tpm | None) -> LaunchError:
    status = process.wait(_END_SECONDS)
    how = "does not answer" if status is None else f"ended with {status_text(status)}"
    more = machine_tpm.said if machine_tpm is not None else ""
    return LaunchError(
        f"QEMU {how}",
        details=process.stderr_tail + more + "--- its command line\n" + " ".join(process.argv),
        remedy="run 'vmsandbox doctor' to check this machine",
        transient=status is None or was_killed(status),
    )
