"""The engine of a guest: its machine, its power, and the ways into it.

Others get at the machine only by `Engine.use`. It counts the users, so `Engine.rest` pauses a guest only
while nobody uses it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any, Self

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
from pytest_vmsandbox.guests.reaching.access import SSHAccess
from pytest_vmsandbox.guests.reaching.commands import Command, Sink, check_status, text_of
from pytest_vmsandbox.guests.reaching.process import RemoteProcess
from pytest_vmsandbox.guests.running.machines import Machines, Running
from pytest_vmsandbox.guests.running.saved import Saved
from pytest_vmsandbox.guests.running.together import Meet, alone
from pytest_vmsandbox.machine import capture, host

_POLL_SECONDS = 0.25
_ASK_SECONDS = 0.05  # between looks whether a guest restarts; no kernel boots in that time


class Engine:
    """The machine of one guest, and what this side does to it.

    A context manager: it switches the guest on, and removes it at the end. You may call all methods from
    any thread. `GuestLost` means that the guest is gone or switched off.

    Args:
        machines: starts a machine each time that the guest is switched on.
        settings: have the timeouts of boots and commands.
        hints: lines for errors: where the artifacts are, and so on.
        on_resume: called when the guest goes on after a pause.
        on_restore: called with its name and the error that lets a snapshot be restored.
        fork: makes guests that go on from now; None if there can be none.

    Attributes:
        spec: the guest's hardware.
        origin: ``armed`` (cloned ahead of demand), ``cloned`` (on demand) or ``booted``.
        facts: what its last preparation has returned, as JSON values; empty for preparations of users.
        machines: its machines, and the disks that they have.
        orderly: held while the guest shuts itself down, or its disks change.
        power: held while what runs changes, or who uses it. Who wants both takes this one last.
        running: what runs; None if the guest is off. Others use it by `use` or `seized`.
    """

    def __init__(
        self,
        machines: Machines,
        *,
        settings: Settings,
        hints: Callable[[], Sequence[str]],
        on_resume: Callable[[], None] = lambda: None,
        on_restore: Callable[[str, BaseException], None] = lambda *_: None,
        fork: Callable[[Engine, int], Any] | None = None,
    ) -> None:
        self.name, self.image = machines.name, machines.blueprint.image
        self.spec = machines.blueprint.hardware
        self.stretch = machines.blueprint.stretch
        self.origin = "booted"
        self.facts: Mapping[str, object] = {}
        self.machines = machines
        self._settings, self._hints = settings, hints
        self._on_resume = on_resume
        self.on_restore, self.fork = on_restore, fork
        self.running: Running | None = None
        self.power = threading.RLock()
        self.orderly = threading.Lock()

    def __enter__(self) -> Self:
        with self.explained():
            self.power_on()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._switch_off(self.running)
        finally:
            self.machines.close()

    # -- who uses it ------------------------------------------------------------------------------

    @contextmanager
    def use(self, *, hold: bool = False) -> Iterator[Running]:
        """Use the guest. It is resumed first if need be, and not paused while this lasts.

        Args:
            hold: whether it must not be paused later either, until it is switched off. This is for
                programs that go on, and for ways in that others use.

        Raises:
            GuestLost: the guest is switched off, or does not resume.
        """
        with self.power:
            running = self._on()
            if rested := running.resting:
                running.resume()
            running.users += 1
            running.held |= hold
        try:
            if rested:
                self._on_resume()
            yield running
        finally:
            with self.power:
                running.users -= 1
                running.last_use = monotonic()

    @contextmanager
    def still(self, running: Running) -> Iterator[None]:
        """While this lasts, what runs is still the same, and nobody switches it off or on.

        Raises:
            GuestLost: it was switched off meanwhile.
        """
        with self.power:
            running.machine.check()
            yield

    @property
    def idle_seconds(self) -> float:
        """Seconds since the guest was last used; 0 if it must not be paused.

        It must not be paused while a call uses it, nor once it is held: by a program that was left
        running, a forwarded port, access by SSH, a QMP command or its console. It is held until it is
        switched off. One on a network is never paused.
        """
        running, cards = self.running, self.machines.cards  # others may talk to one with cards
        if running is None or running.resting or running.held or running.users or cards:
            return 0.0
        return monotonic() - running.last_use

    def rest(self) -> None:
        """Pause the guest until the next use, if it may be paused; see `idle_seconds`.

        Raises:
            GuestLost: it does not answer.
        """
        with self.power:
            if self.idle_seconds and self.running is not None:
                self.running.pause()

    @property
    def resting(self) -> bool:
        """Whether it is paused until the next use."""
        return self.running is not None and self.running.resting

    def _on(self) -> Running:
        """What runs. It may be paused."""
        if (running := self.running) is None:
            raise GuestLost(
                f"{self.name} is switched off", remedy="call vm.power_on() to switch it on"
            )
        return running

    # -- its state; this does not resume a paused guest ---------------------------------------------

    @property
    def is_on(self) -> bool:
        """Whether it is switched on."""
        return self.running is not None

    @property
    def loss(self) -> GuestLost | None:
        """Why the guest is gone; None if it is switched on, and has neither ended nor panicked."""
        try:
            self._on().machine.check()
        except GuestLost as lost:
            return lost
        return None

    def check_disks(self) -> None:
        """Check that this machine could read and write all that the guest has asked for, until now.

        Raises:
            GuestLost: it could not. The guest got an error then, and tests of it prove nothing.
        """
        if (error := self.machines.disk_failure(self.running)) is not None:
            raise error

    @property
    def pid(self) -> int:
        """The process id of its QEMU."""
        return self._on().machine.process.pid

    @property
    def processor_seconds(self) -> float:
        """CPU time of this host, in seconds, since it was switched on."""
        return host.processor_seconds(self.pid)

    @property
    def boot_seconds(self) -> float:
        """The timeout of a boot, scaled to what we know about this host's speed."""
        return self.stretch(self._settings.boot_timeout)

    @property
    def command_seconds(self) -> float:
        """The default timeout of a command, scaled likewise."""
        return self.stretch(self._settings.command_timeout)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Add hints to errors: where the artifacts are, and so on.

        If this machine's disk is the cause of an error, the error says so.
        """
        try:
            yield
        except GuestLost as error:
            add_hints(error, self._hints)
            raise
        except VMSandboxError as error:
            cause = self.machines.disk_failure(self.running)
            add_hints(cause or error, self._hints)
            if cause is not None:
                raise cause from error
            raise

    # -- programs ---------------------------------------------------------------------------------

    def start(self, command: Command) -> RemoteProcess:
        """Start a program. The caller reads and closes its streams. It holds the guest.

        If the guest's user is root, root becomes the program's user. If not, that user logs in.

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
            stdout: gets its output as it comes. The result has no output then.
            timeout: seconds; None for the default.
            idle: seconds without any input or output after which it is killed.

        Raises:
            CommandTimeout: it did not end in time. The error has its output so far.
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
                raise _late(late, running, bytes(written), bytes(said)) from late
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

        It has no timeout while data moves. `CommandTimeout` is raised when there was no input or output
        for as long as ``vm_command_timeout``.

        Returns:
            Its standard error.

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
        """Connect to a Unix socket in the guest. It holds the guest.

        Returns:
            The connection, like a program with streams; None if only a program in the guest can relay it.

        Raises:
            CommandError: nothing listens there.
        """
        with self.use(hold=True) as running:
            running.machine.check()
            return None if (helper := running.helper) is None else helper.connect(path)

    def ping(self) -> None:
        """Wait until the guest's helper answers.

        Raises:
            ConfigError: the guest has no helper.
        """
        with self.use() as running:
            running.machine.check()
            if (helper := running.helper) is None:
                raise ConfigError(
                    f"there is no helper in {self.name}",
                    remedy="use an image with the helper, such as debian-13",
                )
            helper.ping()

    def ssh_access(self) -> SSHAccess:
        """What an SSH client needs to log in. It holds the guest.

        Raises:
            GuestLost: the guest does not answer on SSH.
        """
        with self.use(hold=True) as running:
            return self.machines.ssh_access(running.machine, self.spec.user)

    # -- power ------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Switch on, with the disks as they are, and wait until the guest answers.

        Raises:
            ConfigError: it is already on.
            BootError: it did not boot.
        """
        with ExitStack() as stack:
            with self.power:
                if self.running is not None and self.running.machine.ended() is None:
                    raise ConfigError(
                        f"{self.name} is already on",
                        remedy="call vm.power_off() or vm.power_cut() first",
                    )
                self.machines.disk_failure(self.running)
                self._switch_off(self.running)
                self.running = self.machines.switch_on()
                running = stack.enter_context(self.use())
            if not self.machines.is_awaited:
                return
            try:  # QEMU's start has shown how fast this host is
                with capture.screen_if_it_fails(running.machine, self.machines.logs):
                    running.await_answer(Deadline(self.boot_seconds))
            except BaseException:
                self._switch_off(running)
                raise

    def reboot(self, deadline: Deadline) -> None:
        """Restart in an orderly way, and wait until the guest answers again.

        Raises:
            BootError: it did not come back.
        """
        with self.orderly, self.use() as running:
            machine = running.machine
            since, returns = len(machine.monitor.events()), running.restarts.returns

            def is_over() -> bool:
                return machine.monitor.wait_event("RESET", since=since, timeout=0) is not None

            lost = _ask(self, running, "reboot", is_over)
            while machine.monitor.wait_event("RESET", since=since, timeout=_POLL_SECONDS) is None:
                machine.check()
                if deadline.expired:
                    raise BootError(
                        f"{self.name} did not shut down to reboot within {deadline.seconds:g} s",
                        stage="init",
                        seconds=deadline.elapsed,
                        details=machine.console.tail(),
                        remedy="give it more time: vm.reboot(timeout=…)",
                    ) from lost
            if running.restarts.returns != returns:  # it restarted by itself, and is back already
                running.restarts.await_end()
                return
            machine.console.begin_boot()
            running.hang_up()
            running.await_answer(deadline)

    def power_off(self) -> None:
        """Shut down in an orderly way. A guest that is still on after the boot timeout is killed.

        Raises:
            CommandError: it refuses to shut down.
        """
        with self.orderly, self.use() as running:
            _ask(self, running, "poweroff")
            running.machine.end(self.boot_seconds)
        self.machines.disk_failure(running)
        self._switch_off(running)

    def power_cut(self) -> None:
        """Pull the plug. This does not wait for others who use the guest."""
        running = self._on()
        running.machine.kill()
        self.machines.disk_failure(running)
        self._switch_off(running)

    def _switch_off(self, running: Running | None) -> None:
        """End what runs, unless it has ended."""
        with self.power:
            if running is not None and running is self.running:
                self.running = None
                running.stack.close()

    # -- its state --------------------------------------------------------------------------------

    def save(self, meet: Meet = alone) -> Saved:
        """Save the guest's memory and disks, as `Machines.save`. It goes on afterwards.

        Raises:
            MonitorError: QEMU cannot do it.
            ConfigError: the guest has no helper.
        """
        # Not while the guest shuts down: nobody would answer in a state that was saved then.
        # Use it again under the lock: another thread may have rolled it back meanwhile.
        while True:
            with settled(self), self.power, self.use() as running:
                if (saved := _saved(self.machines, running, meet)) is not None:
                    return saved

    def roll_back(self, saved: Saved) -> None:
        """Go on from a saved state, even if the guest was lost or switched off.

        Raises:
            LaunchError: this host has no room for all of the guest's memory.
        """
        with self.power:
            self.machines.disk_failure(self.running)
            self._switch_off(self.running)
            self.machines.roll_back(saved)
            self.power_on()
            self._on().held = saved.held

    @property
    def has_helper(self) -> bool:
        """Whether the guest has a helper that answers now."""
        return self._on().helper is not None

    def save_devices(self, state: IO[bytes]) -> str:
        """Write the state of the devices to an open file, and end the guest. Its memory is a file.

        Connections to the guest are closed before. Returns what it had written to its console.

        Raises:
            MonitorError: QEMU cannot do it.
            GuestLost: this machine's disk was full, or failed.
        """
        with self.use() as running:
            running.hang_up()
            running.machine.save(state, with_memory=False)
            running.machine.check_disks()
            running.machine.end(0)
            return running.machine.console.saved


@contextmanager
def settled(engine: Engine) -> Iterator[Running]:
    """Use a guest that does not restart by itself now. Nobody makes it restart while this lasts.

    Raises:
        GuestLost: it is switched off, or has not come back from a restart.
    """
    while True:
        with engine.use() as running:  # what sets it up may need both locks
            running.restarts.await_end()
        with engine.orderly, engine.use() as running:
            if not running.restarts.is_awaited:
                yield running
                return


@contextmanager
def seized(engine: Engine, seconds: float) -> Iterator[Running | None]:
    """What runs, in whatever state it is; None if the guest is off. Nobody changes that while this lasts.

    A paused guest stays paused.

    Raises:
        CommandTimeout: others change it for longer than `seconds`.
    """
    with ExitStack() as stack:
        for lock in (engine.orderly, engine.power):
            if not lock.acquire(timeout=seconds):
                raise CommandTimeout(
                    f"{engine.name} is being switched on or off for longer than {seconds:g} s",
                    seconds=seconds,
                )
            stack.callback(lock.release)
        yield engine.running


def _saved(machines: Machines, running: Running, meet: Meet) -> Saved | None:
    """A guest's state; None if it has restarted by itself before its CPUs stopped."""
    has_met = False

    def meet_settled() -> None:
        nonlocal has_met
        if not has_met and running.restarts.is_awaited:
            raise GuestLost("the guest has restarted by itself while its state was to be saved")
        has_met = True  # the others count on it from now on
        meet()

    try:
        return machines.save(running, meet_settled)
    except GuestLost:
        running.machine.check()
        if has_met or not running.restarts.is_awaited:
            raise
        return None


