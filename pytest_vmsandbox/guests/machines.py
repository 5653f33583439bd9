"""The machines of one guest, one after the other: it gets another one each time it is switched on."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_vmsandbox.core.deadline import Deadline, monotonic
from pytest_vmsandbox.core.errors import BootError, ConfigError, GuestLost, VMSandboxError
from pytest_vmsandbox.guests import resume
from pytest_vmsandbox.guests.access import KeyPair, SSHAccess, greeting
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.commands import Command
from pytest_vmsandbox.guests.helper import Helper
from pytest_vmsandbox.guests.process import RemoteProcess
from pytest_vmsandbox.machine.cmdline import Start
from pytest_vmsandbox.machine.disk import Disks, empty_overlay
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.ssh import SSHTransport

_SSH_PORT = 22
_CONNECT_SECONDS = 20.0
_ANSWER_SECONDS = 20.0
_QUIET_SECONDS = 0.5
_UNANNOUNCED_SECONDS = 0.5
_LOOK_SECONDS = 2.0
_PAUSE_SECONDS = 1.0  # after which a guest that does not answer is not paused


@dataclass(eq=False)
class Running:
    """A guest from when it is switched on until it is off: its machine, and the ways into it.

    Attributes:
        machine: the machine.
        blueprint: what the guest is made of.
        key: opens it.
        resident: its helper, which has to say itself whether it is there.
        stack: ends the machine.
        users: calls that are using it.
        held: whether something goes on in it that nobody waits for, so it must not be paused.
        resting: whether it is paused until somebody uses it.
        last_use: when somebody used it last.
        left: programs that go on also if whoever has started them forgets them.
    """

    machine: Machine
    blueprint: Blueprint
    key: KeyPair
    resident: Helper
    stack: ExitStack
    users: int = 0
    held: bool = False
    resting: bool = False
    last_use: float = field(default_factory=monotonic)
    left: list[RemoteProcess] = field(default_factory=list)
    _transports: dict[str, SSHTransport] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def helper(self) -> Helper | None:
        """The guest's helper, if it is there now."""
        return self.resident if self.resident.is_there else None

    def start(self, command: Command, user: str) -> RemoteProcess:
        """Start a program.

        Args:
            user: the guest's own, who runs it unless the command names somebody. Root becomes
                another user, anybody else logs in as them.
        """
        self.machine.check()
        login = user if user == "root" or command.user is None else command.user
        if command.user == login:
            command = replace(command, user=None)
        if (helper := self.helper) is not None:
            return helper.start(command, login)
        with self._lock:
            if login not in self._transports:
                self._transports[login] = self._transport(login)
            transport = self._transports[login]
        return transport.start(command)

    def _transport(self, login: str) -> SSHTransport:
        from pytest_vmsandbox.guests import ssh  # slow to import, and most guests have a helper

        return ssh.SSHTransport(
            address=lambda: self.machine.forward(_SSH_PORT),
            user=login,
            key=self.key,
            host_key=self.blueprint.built.host_key,
            check=self.machine.check,
            connect_timeout=self.blueprint.stretch(_CONNECT_SECONDS),
            quiet_seconds=self.resident.quiet_seconds,
        )

    def answers(self, timeout: float) -> bool:
        """Whether the guest can be talked to; waits at most `timeout` seconds."""
        if self.machine.spec.start.is_loaded and self.helper is not None:
            return True
        # A connection made before the guest's network is up waits for a retransmission, so the
        # console is asked first. An image that does not announce its server is just tried.
        announced = self.machine.reaches("ssh", timeout)
        if announced and self.helper is not None:
            return True
        try:
            address = self.machine.forward(_SSH_PORT)
        except VMSandboxError:
            return False  # the caller looks at why
        return greeting(address, timeout if announced else _UNANNOUNCED_SECONDS)

    def await_answer(self, deadline: Deadline) -> None:
        """Wait until the guest can be talked to.

        Raises:
            BootError: it cannot, or is gone.
        """
        machine = self.machine
        while not self.answers(deadline.remaining(_LOOK_SECONDS)):
            machine.check_booting(deadline.elapsed)
            if deadline.expired:
                raise BootError(
                    f"{machine.spec.name} did not answer on SSH within {deadline.seconds:g} s; "
                    f"it got as far as: {machine.stage}",
                    stage=machine.stage,
                    seconds=deadline.seconds,
                    details=f"--- last lines of the console\n{machine.console.tail()}",
                    remedy="allow more time: --vm-boot-timeout (pytest), --boot-timeout (vmsandbox)",
                )
            deadline.pause(0.05)

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
        self.left.clear()
        with self._lock:
            transports, self._transports = self._transports, {}
        for transport in transports.values():
            transport.close()
        self.resident.close()


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


