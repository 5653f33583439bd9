"""What a guest runs on: its machine, its power, and the ways into it.

`Engine.use` is the only way to the machine of others than the engine itself. It counts its users, so
`Engine.rest` pauses a guest only while nobody uses it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Self

from pytest_vmsandbox.core.deadline import Deadline, monotonic
from pytest_vmsandbox.core.errors import (
    BootError,
    CommandResult,
    CommandTimeout,
    ConfigError,
    GuestLost,
    VMSandboxError,
    add_hints,
)
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.access import SSHAccess
from pytest_vmsandbox.guests.commands import Command, Sink, check_status, text_of
from pytest_vmsandbox.guests.machines import Machines, Running, Saved
from pytest_vmsandbox.guests.process import RemoteProcess
from pytest_vmsandbox.machine import host

_POLL_SECONDS = 0.25


class Engine:
    """The machine of one guest, and what is done to it from here.

    A context manager: the guest is switched on, and gone at the end. All methods may be called from
    any thread. What raises `GuestLost` does so when the guest is gone, or switched off.

    Args:
        machines: starts its machine each time that it is switched on.
        settings: have the limits on a boot and on a command.
        hints: lines for its errors: where the artifacts are, and so on.
        on_resume: called when it goes on after a rest.

    Attributes:
        spec: the guest's hardware.
        origin: how it came to be: ``armed`` (cloned ahead of demand), ``cloned`` (on demand) or
            ``booted``.
        facts: what the last layer of its preparation has told, as values that JSON keeps; empty for
            layers that users have made.
    """

    def __init__(
        self,
        machines: Machines,
        *,
        settings: Settings,
        hints: Callable[[], Sequence[str]],
        on_resume: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = machines.name
        self.image = machines.blueprint.image
        self.spec = machines.blueprint.hardware
        self.stretch = machines.blueprint.stretch
        self.origin = "booted"
        self.facts: Mapping[str, object] = {}
        self._machines = machines
        self._settings = settings
        self._hints = hints
        self._on_resume = on_resume
        self._running: Running | None = None
        self._lock = threading.RLock()  # of what runs, and who uses it
        self._orderly = threading.Lock()  # held while the guest goes down by itself

    def __enter__(self) -> Self:
        with self.explained():
            self.power_on()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._switch_off(self._running)
        finally:
            self._machines.close()

    # -- who uses it ------------------------------------------------------------------------------

    @contextmanager
    def use(self, *, hold: bool = False) -> Iterator[Running]:
        """The guest, not paused by `rest` as long as this lasts. One that rests goes on first.

        Args:
            hold: do not pause it later either, until it is switched off: something is started that
                goes on, or somebody is given a way in.

        Raises:
            GuestLost: it is switched off, or does not go on.
        """
        with self._lock:
            running = self._on()
            rested = running.resting
            if rested:
                running.resume()
            running.users += 1
            running.held |= hold
        try:
            if rested:
                self._on_resume()
            yield running
        finally:
            with self._lock:
                running.users -= 1
                running.last_use = monotonic()

    @property
    def idle_seconds(self) -> float:
        """How long nobody has used the guest; 0 where it must not be paused.

        That is so while a call uses it (a program that is waited for, a transfer, a boot), and once
        it is held: by a program that was left running, a forwarded port, access by SSH, a command to
        QEMU, or its console. It is held until it is switched off.
        """
        running = self._running
        if running is None or running.resting or running.held or running.users:
            return 0.0
        return monotonic() - running.last_use

    def rest(self) -> None:
        """Pause the guest until somebody uses it, if it may be paused; see `idle_seconds`.

        Raises:
            GuestLost: it does not answer.
        """
        with self._lock:
            if self.idle_seconds and self._running is not None:
                self._running.pause()

    @property
    def resting(self) -> bool:
        """Whether it is paused until somebody uses it."""
        return self._running is not None and self._running.resting

    def _on(self) -> Running:
        """What runs; it may be resting."""
        if (running := self._running) is None:
            raise GuestLost(f"{self.name} is switched off", remedy="vm.power_on() switches it on")
        return running

    # -- how it is doing; a resting guest goes on resting ------------------------------------------

    @property
    def is_on(self) -> bool:
        """Whether it is switched on."""
        return self._running is not None

    @property
    def loss(self) -> GuestLost | None:
        """Why it is gone; None if it is switched on and has neither ended nor panicked."""
        try:
            self._on().machine.check()
        except GuestLost as lost:
            return lost
        return None

    @property
    def pid(self) -> int:
        """The process number of its QEMU."""
        return self._on().machine.process.pid

    @property
    def processor_seconds(self) -> float:
        """Processor time, in seconds, that it has taken of this host since it was switched on."""
        return host.processor_seconds(self.pid)

    @property
    def boot_seconds(self) -> float:
        """The limit on a boot, as far as it is known how slow this host is."""
        return self.stretch(self._settings.boot_timeout)

    @property
    def command_seconds(self) -> float:
        """The limit on a command that names none, likewise."""
        return self.stretch(self._settings.command_timeout)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Add to errors what the guest's maker knows: where the artifacts are, and so on."""
        try:
            yield
        except VMSandboxError as error:
            add_hints(error, self._hints)
            raise

    # -- programs ---------------------------------------------------------------------------------

    def start(self, command: Command) -> RemoteProcess:
        """Start a program, on streams that its starter reads and closes. It holds the guest.

        It runs as its user: root becomes another one, anybody else logs in as them.

        Raises:
            CommandError: the folder or the user does not exist.
        """
        with self.use(hold=True) as running:
            process = running.start(command, self.spec.user)
            running.left.append(process)
            return process

    def run(
        self,
        command: Command,
        *,
        stdin: IO[bytes] | None = None,
        stdout: Sink | None = None,
        timeout: float | None = None,
        idle: float = math.inf,
    ) -> CommandResult[bytes]:
        """Run a program to its end.

        Args:
            stdout: takes its output as it comes, which is missing in the result then.
            timeout: seconds; None for the setting.
            idle: seconds in which nothing goes either way.

        Raises:
            CommandTimeout: it did not end in time; with what it had written.
        """
        written, said = bytearray(), bytearray()
        started = monotonic()
        with self.use() as running:
            process = running.start(command, self.spec.user)
            try:
                status = process.communicate(
                    stdin,
                    stdout or written.extend,
                    said.extend,
                    self.command_seconds if timeout is None else timeout,
                    idle,
                )
            except CommandTimeout as late:
                raise CommandTimeout(
                    late.brief,
                    seconds=late.seconds,
                    stdout=bytes(written),
                    stderr=bytes(said),
                    remedy="give it more with timeout=…, or vm_command_timeout for all",
                ) from late
            finally:
                process.close()
        return CommandResult(
            argv=command.argv,
            returncode=status,
            stdout=bytes(written),
            stderr=bytes(said),
            duration=monotonic() - started,
        )

    def stream_script(
        self, script: str, *, stdin: IO[bytes] | None = None, stdout: Sink | None = None
    ) -> str:
        """Run a script with the guest's ``/bin/sh``.

        It has all the time it needs as long as something moves: `CommandTimeout` comes when
        nothing went either way for the seconds of ``vm_command_timeout``.

        Returns:
            What it wrote to its standard error.

        Raises:
            CommandError: it returned non-zero.
        """
        with self.explained():
            command = Command(argv=("/bin/sh", "-c", script))
            result = text_of(
                self.run(
                    command, stdin=stdin, stdout=stdout, timeout=math.inf, idle=self.command_seconds
                )
            )
            check_status(result)
            return result.stderr

    def connect(self, path: str) -> RemoteProcess | None:
        """A connection to a Unix socket in the guest, as the streams of a program. It holds the guest.

        Returns:
            None where there is no way but a program that relays them.

        Raises:
            CommandError: nothing listens there.
        """
        with self.use(hold=True) as running:
            running.machine.check()
            return None if (helper := running.helper) is None else helper.connect(path)

    def ping(self) -> None:
        """Have the guest's helper answer, which does nothing else.

        Raises:
            ConfigError: there is no helper in the guest.
        """
        with self.use() as running:
            running.machine.check()
            if (helper := running.helper) is None:
                raise ConfigError(f"{self.name} has no helper")
            helper.ping()

    def ssh_access(self) -> SSHAccess:
        """What an SSH client needs to get in. It holds the guest.

        Raises:
            GuestLost: the guest does not answer on SSH.
        """
        with self.use(hold=True) as running:
            return self._machines.ssh_access(running.machine, self.spec.user)

    # -- power ------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Switch on, with the disks as they are, and wait until the guest answers.

        Raises:
            ConfigError: it is on.
            BootError: it did not come up.
        """
        with ExitStack() as stack:
            with self._lock:
                if self._running is not None and self._running.machine.ended() is None:
                    raise ConfigError(
                        f"{self.name} is on", remedy="vm.power_off() or vm.power_cut() first"
                    )
                self._switch_off(self._running)
                self._running = self._machines.switch_on()
                running = stack.enter_context(self.use())
            try:  # QEMU's start has shown how slow this host is
                running.await_answer(Deadline(self.boot_seconds))
            except BaseException:
                self._switch_off(running)
                raise

    def reboot(self, deadline: Deadline) -> None:
        """Restart in an orderly way, and wait until the guest answers again.

        Raises:
            BootError: it did not come back.
        """
        with self._orderly, self.use() as running:
            machine = running.machine
            since = len(machine.monitor.events())
            lost = self._ask("reboot")
            while machine.monitor.wait_event("RESET", since=since, timeout=_POLL_SECONDS) is None:
                machine.check()
                if deadline.expired:
                    raise BootError(
                        f"{self.name} did not go down to reboot",
                        stage="init",
                        seconds=deadline.elapsed,
                        details=machine.console.tail(),
                    ) from lost
            machine.console.begin_boot()
            running.hang_up()
            running.await_answer(deadline)

    def power_off(self) -> None:
        """Switch off in an orderly way. A guest that is not off after the boot time-out is ended.

        Raises:
            CommandError: it refuses to go down.
        """
        with self._orderly, self.use() as running:
            self._ask("poweroff")
            running.machine.end(self.boot_seconds)
        self._switch_off(running)

    def power_cut(self) -> None:
        """Pull the plug; this does not wait for others who use the guest."""
        running = self._on()
        running.machine.kill()
        self._switch_off(running)

    def _ask(self, program: str) -> GuestLost | None:
        """Ask the guest to go down; the connection may break before it answers.

        Returns:
            How the connection broke, for whom waits in vain; None if there was an answer.

        Raises:
            CommandError: the guest cannot go down.
        """
        try:
            result = self.run(Command(argv=(program,), user="root"))
        except GuestLost as lost:
            return lost
        if result.returncode > 0:  # ended by a signal, it is one of the first to go
            check_status(text_of(result))
        return None

    def _switch_off(self, running: Running | None) -> None:
        """End what runs, unless that is done already."""
        with self._lock:
            if running is not None and running is self._running:
                self._running = None
                running.stack.close()

    # -- its state --------------------------------------------------------------------------------

    def save(self) -> Saved:
        """The state of the guest now, its memory and its disks; it goes on afterwards.

        Raises:
            MonitorError: QEMU cannot.
            ConfigError: there is no helper in the guest.
        """
        # Not while the guest goes down: nobody would answer in what goes on from there. Once it has
        # the lock, it may have been rolled back meanwhile.
        with self._orderly, self.use(), self._lock, self.use() as running:
            return self._machines.save(running)

    def roll_back(self, saved: Saved) -> None:
        """Go on from a saved state, also if the guest was lost or switched off.

        Raises:
            LaunchError: this host has no room for all of the guest's memory.
        """
        with self._lock:
            self._switch_off(self._running)
            self._machines.roll_back(saved)
            self.power_on()
            self._on().held = saved.held

    @property
    def has_helper(self) -> bool:
        """Whether the guest has a helper that is there now."""
        return self._on().helper is not None

    def save_devices(self, state: IO[bytes]) -> None:
        """Write the state of its devices to an open file, and end it; its memory is a file.

        Nobody is connected to it then.

        Raises:
            MonitorError: QEMU cannot.
        """
        with self.use() as running:
            running.hang_up()
            running.machine.save(state, with_memory=False)
            running.machine.end(0)