def _late(late: CommandTimeout, running: Running, stdout: bytes, stderr: bytes) -> CommandTimeout:
    """The error of a program that did not end in time, with its output so far."""
    brief = late.brief
    remedy = "give it more time with timeout=, or all commands with vm_command_timeout (ini file)"
    if running.resident.is_away:  # the program may not even have started
        name = running.machine.spec.name
        brief = f"{name} did not answer within {late.seconds:g} s: a fault keeps it from answering"
        remedy = "end the fault before. For a fault that ends by itself, a longer timeout= may do"
    return CommandTimeout(brief, seconds=late.seconds, stdout=stdout, stderr=stderr, remedy=remedy)


def _ask(
    engine: Engine, running: Running, program: str, is_over: Callable[[], bool] = lambda: False
) -> GuestLost | None:
    """Ask a guest to shut down. The connection may break before the answer, or no answer may come.

    Args:
        is_over: whether the guest has shut down. Whatever it says after that is not of interest.

    Returns:
        The error of the broken connection; None if there was an answer, or none in time.

    Raises:
        CommandError: the guest cannot shut down.
    """
    command, deadline = Command(argv=(program,), user="root"), Deadline(engine.command_seconds)
    output, errors = bytearray(), bytearray()
    process: RemoteProcess | None = None
    status = 0
    try:
        process = running.start(command, engine.spec.user)
        while not is_over() and not deadline.expired:
            with suppress(CommandTimeout):
                process.wait(_ASK_SECONDS)
                status = process.communicate(None, output.extend, errors.extend, _POLL_SECONDS)
                break
        else:
            return None
    except GuestLost as lost:
        return lost
    finally:
        if process is not None:
            process.close()
    if status > 0:  # a signal may end the program: it is among the first that are killed
        result = CommandResult(
            argv=command.argv,
            returncode=status,
            stdout=bytes(output),
            stderr=bytes(errors),
            duration=deadline.elapsed,
        )
        check_status(text_of(result))
    return None