@dataclass(eq=False)
class Machines:
    """Starts the machines of one guest, and saves what they are to go on from.

    Attributes:
        key: opens the guest.
        disks: its own.
        logs: the folder for its logs, or None.
        memory: the file that is its memory, if it becomes that of a template.
        state: what it goes on from when it is switched on next; its memory is in `memory`, if that is
            there, else in this file, too.
    """

    blueprint: Blueprint
    hypervisor: Hypervisor
    _: KW_ONLY
    name: str
    key: KeyPair
    disks: Disks
    logs: Path | None
    memory: IO[bytes] | None = None
    state: IO[bytes] | None = None
    _lead: float = 0.0  # of the clock in that state
    _ahead: Running | None = None  # a clone that is switched on already
    _own: ExitStack = field(default_factory=ExitStack)  # what snapshots have added, and files

    def close(self) -> None:
        """Let go of what snapshots, and users of SSH, have needed; the guest is off."""
        self._own.close()

    def switch_on(self) -> Running:
        """A machine that runs; its stack ends it."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return ahead
        if self.state is not None:
            start = Start.RESTORED if self.memory is None else Start.CONTINUED
        else:
            start = Start.POWER_ON if self.memory is None else Start.TO_BE_SAVED
        return self._started(start, self.memory)

    def clone(self, memory: IO[bytes], state: IO[bytes], check: Callable[[], None]) -> Running:
        """Switch on a clone ahead of demand: what `switch_on` returns the first time.

        Args:
            memory, state: of its template.
            check: called often while its helper is waited for; raises what ends the wait.
        """
        self.state = state
        self._ahead = self._started(Start.CLONED, memory, check)
        return self._ahead

    def _started(
        self, start: Start, memory: IO[bytes] | None, check: Callable[[], None] = lambda: None
    ) -> Running:
        state, self.state = self.state, None
        with ExitStack() as stack:
            machine = stack.enter_context(
                Machine.running(
                    self.hypervisor,
                    self.blueprint.machine(self.name, self.key.public, start),
                    disks=self.disks,
                    logs=self.logs,
                    memory=memory,
                    state=state,
                )
            )

            def check_all() -> None:
                machine.check()
                check()

            quiet = _QUIET_SECONDS * max(1.0, self.blueprint.verdict.time_scale / 4)
            helper = Helper(
                machine.helper,
                check=check_all,
                patience=self.blueprint.stretch(_ANSWER_SECONDS),
                quiet_seconds=quiet,
            )
            if state is not None:
                helper.lead = self._lead
                resume.from_state(machine, helper)
            running = Running(machine, self.blueprint, self.key, helper, stack.pop_all())
            running.stack.callback(running.hang_up)
            return running

    def save(self, running: Running) -> Saved:
        """The state of the guest now, its memory and its disks; it goes on afterwards.

        Raises:
            MonitorError: QEMU cannot.
            ConfigError: there is no helper in the guest.
        """
        machine = running.machine
        if (helper := running.helper) is None:
            raise ConfigError(
                f"{self.name} has no helper, so its clock could not be set right after a rollback",
                remedy="use an image that has one, such as debian-13",
            )
        resume.pause(machine, helper)  # it has taken all that was said so far
        try:
            frozen = self.disks.frozen(self._own)
            fresh = self._fresh_overlays()
            machine.put_on_top(fresh)
            self.disks = self.disks.on_top(frozen, fresh)
            state = self._own.enter_context(
                tempfile.TemporaryFile(dir=self.hypervisor.cache, buffering=0)  # noqa: SIM115
            )
            machine.save(state, with_memory=True)
        finally:
            resume.from_pause(machine, helper)
        return Saved(state=state, frozen=frozen, lead=helper.lead, held=running.held)

    def roll_back(self, saved: Saved) -> None:
        """Let the next machine go on from a saved state."""
        self.state, self._lead = saved.state, saved.lead
        self.disks = self.disks.on_top(saved.frozen, self._fresh_overlays())

    def _fresh_overlays(self) -> list[IO[bytes]]:
        folder = self.hypervisor.cache
        return [self._own.enter_context(empty_overlay(size, folder)) for size in self.disks.sizes]

    def ssh_access(self, machine: Machine, user: str) -> SSHAccess:
        """What an SSH client needs to get in as a user.

        Raises:
            GuestLost: the guest does not answer on SSH.
        """
        host, port = machine.forward(_SSH_PORT)
        check_network(machine, self.blueprint, machine.check)
        folder = self.hypervisor.folder
        known, key = folder / f"known_hosts.{self.name}", folder / f"key.{self.key.name}"
        self.key.save(key)
        self._own.callback(known.unlink, missing_ok=True)
        known.write_text(f"[{host}]:{port} {self.blueprint.built.host_key}\n", encoding="utf-8")
        return SSHAccess(host=host, port=port, user=user, key_file=key, known_hosts_file=known)


def check_network(machine: Machine, blueprint: Blueprint, check: Callable[[], None]) -> None:
    """See that the guest is reached through its network.

    Args:
        check: called often; raises what ends the wait.

    Raises:
        GuestLost: its SSH server does not greet.
    """
    address = machine.forward(_SSH_PORT)
    deadline = Deadline(blueprint.stretch(_CONNECT_SECONDS))
    while not greeting(address, deadline.remaining(_LOOK_SECONDS)):
        check()
        if deadline.expired:
            raise GuestLost(
                f"{machine.spec.name} is not reached through its network: its SSH server does not "
                f"greet within {deadline.seconds:g} s",
                stage="ssh",
            )
        deadline.pause(_LOOK_SECONDS / 10)
