"""One running QEMU: its process, monitor, console and disks, and how it is ended."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import BootError, GuestLost, LaunchError, MonitorError
from pytest_vmsandbox.machine import cmdline, host
from pytest_vmsandbox.machine.cmdline import Descriptors, MachineSpec
from pytest_vmsandbox.machine.console import Console
from pytest_vmsandbox.machine.disk import NO_DISKS, Disks, image_file
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.port import Port
from pytest_vmsandbox.machine.process import Launcher, OwnedProcess
from pytest_vmsandbox.machine.qmp import Monitor

GREETING_SECONDS = 30.0
_TERM_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_STATE_SECONDS = 120.0  # for a saved state; without the memory it takes milliseconds
_FINISHING, _FINISH_SECONDS = "finish-migrate", 0.002
_BANDWIDTH = 1 << 40  # bytes a second at which a state is written: as fast as it goes

# What the console shows once a stage is reached. `kernel` is what a kernel prints first, also
# when it is told to be quiet; `init` and `ssh` are printed by our images.
_STAGES = {
    "ssh": r"^vmsandbox: ssh$",
    "init": r"^vmsandbox: init$",
    "kernel": r"Linux version|\bkernel\b|^\[ +\d+\.\d+\]",
}
# Why QEMU stops a guest by itself, and what helps, by its status.
_STOPPED = {
    "io-error": (
        "the host's disk is full",
        "make room where the cache of vmsandbox lies, for what guests write to their disks",
    ),
    "internal-error": (
        "the accelerator gave up",
        "do without the accelerator: --vm-accel=tcg (pytest), --accel=tcg (vmsandbox)",
    ),
}
_HOST_REASONS = {"host-signal", "host-error"}  # why QEMU ends that are no affair of the guest's
_PANIC_LINES = 30
_PANIC_END = "---[ end Kernel panic - not syncing"
_PANIC_TEXT = re.compile(r"^(?:\[ *\d+\.\d+\] )?Kernel panic - not syncing: (.*)$", re.MULTILINE)


@dataclass(eq=False, repr=False)
class Machine:
    """A QEMU process that we drive. Made by `running`, which ends it."""

    spec: MachineSpec
    process: OwnedProcess
    monitor: Monitor
    console: Console
    helper: Port
    _tops: list[str]  # what each disk writes into
    _pace: host.Pace
    _nodes: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _is_over: bool = False  # whether we have ended it

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
    ) -> Iterator[Machine]:
        """Start QEMU and connect to its monitor. At the end the process is killed and reaped.

        Args:
            logs: folder for the files ``console.log``, ``qmp.log`` and ``qemu.argv``, or None.
            memory: the file that is the guest's memory, where `spec.start` says so.
            state: what is loaded, likewise, from its beginning; such a machine is paused.

        Raises:
            LaunchError: the host has no room, QEMU ended before it greeted us, or it cannot load
                the state.
            ImageError: the kernel or the initial RAM disk cannot be read.
        """
        host.require_memory(spec.hardware.memory if memory is None else host.CLONE_GROWTH)
        loop = hypervisor.loop
        with ExitStack() as stack:
            fds, given = _descriptors(stack, spec, memory, disks)
            argv = cmdline.argv(spec, fds)
            console_log, monitor_log = _logs(stack, logs, argv)
            console = Console(console_log)
            with ExitStack() as theirs:
                our_monitor, our_console, our_helper = (
                    _channel(stack, theirs, given, number)
                    for number in (fds.monitor, fds.console, fds.helper)
                )
                helper = Port(our_helper)
                stack.enter_context(loop.reading(our_console, console.feed))
                stack.enter_context(loop.reading(our_helper, helper.feed))
                process = stack.enter_context(_spawned(hypervisor.launcher, spec, argv, given))
            monitor = Monitor(loop, monitor_log, hypervisor.pace)
            try:
                stack.enter_context(monitor.connected(our_monitor, timeout=GREETING_SECONDS))
            except MonitorError as error:
                raise _did_not_start(process) from error
            tops = cmdline.disk_names(spec, has_base=disks.base is not None)
            machine = cls(spec, process, monitor, console, helper, tops, hypervisor.pace)
            # Killed before the monitor is disconnected, so that nothing waits for a dying QEMU.
            stack.callback(machine.kill)
            stack.callback(setattr, machine, "_is_over", True)
            if state is not None:
                machine._load(state, has_memory=memory is None)
            yield machine

    # -- how it is doing ------------------------------------------------------------------------

    @property
    def stage(self) -> str:
        """How far the guest has got: launch, kernel, init or ssh."""
        text = self.console.this_boot
        reached = (stage for stage in _STAGES if re.search(_STAGES[stage], text, re.MULTILINE))
        return next(reached, "firmware")

    def reaches(self, stage: str, timeout: float) -> bool:
        """Whether the guest gets to a stage, ``init`` or ``ssh``, within `timeout` seconds."""
        try:
            self.console.wait_for(_STAGES[stage], timeout, this_boot=True)
        except TimeoutError:
            return False
        return True

    def ended(self) -> int | None:
        """QEMU's exit status, or None while it runs."""
        return self.process.wait(0)

    def check(self) -> None:
        """Look whether the guest is still there; quick enough to be called often.

        Raises:
            GuestLost: QEMU is gone, the guest's kernel panicked, the accelerator gave up, or the
                host's disk is full.
        """
        if self._is_over:
            raise GuestLost(
                f"this belongs to {self.spec.name} as it was before it was switched off, or rolled back "
                "by snapshot(): it is no longer heard of",
                remedy="start the program again, or do this before",
            )
        events = self.monitor.events()
        names = [event["event"] for event in events]
        if "GUEST_PANICKED" in names:
            raise self._panic()
        status = self.ended()
        if status is None:
            if [name for name in names if name in {"STOP", "RESUME"}][-1:] == ["STOP"]:
                self._check_stopped()
            return
        if "SHUTDOWN" in names:
            reason = events[names.index("SHUTDOWN")].get("data", {}).get("reason", "")
            raise GuestLost(
                f"{self.spec.name} is switched off ({reason})",
                details=self.console_lines(),
                remedy="vm.power_on() switches it on again, in a test that drives the guest from outside "
                "by the fixture vm",
                transient=reason in _HOST_REASONS,
            )
        raise GuestLost(
            f"{self.spec.name}: QEMU ended with {_status_text(status)}",
            details="\n".join(filter(None, [self.process.stderr_tail, self.console_lines()])),
            stage="launch",
            transient=_was_killed(status),
        )

    def _check_stopped(self) -> None:
        """Look who has stopped the processors: we, or QEMU by itself."""
        try:
            status = self.monitor.execute("query-status")["status"]
        except MonitorError:
            return  # QEMU is ending; what ended it is seen in a moment
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
        """Look as `check` does, and closer, while a guest boots.

        A kernel that panics before it has the driver which tells QEMU says so on the console.
        Later that text is no proof: any program of the guest can write it.

        Args:
            seconds: since it was switched on.

        Raises:
            BootError: what `check` raises, or the kernel panicked.
        """
        try:
            self.check()
            if _PANIC_END in self.console.this_boot:
                raise self._panic()
        except GuestLost as lost:
            raise self.boot_error(lost, seconds) from lost

    def boot_error(self, error: GuestLost, seconds: float) -> BootError:
        """The same loss, as one of a guest that has not come up yet."""
        stage = self.stage if error.stage == GuestLost.stage else error.stage
        return BootError(
            f"{error.brief} while booting, {seconds:.0f} s after power-on",
            stage=stage,
            seconds=seconds,
            details=error.details,
            remedy=error.remedy,
            transient=error.transient,
        )

    def _panic(self) -> GuestLost:
        """The panic that QEMU has told of; the console says which, where it came so far."""
        text, brief, details = self.console.text, "kernel panic", self.console_lines()
        for found in list(_PANIC_TEXT.finditer(text))[-1:]:
            lines = text[found.start() :].split("\n")[:_PANIC_LINES]
            brief, details = f"kernel panic: {found[1]}", "\n".join(["--- on the console", *lines])
        return GuestLost(f"{self.spec.name}: {brief}", details=details, stage="kernel")

    def console_lines(self) -> str:
        """The last lines of the console, for the details of an error."""
        tail = self.console.tail()
        return f"--- last lines of the console\n{tail}" if tail else "(the console is empty)"

    # -- what can be done with it ---------------------------------------------------------------

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None
    ) -> Any:
        """Execute a command of the machine protocol, with a descriptor passed along.

        Raises:
            MonitorError: QEMU refused it.
            GuestLost: QEMU is gone.
        """
        try:
            return self.monitor.execute(command, arguments, fd=fd)
        except MonitorError:
            if self.monitor.closed:  # QEMU is ending; what ended it is seen in a moment
                self.process.wait(_TERM_SECONDS)
                self.check()
            raise

    def human(self, line: str) -> str:
        """Execute a line of the monitor for people, and return its text."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def forward(self, port: int, protocol: str = "tcp") -> tuple[str, int]:
        """A loopback address of this host that reaches a port of the guest.

        The kernel picks the port on this side. Asked again for the same port, it gives the same.

        Args:
            port: of the guest.
            protocol: ``tcp`` or ``udp``.

        Raises:
            MonitorError: QEMU refuses it.
        """
        if not (here := self._forwarded(port, protocol)):
            answer = self.human(f"hostfwd_add {cmdline.NETDEV} {protocol}:127.0.0.1:0-:{port}")
            here = self._forwarded(port, protocol)
            if not here:
                raise MonitorError(f"QEMU did not forward port {port}", details=answer)
        return here

    def _forwarded(self, port: int, protocol: str) -> tuple[str, int] | None:
        # TCP[HOST_FORWARD]  12       127.0.0.1 40123       10.0.2.15    22     0     0
        for line in self.human("info usernet").splitlines():
            words = line.split()
            if words[:1] == [f"{protocol.upper()}[HOST_FORWARD]"] and words[5] == str(port):
                return words[2], int(words[3])
        return None

    # -- its state --------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop its processors."""
        self.execute("stop")

    def resume(self) -> None:
        """Let its processors go on."""
        self.execute("cont")

    def put_on_top(self, overlays: Sequence[IO[bytes]]) -> None:
        """Let each disk write into a new, empty qcow2 file from now on; what it has stays as it is.

        Raises:
            MonitorError: QEMU cannot.
        """
        for number, file in enumerate(overlays):
            below = self._tops[number]
            top = f"top-{next(self._nodes)}"  # a name may have 31 characters
            added: Any = self.execute("add-fd", fd=file.fileno())
            device = cmdline.overlay(top, added["fdset-id"], None)
            self.execute("blockdev-add", {**device, "backing": None})
            self.execute("blockdev-snapshot", {"node": below, "overlay": top})
            self._tops[number] = top

    def save(self, state: IO[bytes], *, with_memory: bool) -> None:
        """Pause it and write its state to an open file, from the file's beginning.

        Args:
            with_memory: its memory, too; else that is a file, which is complete now.

        Raises:
            MonitorError: QEMU cannot; for instance with a device whose state cannot be saved.
        """
        self.pause()
        self._transfer("migrate", state, has_memory=with_memory)

    def _load(self, state: IO[bytes], *, has_memory: bool) -> None:
        try:
            self._transfer("migrate-incoming", state, has_memory=has_memory)
        except (MonitorError, GuestLost) as error:
            self.process.wait(_TERM_SECONDS)
            raise LaunchError(
                "QEMU cannot load a saved state",
                details="\n".join(filter(None, [error.brief, self.process.stderr_tail])),
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
        # QEMU wants a descriptor that is open for exactly what it is about to do.
        mode = "wb" if command == "migrate" else "rb"
        with (
            Path(f"/proc/self/fd/{state.fileno()}").open(mode, buffering=0) as own,
            self._state_address(own) as uri,
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
            self.check()
            if deadline.expired:
                self._pace.was_late()
                raise MonitorError(
                    f"QEMU did not transfer the guest's state in {deadline.seconds:g} s",
                    transient=True,
                )
        if command == "migrate":  # it tells of the end before it lets the processors go on again
            while self.execute("query-status")["status"] == _FINISHING and not deadline.expired:
                deadline.pause(_FINISH_SECONDS)
        if event["data"]["status"] == "failed":
            why = str(self.execute("query-migrate").get("error-desc", ""))
            raise MonitorError("QEMU did not transfer the guest's state", details=why)

    @contextmanager
    def _state_address(self, file: IO[bytes]) -> Iterator[str]:
        """The address by which QEMU finds an open file for a state, until it has opened that."""
        if not cmdline.saves_to_file_addresses(self.spec.version):
            self.execute("getfd", {"fdname": "state"}, fd=file.fileno())
            yield "fd:state"
            return
        with self._lent(file) as name:
            yield f"file:{name}"

    @contextmanager
    def _lent(self, file: IO[bytes]) -> Iterator[str]:
        """A name by which QEMU can open a file that we have open, as long as this lasts."""
        added: Any = self.execute("add-fd", fd=file.fileno())
        number = added["fdset-id"]
        try:
            yield f"/dev/fdset/{number}"
        finally:
            with suppress(MonitorError):  # QEMU is gone, as the next command will tell
                self.monitor.execute("remove-fd", {"fdset-id": number})

    def screenshot(self, file: IO[bytes]) -> None:
        """Write the display to an open file, as PNG.

        Raises:
            MonitorError: QEMU cannot (before 7.1, or built without PNG).
        """
        with self._lent(file) as name:
            self.execute("screendump", {"filename": name, "format": "png"})

    def end(self, timeout: float) -> bool:
        """Wait for an orderly end of QEMU, then insist: quit, SIGTERM, SIGKILL.

        Args:
            timeout: seconds for the guest's own power-off, which somebody has asked for.

        Returns:
            Whether the guest switched itself off.
        """
        if self.process.wait(timeout) is not None:
            return True
        with suppress(MonitorError):  # then by signals
            self.monitor.execute("quit", timeout=_TERM_SECONDS)
        for number in (0, signal.SIGTERM, signal.SIGKILL):  # first none: it may be about to end
            self.process.signal(number)
            if self.process.wait(_TERM_SECONDS) is not None:
                break
        return False

    def kill(self) -> None:
        """Pull the plug."""
        self.process.signal(signal.SIGKILL)
        self.process.wait(_TERM_SECONDS)


def _logs(
    stack: ExitStack, folder: Path | None, argv: list[str]
) -> tuple[IO[bytes] | None, IO[str] | None]:
    """The files that a machine writes beside its work: of its console, and of its monitor."""
    if folder is None:
        return None, None
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(argv) + "\n"  # names of files in it may be no UTF-8
    (folder / "qemu.argv").write_text(text, "utf-8", "surrogateescape")
    # Unbuffered: else closing it would fail once more where the disk is full.
    console = stack.enter_context((folder / "console.log").open("ab", buffering=0))
    return console, stack.enter_context(
        (folder / "qmp.log").open("a", buffering=1, encoding="utf-8")
    )


def _descriptors(
    stack: ExitStack, spec: MachineSpec, memory: IO[bytes] | None, disks: Disks
) -> tuple[Descriptors, dict[int, int]]:
    """The numbers for QEMU, and which of our descriptors is behind each."""
    given: dict[int, int] = {}

    def give(file: IO[bytes]) -> int:
        number = Descriptors.helper + 1 + len(given)  # the last one that is always there
        given[number] = file.fileno()
        return number

    def give_image_file(path: Path | None) -> int | None:
        return give(stack.enter_context(image_file(path))) if path is not None else None

    fds = Descriptors(
        kernel=give_image_file(spec.kernel),
        initrd=give_image_file(spec.initrd),
        memory=give(memory) if memory is not None else None,
        base=give(disks.base) if disks.base is not None else None,
        overlays=tuple(tuple(map(give, layers)) for layers in disks.overlays),
    )
    return fds, given


def _channel(
    ours: ExitStack, theirs: ExitStack, given: dict[int, int], number: int
) -> socket.socket:
    """Our end of a socket pair; QEMU finds the other end under `number`."""
    our, their = socket.socketpair()
    ours.enter_context(our)
    theirs.enter_context(their)
    given[number] = their.fileno()
    return our


def _spawned(
    launcher: Launcher, spec: MachineSpec, argv: list[str], given: dict[int, int]
) -> AbstractContextManager[OwnedProcess]:
    """QEMU, started with these descriptors."""
    is_emulated_clone = spec.start is cmdline.Start.CLONED and spec.accelerator == "tcg"
    return launcher.spawn(
        argv,
        fds=given,
        env={"PATH": os.defpath, "LC_ALL": "C"},
        identity=host.guest_identity(spec.accelerator),
        # There may be many clones; under emulation, huge pages gain nothing.
        small_pages=is_emulated_clone,
    )


def _did_not_start(process: OwnedProcess) -> LaunchError:
    status = process.wait(_TERM_SECONDS)
    how = "does not answer" if status is None else f"ended with {_status_text(status)}"
    return LaunchError(
        f"QEMU {how}",
        details=process.stderr_tail + "--- its command line\n" + " ".join(process.argv),
        remedy="'vmsandbox doctor' checks this machine",
        transient=status is None or _was_killed(status),
    )


def _was_killed(status: int) -> bool:
    """Whether QEMU was ended by a signal, which nothing in a guest sends; not by its own sandbox."""
    return status < 0 and -status != signal.SIGSYS


def _status_text(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    hint = " (a system call that -sandbox forbids)" if -status == signal.SIGSYS else ""
    name = signal.Signals(-status).name
    hint = " (an out-of-memory kill, or a kill from outside)" if name == "SIGKILL" else hint
    return f"signal {name}{hint}"
