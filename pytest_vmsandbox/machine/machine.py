"""One running QEMU: its process, monitor, console and disks, and how we end it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import BootError, GuestLost, LaunchError, MonitorError
from pytest_vmsandbox.machine import cmdline, forwards, host, stages, starting, tpm
from pytest_vmsandbox.machine.cmdline import MachineSpec
from pytest_vmsandbox.machine.console import Console, last_lines
from pytest_vmsandbox.machine.disk import NO_DISKS, Disks
from pytest_vmsandbox.machine.drives import Drives
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.lending import lent, state_address
from pytest_vmsandbox.machine.port import Port
from pytest_vmsandbox.machine.process import OwnedProcess, status_text, was_killed
from pytest_vmsandbox.machine.qmp import Event, Monitor
from pytest_vmsandbox.machine.tpm import Tpm

GREETING_SECONDS = 30.0
_TERM_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_STATE_SECONDS = 120.0  # for a saved state; without the memory it takes milliseconds
_FINISHING, _FINISH_SECONDS = "finish-migrate", 0.002
_BANDWIDTH = 1 << 40  # bytes a second for writing a state: no limit

_DISK_FULL = (
    "this machine's disk is full",
    "make room on the disk of the cache: guests' disks are written there",
)
_NO_ROOM = {"No space left on device", "Disk quota exceeded"}  # in the C locale, as is QEMU
_DISK_FAILED = (
    "this machine's disk may be damaged",
    f"look into this machine's kernel log (dmesg), or set {paths.CACHE} to a folder on another disk",
)
# Why QEMU stops a guest by itself: status → cause and remedy.
_STOPPED = {
    "io-error": _DISK_FULL,  # a disk of ours does not stop it, but one that a hook has added may
    "internal-error": (
        "the accelerator failed",
        "use emulation: --vm-accel=tcg (pytest), --accel=tcg (vmsandbox)",
    ),
}
_ON_PURPOSE = (
    "if a test switches its guest off on purpose, drive the guest by the fixture vm, and call vm.power_on() to "
    "switch it on again"
)
_ENDED_BOOT = (
    "look at the last lines above. The system may look for a disk that this guest does not have: root= in boot.append "
    "of image.toml names it (vmsandbox images import: --append)"
)
_HOST_REASONS = {
    "host-signal",
    "host-error",
}  # reasons for QEMU's end that lie outside of the guest


@dataclass(eq=False, repr=False)
class Machine:
    """A QEMU process that we control. `running` starts and ends it.

    Attributes:
        is_silent: finds out whether the guest does not answer any more; None if nobody can ask it.
    """

    spec: MachineSpec
    process: OwnedProcess
    monitor: Monitor
    lines: starting.Lines
    _pace: host.Pace
    _own: ExitStack  # ends QEMU
    _tpm: Tpm | None = None
    is_silent: Callable[[], bool] | None = None
    console: Console = field(init=False)
    helper: Port = field(init=False)
    drives: Drives = field(init=False)
    _is_over: bool = False  # whether we have ended it
    _asked_at: int = 0  # the size of the console when the guest was last asked whether it panicked
    _asking: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.console, self.helper = self.lines.console, self.lines.port
        self.drives = Drives(self.execute, self.monitor, self.spec.architecture)

    @classmethod
    @contextmanager
    def running(
        cls,
        hypervisor: Hypervisor,
        spec: MachineSpec,
        *,
        disks: Disks = NO_DISKS,
        logs: Path | None = None,
        memory: IO[bytes] | None = None,
        state: IO[bytes] | None = None,
        tpm_folder: Path | None = None,
        before: str = "",
        follows: Machine | None = None,
    ) -> Iterator[Machine]:
        """Start QEMU and connect to its monitor. At the end, the process is killed and reaped.

        Args:
            logs: folder for the files ``console.log``, ``qmp.log`` and ``qemu.argv``, or None.
            memory: the file with the guest's memory, if `spec.start` needs one.
            state: the state to load, if `spec.start` needs one. Such a machine is paused.
            tpm_folder: keeps what the guest's TPM keeps without power, if `spec.tpm`.
            before: what the guest had written to its console when `state` was saved.
            follows: the machine that the guest moves away from, whose console and port it gets.

        Raises:
            LaunchError: the host has no room, QEMU ended before it greeted us, or it cannot load the
                state.
            ImageError: the kernel or the initial RAM disk cannot be read.
        """
        host.require_memory(spec.hardware.memory if memory is None else host.CLONE_GROWTH)
        loop = hypervisor.loop
        with ExitStack() as stack:
            lines = starting.lines(stack, loop, logs, before) if follows is None else follows.lines
            own, theirs = (stack.enter_context(ExitStack()) for _ in range(2))
            its_tpm = starting.start_tpm(own, hypervisor, spec, tpm_folder)
            fds, given = starting.descriptors(own, theirs, loop, spec, memory, disks, its_tpm)
            given |= {fds.console: lines.console_end.fileno(), fds.helper: lines.port_end.fileno()}
            argv = cmdline.argv(spec, fds)
            monitor_log = starting.monitor_log(own, logs, argv)
            with theirs:
                our_monitor = starting.channel(own, theirs, given, fds.monitor)
                process = own.enter_context(
                    starting.spawned(hypervisor.launcher, spec, argv, given)
                )
                if its_tpm is not None:
                    theirs.enter_context(its_tpm.channel)
            former = () if follows is None else follows.monitor.events()
            monitor = Monitor(loop, monitor_log, hypervisor.pace, former)
            try:
                own.enter_context(monitor.connected(our_monitor, timeout=GREETING_SECONDS))
            except MonitorError as error:
                raise starting.did_not_start(process, its_tpm) from error
            # Kill QEMU before the monitor is disconnected, so nothing waits for a dying QEMU.
            own.callback(_kill, process)
            names = cmdline.disk_names(spec.hardware, has_base=disks.base is not None)
            machine = cls(spec, process, monitor, lines, hypervisor.pace, own.pop_all(), its_tpm)
            stack.callback(machine._end)
            machine.drives.started_with(names, fds)
            if state is not None:
                machine._load(state, has_memory=spec.start.loads_memory)
            yield machine

    def take_over(self, other: Machine) -> None:
        """Go on with the QEMU of another machine, to which the guest has moved. Our own QEMU is killed."""
        former, self._own = self._own, other._own.pop_all()
        other.monitor.follow(self.monitor)
        other.drives.move(self.execute, self.drives)
        self.spec, self.drives = other.spec, other.drives
        self.process, self.monitor = other.process, other.monitor
        former.close()

    def _end(self) -> None:
        self._is_over = True
        self._own.close()

    # -- how it is doing ------------------------------------------------------------------------

    @property
    def stage(self) -> str:
        """How far the guest has got: firmware, boot loader, kernel, init or ssh."""
        return stages.stage_of(self.console.this_boot)

    def reaches(self, stage: str, timeout: float) -> bool:
        """Whether the guest reaches a stage, ``init`` or ``ssh``, within `timeout` seconds."""
        try:
            self.console.wait_for(stages.STAGES[stage], timeout, this_boot=True)
        except TimeoutError:
            return False
        return True

    def ended(self) -> int | None:
        """QEMU's exit status, or None while it runs."""
        return self.process.wait(0)

    def check(self) -> None:
        """Check that the guest is still there. It is quick enough to be called often.

        Raises:
            GuestLost: QEMU is gone, the guest's kernel panicked, the accelerator failed, or the host's
                disk is full or failed.
        """
        if self._is_over:
            raise GuestLost(
                f"{self.spec.name} was switched off or rolled back by snapshot() since then, so this "
                "connection to it is gone",
                remedy="start the program again, or do this before the guest is switched off or rolled back",
            )
        events = self.monitor.events()
        names = [event["event"] for event in events]
        if "BLOCK_IO_ERROR" in names:
            self._check_disk_errors()
        if any(map(_is_end, events)):
            raise self._panic()
        status = self.ended()
        if status is None:
            self._check_tpm()
            if [name for name in names if name in {"STOP", "RESUME"}][-1:] == ["STOP"]:
                self._check_stopped()
            elif not self.spec.architecture.reports_panic and self._shows_panic():
                raise self._panic()
            return
        self.lines.hang_up()
        if "SHUTDOWN" in names:
            reason = events[names.index("SHUTDOWN")].get("data", {}).get("reason", "")
            raise GuestLost(
                f"{self.spec.name} is switched off ({reason})",
                details=self.console_lines(),
                remedy=_ON_PURPOSE,
                transient=reason in _HOST_REASONS,
            )
        said = self._tpm.said if self._tpm is not None else ""
        lines = [self.process.stderr_tail, said, self.console_lines()]
        raise GuestLost(
            f"{self.spec.name}: QEMU ended with {status_text(status)}",
            details="\n".join(filter(None, lines)),
            stage="launch",
            transient=was_killed(status),
        )

    def _shows_panic(self) -> bool:
        """Whether the console ends with a panic, and the guest does not answer any more.

        Any program in the guest can write that text, so the guest is asked.
        """
        size = self.console.size
        if self.is_silent is None or size == self._asked_at:
            return False
        if not self._asking.acquire(blocking=False):  # `is_silent` checks the guest, too
            return False
        try:
            found = self.console.ends_with(stages.PANIC_END) and self.is_silent()
            self._asked_at = 0 if found else size
        finally:
            self._asking.release()
        return found

    def _check_tpm(self) -> None:
        """Check whether the process that emulates the TPM is still there."""
        if self._tpm is not None and (status := self._tpm.process.wait(0)) is not None:
            raise GuestLost(
                f"{self.spec.name}: {tpm.PROGRAM}, its TPM, ended with {status_text(status)}",
                details=self._tpm.said,
                stage="launch",
                transient=was_killed(status),
            )

    def check_disks(self) -> None:
        """Check that this machine could read and write all that the guest has asked for until now.

        The guest got an error, and may have swallowed it. So what it did since proves nothing.

        Raises:
            GuestLost: it could not.
        """
        if not self.monitor.is_stopped:  # by a fault
            with suppress(MonitorError):  # QEMU answers when it has told us of all errors before
                self.monitor.execute("query-status", timeout=_TERM_SECONDS)
                self.drives.count_failures()
        self._check_disk_errors()

    def _check_disk_errors(self) -> None:
        for event in self.drives.errors():
            operation, reason = event["data"]["operation"], str(event["data"].get("reason", ""))
            what = f"could not {operation} a disk of the guest: {reason}"
            cause, remedy = _DISK_FULL if reason in _NO_ROOM else _DISK_FAILED
            raise GuestLost(
                f"{self.spec.name}: QEMU {what}: {cause}",
                details=self.console_lines(),
                remedy=remedy,
                stage="launch",
            )

    def _check_stopped(self) -> None:
        """Check whether QEMU has stopped the CPUs by itself."""
        try:
            status = self.monitor.execute("query-status")["status"]
        except MonitorError:
            return  # QEMU is ending; the next check finds the reason
        if status in _STOPPED:
            cause, remedy = _STOPPED[status]
            raise GuestLost(
                f"{self.spec.name}: QEMU stopped the guest with status {status!r} "
                f"({self.spec.accelerator}): {cause}",
                details=self.console_lines(),
                remedy=remedy,
                stage="launch",
            )

    def check_booting(self, seconds: float) -> None:
        """Check a guest that boots, also for an early panic, and for a boot that has ended.

        A kernel that panics before it has loaded the driver for pvpanic reports that on the console only.
        After the boot, that text proves nothing: any program in the guest can write it.

        Args:
            seconds: since the guest was switched on.

        Raises:
            BootError: what `check` raises, the kernel panicked, or the guest waits for a person.
        """
        try:
            self.check()
            text = self.console.this_boot
            if stages.PANIC_END in text:
                raise self._panic()
            if (end := stages.dead_end(text)) is not None:
                why = stages.causes(text)
                raise BootError(
                    f"{self.spec.name}: {end.what}, {seconds:.0f} s after power-on",
                    seconds=seconds,
                    details="\n".join(filter(None, [why, self.console_lines()])),
                    stage=end.stage,
                    remedy=end.remedy,
                )
        except GuestLost as lost:
            raise self.boot_error(lost, seconds) from lost

    def boot_error(self, error: GuestLost, seconds: float) -> BootError:
        """The error for a guest that was lost while it booted."""
        stage = self.stage if error.stage == GuestLost.stage else error.stage
        return BootError(
            f"{error.brief} while booting, {seconds:.0f} s after power-on",
            stage=stage,
            seconds=seconds,
            details=error.details,
            remedy=_ENDED_BOOT if error.remedy == _ON_PURPOSE else error.remedy,
            transient=error.transient,
        )

    def _panic(self) -> GuestLost:
        """The error for a kernel panic. The console may have its text."""
        brief, details = "kernel panic", self.console_lines()
        if (text := stages.panic_text(self.console.own)) is not None:
            brief, details = f"kernel panic: {text[0]}", f"--- on the console\n{text[1]}"
        return GuestLost(f"{self.spec.name}: {brief}", details=details, stage="kernel")

    def console_lines(self) -> str:
        """The last lines of the console, for the details of an error. What a template wrote is no cause."""
        tail = last_lines(self.console.own)
        return f"--- last lines of the console\n{tail}" if tail else "(the console is empty)"

    # -- what can be done with it ---------------------------------------------------------------

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None
    ) -> Any:
        """Execute a QMP command, and pass a descriptor along.

        Raises:
            MonitorError: QEMU refused it.
            GuestLost: QEMU is gone.
        """
        try:
            return self.monitor.execute(command, arguments, fd=fd)
        except MonitorError:
            if self.monitor.closed:  # QEMU is ending; `check` finds the reason
                self.process.wait(_TERM_SECONDS)
                self.check()
            raise

    def human(self, line: str) -> str:
        """Execute a line of the monitor for people, and return its text."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def forward(self, port: int, protocol: str = "tcp") -> tuple[str, int]:
        """A loopback address of this host that reaches a port of the guest.

        The kernel chooses the port on this side. A second call for the same port returns the same address.

        Args:
            port: of the guest.
            protocol: ``tcp`` or ``udp``.

        Raises:
            MonitorError: QEMU refuses it.
        """
        if not (here := self._forwarded(port, protocol)):
            answer = self.human(forwards.add_line(protocol, port))
            here = self._forwarded(port, protocol)
            if not here:
                raise MonitorError(
                    f"QEMU could not forward {protocol.upper()} port {port}", details=answer
                )
        return here

    def _forwarded(self, port: int, protocol: str) -> tuple[str, int] | None:
        for it in forwards.listed(self.human(forwards.SHOW)):
            if (it.protocol, it.port) == (protocol, port):
                return it.host, it.here
        return None

    # -- its state --------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop the CPUs. QEMU flushes all disks then: that uses no fault up that is meant for the guest."""
        self.execute("stop")
        self.drives.make_savable()

    def resume(self) -> None:
        """Let the CPUs go on."""
        self.execute("cont")

    def save(self, state: IO[bytes], *, with_memory: bool) -> None:
        """Pause the machine, and write its state to an open file.

        Args:
            with_memory: whether to write its memory, too. If not, the file of its memory is complete now.

        Raises:
            MonitorError: QEMU cannot do it, for instance because a device has a state that cannot be saved.
        """
        self.pause()
        self._transfer("migrate", state, has_memory=with_memory)

    def _load(self, state: IO[bytes], *, has_memory: bool) -> None:
        try:
            self._transfer("migrate-incoming", state, has_memory=has_memory)
        except (MonitorError, GuestLost) as error:
            self.process.wait(_TERM_SECONDS)
            raise LaunchError(
                "QEMU cannot load the saved state of the guest",
                details="\n".join(filter(None, [error.brief, self.process.stderr_tail])),
                remedy="if this happens again, remove the saved states: vmsandbox clean --templates",
                transient=error.transient,
            ) from error

    def _transfer(self, command: str, state: IO[bytes], *, has_memory: bool) -> None:
        capabilities = [
            {"capability": "events", "state": True},
            {"capability": "x-ignore-shared", "state": not has_memory},
        ]
        self.execute("migrate-set-capabilities", {"capabilities": capabilities})
        if command == "migrate":
            self.execute("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH})
        since = len(self.monitor.events())
        # QEMU needs a descriptor that is open for exactly what it will do.
        mode = "wb" if command == "migrate" else "rb"
        with (
            Path(f"/proc/self/fd/{state.fileno()}").open(mode, buffering=0) as own,
            state_address(self.execute, self.spec.version, own) as uri,
        ):
            self.execute(command, {"uri": uri})
        deadline = Deadline(self._pace.stretch(_STATE_SECONDS))
        while not (
            event := self.monitor.wait_event(
                "MIGRATION",
                since=since,
                timeout=deadline.remaining(_LOOK_SECONDS),
                among=lambda event: event["data"]["status"] in {"completed", "failed"},
            )
        ):
            if command != "migrate" or self.ended() is not None:
                self.check()  # a guest that has panicked can be saved
            if deadline.expired:
                self._pace.was_late()
                raise MonitorError(
                    f"QEMU did not save or load the guest's state within {deadline.seconds:g} s",
                    remedy="this machine may be overloaded: run fewer guests or workers at a time",
                    transient=True,
                )
        if command == "migrate":  # the event comes before the CPUs go on again
            while self.execute("query-status")["status"] == _FINISHING and not deadline.expired:
                deadline.pause(_FINISH_SECONDS)
        if event["data"]["status"] == "failed":
            why = str(self.execute("query-migrate").get("error-desc", ""))
            raise MonitorError("QEMU failed to save or load the guest's state", details=why)

    def screenshot(self, file: IO[bytes]) -> None:
        """Write the display to an open file, as PNG.

        Raises:
            MonitorError: QEMU cannot do it (older than 7.1, or built without PNG).
        """
        with lent(self.execute, file) as name:
            self.execute("screendump", {"filename": name, "format": "png"})

    def end(self, timeout: float) -> bool:
        """Wait until QEMU ends by itself. After the timeout, end it: quit, SIGTERM, SIGKILL.

        Args:
            timeout: seconds for the guest to switch itself off.

        Returns:
            Whether the guest switched itself off.
        """
        if self.process.wait(timeout) is not None:
            return True
        with suppress(MonitorError):  # signals follow
            self.monitor.execute("quit", timeout=_TERM_SECONDS)
        for number in (0, signal.SIGTERM, signal.SIGKILL):  # first no signal: it may be ending
            self.process.signal(number)
            if self.process.wait(_TERM_SECONDS) is not None:
                break
        return False

    def kill(self) -> None:
        """Pull the plug."""
        if not self.monitor.is_stopped:  # by a fault
            with suppress(MonitorError, GuestLost):
                self.drives.count_failures()
        _kill(self.process)


def _kill(process: OwnedProcess) -> None:
    process.signal(signal.SIGKILL)
    process.wait(_TERM_SECONDS)


def _is_end(event: Event) -> bool:
    """Whether an event tells that the guest has panicked, and does not restart by itself."""
    return event["event"] == "GUEST_PANICKED" and bool(event["data"]["action"] != "run")
