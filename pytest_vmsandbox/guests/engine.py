"""What a guest runs on: its machine, its power, and the ways into it.

`Engine.use` is the only way to the machine of others than the engine itself. It counts its users, so
`Engine.rest` pauses a guest only while nobody uses it.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from pytest_vmsandbox.core.deadline import Deadline, monotonic
from pytest_vmsandbox.core.errors import (
    BootError,
    CommandTimeout,
    ConfigError,
    GuestLost,
    VMSandboxError,
    add_hints,
)
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.transport import Command, CommandResult, RemoteProcess, Transport
from pytest_vmsandbox.guests import commands, resume
from pytest_vmsandbox.guests.access import SSHAccess, greeting
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.helper import Helper, HelperTransport
from pytest_vmsandbox.guests.keys import KeyPair
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.cmdline import Start
from pytest_vmsandbox.machine.disk import Disks, empty_overlay
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine

_SSH_PORT = 22
_CONNECT_SECONDS = 20.0
_ANSWER_SECONDS = 20.0
_QUIET_SECONDS = 0.5
_UNANNOUNCED_SECONDS = 0.5
_LOOK_SECONDS = 2.0
_PAUSE_SECONDS = 1.0  # after which a guest that does not answer is not paused
_POLL_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The state of a guest, memory included, and its disks at that moment.

    Attributes:
        state: a file.
        frozen: what each disk had by then, lowest file first.
        lead: by how many seconds its clock was set ahead of this host's.
        held: whether something went on in it that must not be paused.
    """

    state: IO[bytes]
    frozen: tuple[tuple[IO[bytes], ...], ...]
    lead: float
    held: bool


class Running:
    """A machine that is switched on, and the ways into it.

    Attributes:
        machine: the machine.
        users: calls that are using it.
        held: whether something goes on in it that nobody waits for, so it must not be paused.
        resting: whether it is paused until somebody uses it.
        last_use: when somebody used it last.
        stack: ends the machine.
    """

    def __init__(
        self, machine: Machine, helper: Helper, blueprint: Blueprint, key: KeyPair
    ) -> None:
        self.machine = machine
        self.users = 0
        self.held = False
        self.resting = False
        self.last_use = monotonic()
        self.stack = ExitStack()
        self._helper = helper
        self._blueprint = blueprint
        self._key = key
        self._transports: dict[str, Transport] = {}
        self._left: list[RemoteProcess] = []
        self._lock = threading.Lock()

    @property
    def helper(self) -> Helper | None:
        """The guest's helper, if it is there now."""
        return self._helper if self._helper.is_there else None

    def start(self, command: Command, login: str) -> RemoteProcess:
        """Start a program; `login` runs it unless the command names somebody."""
        self.machine.check()
        with self._lock:
            if login not in self._transports:
                self._transports[login] = self._transport(login)
            transport = self._transports[login]
        return transport.start(command)

    def keep(self, process: RemoteProcess) -> None:
        """Let a program go on also if whoever has started it forgets it."""
        self._left.append(process)

    def _transport(self, login: str) -> Transport:
        if (helper := self.helper) is not None:
            return HelperTransport(helper, login)
        from pytest_vmsandbox.guests import ssh  # slow to import, and most guests have a helper

        return ssh.SSHTransport(
            lambda: ssh.Endpoint(
                address=self.machine.forward(_SSH_PORT),
                user=login,
                key=self._key,
                host_key=self._blueprint.built.host_key,
            ),
            check=self.machine.check,
            connect_timeout=self._blueprint.stretch(_CONNECT_SECONDS),
            time_scale=self._blueprint.verdict.time_scale,
        )

    def answers(self, timeout: float) -> bool:
        """Whether the guest can be talked to; waits at most `timeout` seconds."""
        if self.machine.spec.start.is_loaded and self.helper is not None:
            return True
        # A connection made before the guest's network is up waits for a retransmission, so the
        # console is asked first. An image that does not announce its server is just tried.
        announced = self.machine.wait_for_ssh(timeout)
        if announced and self.helper is not None:
            return True
        try:
            address = self.machine.forward(_SSH_PORT)
        except VMSandboxError:
            return False  # the caller looks at why
        return greeting(address, timeout if announced else _UNANNOUNCED_SECONDS)

    def pause(self) -> None:
        """Pause the machine until somebody uses it.

        Raises:
            GuestLost: it does not answer.
        """
        if (helper := self.helper) is not None:
            resume.pause(self.machine, helper, _PAUSE_SECONDS)
        else:
            self.machine.pause()
        self.resting = True

    def resume(self) -> None:
        """Let the paused machine go on, with the right time, or the one that was set there."""
        if (helper := self.helper) is not None:
            resume.from_pause(self.machine, helper)
        else:
            self.machine.resume()
        self.resting = False

    def hang_up(self) -> None:
        """The guest restarts, or is switched off: what was known of its programs is void."""
        self._left.clear()
        with self._lock:
            transports, self._transports = self._transports, {}
        for transport in transports.values():
            transport.close()
        self._helper.close()


class Engine:
    """The machine of one guest, and what is done to it from here.

    A context manager: the guest is switched on, and gone at the end. All methods may be called from
    any thread. What raises `GuestLost` does so when the guest is gone, or switched off.

    Args:
        key: opens the guest.
        disks: its own.
        logs: the folder for its logs, or None.
        settings: have the limits on a boot and on a command.
        hints: lines for its errors: where the artifacts are, and so on.
        on_resume: called when it goes on after a rest.
        memory: the file that is its memory, if it becomes a template.
        state: what it goes on from when it is switched on next; its memory is in `memory`, if that is
            there, else in this file, too.
        running: a machine that runs already, for the first time that it is switched on.
        origin: how it came to be: ``armed`` (cloned ahead of demand), ``cloned`` (on demand) or
            ``booted``.

    Attributes:
        spec: the guest's hardware.
        facts: what the last layer of its preparation has told, as values that JSON keeps; empty for
            layers that users have made.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        hypervisor: Hypervisor,
        *,
        name: str,
        key: KeyPair,
        disks: Disks,
        logs: Path | None,
        settings: Settings,
        hints: Callable[[], Sequence[str]],
        on_resume: Callable[[], None] = lambda: None,
        memory: IO[bytes] | None = None,
        state: IO[bytes] | None = None,
        running: resume.RunningMachine | None = None,
        origin: str = "booted",
    ) -> None:
        self.name = name
        self.image = blueprint.image
        self.spec = blueprint.hardware
        self.origin = origin
        self.facts: Mapping[str, object] = {}
        self.stretch = blueprint.stretch
        self._blueprint = blueprint
        self._hypervisor = hypervisor
        self._key = key
        self._disks = disks
        self._logs = logs
        self._settings = settings
        self._hints = hints
        self._on_resume = on_resume
        self._memory = memory
        self._state = state
        self._lead = 0.0  # of the clock in that state
        self._given = running
        self._running: Running | None = None
        self._lock = threading.RLock()  # of what runs, and who uses it
        self._own = ExitStack()  # what snapshots have added to the disks, and files

    def __enter__(self) -> Self:
        with self.explained():
            self.power_on()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._own:
            self._switch_off(self._running)

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
            process = self._start(running, command)
            running.keep(process)
            return process

    def stream(
        self,
        command: Command,
        *,
        stdin: IO[bytes] | None = None,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        timeout: float | None = None,
        idle: float = math.inf,
    ) -> int:
        """Run a program to its end, with its streams passed on as they come.

        Args:
            timeout: seconds; None for the setting.
            idle: seconds in which nothing goes either way.

        Returns:
            Its exit status.
        """
        with self.use() as running:
            process = self._start(running, command)
            try:
                return process.communicate(
                    stdin,  # type: ignore[arg-type]
                    stdout,
                    stderr,
                    self.command_seconds if timeout is None else timeout,
                    idle,
                )
            finally:
                process.close()

    def run(
        self,
        command: Command,
        *,
        stdin: IO[bytes] | None = None,
        stdout: Callable[[bytes], object] | None = None,
        timeout: float | None = None,
        idle: float = math.inf,
    ) -> CommandResult[bytes]:
        """Run a program to its end; the arguments are those of `stream`.

        Args:
            stdout: takes its output, which is missing in the result then.

        Raises:
            CommandTimeout: it did not end in time; with what it had written.
        """
        written, said = bytearray(), bytearray()
        started = monotonic()
        try:
            status = self.stream(
                command,
                stdin=stdin,
                stdout=stdout or written.extend,
                stderr=said.extend,
                timeout=timeout,
                idle=idle,
            )
        except CommandTimeout as late:
            raise CommandTimeout(
                late.brief,
                seconds=late.seconds,
                stdout=bytes(written),
                stderr=bytes(said),
                remedy="give it more with timeout=…, or vm_command_timeout for all",
            ) from late
        return CommandResult(
            argv=command.argv,
            returncode=status,
            stdout=bytes(written),
            stderr=bytes(said),
            duration=monotonic() - started,
        )

    def stream_script(
        self,
        script: str,
        *,
        stdin: IO[bytes] | None = None,
        stdout: Callable[[bytes], object] | None = None,
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
            result = commands.text_of(
                self.run(
                    command, stdin=stdin, stdout=stdout, timeout=math.inf, idle=self.command_seconds
                )
            )
            commands.check(result)
            return result.stderr

    def _start(self, running: Running, command: Command) -> RemoteProcess:
        login = self.spec.user
        if command.user == login:
            command = replace(command, user=None)
        elif command.user is not None and login != "root":
            login, command = command.user, replace(command, user=None)
        return running.start(command, login)

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
        with self.explained(), self.use() as running:
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
            address, port = running.machine.forward(_SSH_PORT)
            check_network(running.machine, self._blueprint)
        folder = self._hypervisor.folder
        known, key = folder / f"known_hosts.{self.name}", folder / f"key.{self._key.name}"
        self._key.save(key)
        self._own.callback(known.unlink, missing_ok=True)
        known.write_text(f"[{address}]:{port} {self._blueprint.built.host_key}\n", encoding="utf-8")
        return SSHAccess(
            host=address, port=port, user=self.spec.user, key_file=key, known_hosts_file=known
        )

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
                self._running = self._switched_on()
                running = stack.enter_context(self.use())
            try:  # QEMU's start has shown how slow this host is
                self._await_answer(running, Deadline(self.boot_seconds))
            except BaseException:
                self._switch_off(running)
                raise

    def _switched_on(self) -> Running:
        with ExitStack() as stack:
            machine, helper = self._machine(stack)
            running = Running(machine, helper, self._blueprint, self._key)
            stack.callback(running.hang_up)
            running.stack = stack.pop_all()
            return running

    def _machine(self, stack: ExitStack) -> tuple[Machine, Helper]:
        """A machine and its helper, freshly switched on; `stack` ends it."""
        if self._given is not None:
            given, self._given = self._given, None
            stack.enter_context(given)
            return given.machine, given.helper
        state, self._state = self._state, None
        if state is not None:
            start = Start.RESTORED if self._memory is None else Start.CONTINUED
        else:
            start = Start.POWER_ON if self._memory is None else Start.TO_BE_SAVED
        spec = self._blueprint.machine(self.name, self._key.public, start)
        machine = stack.enter_context(
            self._blueprint.running(
                self._hypervisor,
                spec,
                disks=self._disks,
                logs=self._logs,
                memory=self._memory,
                state=state,
            )
        )
        helper = helper_of(machine, self._blueprint)
        if state is not None:
            helper.lead = self._lead
            resume.from_state(machine, helper)
        return machine, helper

    def _await_answer(self, running: Running, deadline: Deadline) -> None:
        machine = running.machine
        while not running.answers(deadline.remaining(_LOOK_SECONDS)):
            try:
                machine.check()
                machine.check_booting()
            except GuestLost as lost:
                raise machine.boot_error(lost, deadline.elapsed) from lost
            if deadline.expired:
                raise BootError(
                    f"{self.name} did not answer on SSH within {deadline.seconds:g} s; "
                    f"it got as far as: {machine.stage}",
                    stage=machine.stage,
                    seconds=deadline.seconds,
                    details=f"--- last lines of the console\n{machine.console.tail()}",
                    remedy="allow more time: --vm-boot-timeout (pytest), --boot-timeout (vmsandbox)",
                )
            deadline.pause(0.05)

    def reboot(self, deadline: Deadline) -> None:
        """Restart in an orderly way, and wait until the guest answers again.

        Raises:
            BootError: it did not come back.
        """
        with self.use() as running:
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
            self._await_answer(running, deadline)

    def power_off(self) -> None:
        """Switch off in an orderly way. A guest that is not off after the boot time-out is ended.

        Raises:
            CommandError: it refuses to go down.
        """
        with self.use() as running:
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
            commands.check(commands.text_of(result))
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
        with self.use() as running, self._lock:
            machine = running.machine
            if (helper := running.helper) is None:
                raise ConfigError(
                    f"{self.name} has no helper, so its clock could not be set right after a rollback",
                    remedy="use an image that has one, such as debian-13",
                )
            resume.pause(machine, helper)  # it has taken all that was said so far
            try:
                frozen = self._disks.frozen
                for file in (file for files in frozen for file in files):
                    self._own.callback(file.close)
                fresh = self._fresh_overlays()
                machine.put_on_top(fresh)
                self._disks = self._disks.on_top(frozen, fresh)
                state = self._own.enter_context(
                    tempfile.TemporaryFile(dir=self._hypervisor.cache, buffering=0)  # noqa: SIM115
                )
                machine.save(state, with_memory=True)
            finally:
                resume.from_pause(machine, helper)
            return Saved(state=state, frozen=frozen, lead=helper.lead, held=running.held)

    def roll_back(self, saved: Saved) -> None:
        """Go on from a saved state, also if the guest was lost or switched off.

        Raises:
            LaunchError: this host has no room for all of the guest's memory.
        """
        with self._lock:
            self._switch_off(self._running)
            self._state, self._lead = saved.state, saved.lead
            self._disks = self._disks.on_top(saved.frozen, self._fresh_overlays())
            self.power_on()
            self._on().held = saved.held

    def _fresh_overlays(self) -> list[IO[bytes]]:
        folder = self._hypervisor.cache
        return [self._own.enter_context(empty_overlay(size, folder)) for size in self._disks.sizes]

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


def helper_of(
    machine: Machine, blueprint: Blueprint, check: Callable[[], None] | None = None
) -> Helper:
    """The helper of a machine; whether it is there, it has to say itself.

    Args:
        check: see `Helper`; default: the machine's own.
    """
    scale = blueprint.verdict.time_scale
    return Helper(
        machine.helper,
        check=check or machine.check,
        patience=blueprint.stretch(_ANSWER_SECONDS),
        quiet_seconds=max(_QUIET_SECONDS, _QUIET_SECONDS * scale / 4),
    )


def check_network(
    machine: Machine, blueprint: Blueprint, check: Callable[[], None] | None = None
) -> None:
    """See that the guest is reached through its network.

    Args:
        check: called often; raises what ends the wait. Default: the machine's own.

    Raises:
        GuestLost: its SSH server does not greet.
    """
    address = machine.forward(_SSH_PORT)
    deadline = Deadline(blueprint.stretch(_CONNECT_SECONDS))
    while not greeting(address, deadline.remaining(_LOOK_SECONDS)):
        (check or machine.check)()
        if deadline.expired:
            raise GuestLost(
                f"{machine.spec.name} is not reached through its network: its SSH server does not "
                f"greet within {deadline.seconds:g} s",
                stage="ssh",
            )
        deadline.pause(_LOOK_SECONDS / 10)
