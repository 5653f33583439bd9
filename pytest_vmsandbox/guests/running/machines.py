"""The machines of one guest. It gets a new one each time that it is switched on."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_vmsandbox.core.deadline import Deadline, monotonic
from pytest_vmsandbox.core.errors import BootError, ConfigError, GuestLost, VMSandboxError
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.reaching.access import KeyPair, SSHAccess, greeting
from pytest_vmsandbox.guests.reaching.commands import Command, ignore
from pytest_vmsandbox.guests.reaching.helper import Helper
from pytest_vmsandbox.guests.reaching.helper_setup import HelperSetup
from pytest_vmsandbox.guests.reaching.process import RemoteProcess
from pytest_vmsandbox.guests.reaching.ways_in import (
    CONNECT_SECONDS,
    LOOK_SECONDS,
    SSH_PORT,
    check_network,
    check_way_in,
)
from pytest_vmsandbox.guests.running import kernel_faults, resume
from pytest_vmsandbox.guests.running.ledger import Ledger
from pytest_vmsandbox.guests.running.restarts import Restarts
from pytest_vmsandbox.guests.running.saved import Saved
from pytest_vmsandbox.guests.running.together import Meet, alone
from pytest_vmsandbox.machine import capture
from pytest_vmsandbox.machine.cards import HasCard, connected
from pytest_vmsandbox.machine.cmdline import MODULES_DISK, PORTS, MachineSpec, Start, disk_names
from pytest_vmsandbox.machine.disk import Disks, PluggedDisk, empty_overlay
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.reaching.ssh import SSHTransport

_ANSWER_SECONDS = 20.0
_RESTART_SECONDS = 60.0  # until the helper is back
_QUIET_SECONDS = 0.5
_UNANNOUNCED_SECONDS = 0.5
_SET_HOSTNAME = 'hostname "$1" 2>/dev/null || echo "$1" >/proc/sys/kernel/hostname'
_PANICKED = "guest-panicked"  # QEMU's status
_PAUSE_SECONDS = 1.0  # a guest that does not answer within this time is not paused


@dataclass(eq=False)
class Running:
    """A guest while it is switched on: its machine, and the ways into it.

    Attributes:
        machine: the machine.
        blueprint: what the guest is made of.
        key: opens the guest.
        resident: its helper, which may not be there.
        stack: ends the machine.
        setup: how the guest gets its helper, if it has none of its own.
        users: the number of calls that use it.
        held: whether something goes on in it without a call, so it must not be paused.
        resting: whether it is paused until the next use.
        last_use: when it was last used.
        left: programs that go on even if their starters forget them.
        restarted: whether the guest has restarted since the machine was started.
        restarts: those that were not asked for here.
        answered: called when the guest answers after a start.
    """

    machine: Machine
    blueprint: Blueprint
    key: KeyPair
    resident: Helper
    stack: ExitStack
    setup: HelperSetup | None = None
    users: int = 0
    held: bool = False
    resting: bool = False
    last_use: float = field(default_factory=monotonic)
    left: list[RemoteProcess] = field(default_factory=list)
    restarted: bool = False
    answered: Callable[[], None] | None = None
    restarts: Restarts = field(init=False)
    _transports: dict[str, SSHTransport] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        seconds = self.blueprint.stretch(_RESTART_SECONDS)
        self.restarts = Restarts(self.machine, self.resident, self.setup, seconds, self._again)

    @property
    def helper(self) -> Helper | None:
        """The guest's helper, if it is there now."""
        return self.resident if self.resident.is_there else None

    def start(self, command: Command, user: str) -> RemoteProcess:
        """Start a program.

        Args:
            user: the guest's user, for commands that name none. If this is root, root becomes the
                command's user. If not, that user logs in.
        """
        self.machine.check()
        self.restarts.await_end()
        login = user if user == "root" or command.user is None else command.user
        if command.user == login:
            command = replace(command, user=None)
        if (helper := self.helper) is None:
            return self.start_by_ssh(command, login)
        if self.setup is not None:
            command = self.setup.in_environment(command, command.user or login)
        return helper.start(command, login)

    def _again(self) -> None:
        """Let a guest that has restarted by itself be as it was before."""
        self.restarted = True
        self._settle()

    def _settle(self) -> None:
        if self.blueprint.built.key is not None:
            self._introduce()
        if self.answered is not None:
            self.answered()

    def start_by_ssh(self, command: Command, login: str) -> RemoteProcess:
        """Start a program by SSH, even if the guest has a helper.

        Args:
            login: who logs in.
        """
        check_way_in(self.blueprint, self.machine.spec.name)
        with self._lock:
            if login not in self._transports:
                self._transports[login] = self._transport(login)
            transport = self._transports[login]
        return transport.start(command)

    def _transport(self, login: str) -> SSHTransport:
        from pytest_vmsandbox.guests.reaching import ssh  # slow to import, and rarely needed

        return ssh.SSHTransport(
            address=lambda: self.machine.forward(SSH_PORT),
            user=login,
            key=self.key,
            host_key=self.blueprint.built.host_key,
            check=self.machine.check,
            connect_timeout=self.blueprint.stretch(CONNECT_SECONDS),
            quiet_seconds=self.resident.quiet_seconds,
        )

    def answers(self, timeout: float) -> bool:
        """Whether the guest answers. Waits at most `timeout` seconds."""
        if self.machine.spec.start.is_loaded and self.helper is not None:
            return True
        if not self.blueprint.has_way_in:
            return self._is_ready(timeout)
        # Who connects before the network is up waits for a retransmission: look at the console first.
        goes_on = self.machine.spec.start.is_loaded and not self.restarted
        announced = not goes_on and self.machine.reaches("ssh", timeout)
        if announced and self.helper is not None:
            return True
        try:
            address = self.machine.forward(SSH_PORT)
        except VMSandboxError:
            return False  # the caller finds out why
        return greeting(address, timeout if announced else _UNANNOUNCED_SECONDS)

    def _is_ready(self, timeout: float) -> bool:
        """Whether the console shows that a system without any way in is up."""
        ready = self.blueprint.built.definition.login.ready
        try:
            self.machine.console.wait_for(ready, timeout, this_boot=True)
        except TimeoutError:
            return False
        return True

    def await_answer(self, deadline: Deadline) -> None:
        """Wait until the guest answers.

        Raises:
            BootError: it does not answer in time, or is gone.
        """
        machine = self.machine
        while not self.answers(deadline.remaining(LOOK_SECONDS)):
            kernel_faults.check_booting(machine, self.blueprint, deadline.elapsed)
            if deadline.expired:
                missing = "did not answer on SSH"
                if not self.blueprint.has_way_in:
                    ready = self.blueprint.built.definition.login.ready
                    missing = f"did not show {ready!r} on its console"
                raise BootError(
                    f"{machine.spec.name} {missing} within {deadline.seconds:g} s; "
                    f"it got as far as: {machine.stage}",
                    stage=machine.stage,
                    seconds=deadline.seconds,
                    details=f"--- last lines of the console\n{machine.console.tail()}",
                    remedy="give it more time: --vm-boot-timeout (pytest), --boot-timeout (vmsandbox)",
                )
            deadline.pause(0.05)
        self.restarts.note()
        if self.setup is not None and self.helper is None and self.blueprint.has_way_in:
            self.setup.give(self.resident, self.start_by_ssh, self.blueprint.stretch)
            self.leave_ssh()
        self.restarts.settle(self._settle)

    def _introduce(self) -> None:
        """Tell a guest its name after a boot, because no command line of a kernel does so."""
        spec = self.machine.spec
        if self.restarted or not spec.start.is_loaded:
            command = Command(
                argv=("/bin/sh", "-c", _SET_HOSTNAME, "sh", spec.hostname or spec.name)
            )
            process = self.start(command, "root")
            try:
                process.communicate(None, ignore, ignore, self.blueprint.stretch(_ANSWER_SECONDS))
            finally:
                process.close()

    def pause(self) -> None:
        """Pause the machine until the next use.

        Raises:
            GuestLost: it does not answer.
        """
        if (helper := self.helper) is not None:
            resume.pause(self.machine, helper, _PAUSE_SECONDS)
        else:
            self.machine.pause()
        self.resting = True

    def resume(self) -> None:
        """Resume the paused machine, with the right time or the time that a test has set."""
        if (helper := self.helper) is not None:
            resume.from_pause(self.machine, helper)
        else:
            self.machine.resume()
        self.resting = False

    def hang_up(self) -> None:
        """Forget all programs and connections, because the guest restarts or is switched off."""
        self.left.clear()
        self.restarted = True
        self.leave_ssh()
        self.resident.close()

    def leave_ssh(self) -> None:
        """Close all connections by SSH."""
        with self._lock:
            transports, self._transports = self._transports, {}
        for transport in transports.values():
            transport.close()


@dataclass(eq=False)
class Machines:
    """Starts the machines of one guest, and saves its state.

    Attributes:
        name: of the guest: unique among the guests of this process.
        key: opens the guest.
        disks: of the guest.
        logs: the folder for its logs, or None.
        memory: the file for its memory, if it becomes a template.
        state: the state that the next machine goes on from. The guest's memory is in `memory`, or
            without that in this file.
        setup: how the guest gets a helper over SSH after each boot; None if it gets none.
        console: what the guest had written to its console when `state` was saved.
        captures: whether its network is captured, into the folder for its logs.
        tpm: the files of its TPM before it was first switched on here: name → content.
        has_helper: whether the helper answered when `state` was saved.
        is_awaited: whether to wait for its answer after it was switched on.
        faults: of the guest, which outlive a machine.
        hostname: what the guest is called inside; empty for its name.
        plugged: devices in root ports, except for disks and cards: id → port. They are in no saved state.
        cards: network cards in root ports. Each new machine has them, too.
        on_answer: called when the guest answers after a start.
        forks: ends the guests that went on from this one.
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
    setup: HelperSetup | None = None
    console: str = ""
    captures: bool = False
    tpm: Mapping[str, bytes] = field(default_factory=dict)
    has_helper: bool = True
    is_awaited: bool = True
    faults: Ledger = field(init=False)
    plugged: dict[str, str] = field(default_factory=dict)
    hostname: str = ""
    cards: list[HasCard] = field(default_factory=list)
    on_answer: list[Callable[[], None]] = field(default_factory=list)
    forks: ExitStack = field(default_factory=ExitStack)
    _lead: Lead = field(default_factory=Lead)  # of the clock in that state
    _meet: Meet = alone  # before the CPUs run
    _ahead: Running | None = None  # a clone that is already switched on
    _disk_failure: GuestLost | None = None  # in one of the machines
    _own: ExitStack = field(default_factory=ExitStack)  # files of snapshots and for SSH

    def __post_init__(self) -> None:
        self.faults = Ledger(self.logs)

    def close(self) -> None:
        """End the forks, and close the files of snapshots and for SSH.

        The guest is off, and has no fault any more.
        """
        self.faults.is_closed = True
        try:
            self.forks.close()
        finally:
            self._own.close()

    def switch_on(self) -> Running:
        """A running machine. Its stack ends it."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return ahead
        if self.state is not None:
            start = Start.RESTORED if self.memory is None else Start.CONTINUED
        else:
            start = Start.POWER_ON if self.memory is None else Start.TO_BE_SAVED
        return self._started(start, self.memory)

    def clone(
        self,
        memory: IO[bytes],
        state: IO[bytes],
        check: Callable[[], None],
        lead: Lead = Lead(),  # noqa: B008
        meet: Meet = alone,
    ) -> Running:
        """Switch on a clone ahead of demand. The first call of `switch_on` returns it.

        Args:
            memory, state: of its template.
            check: called often while we wait for its helper. Its exception ends the wait.
            lead: by how much its clock must be ahead of this host's.
            meet: called right before its CPUs run.
        """
        self.go_on_from(state, lead, meet)
        self._ahead = self._started(Start.CLONED, memory, check)
        return self._ahead

    def _started(
        self,
        start: Start,
        memory: IO[bytes] | None,
        check: Callable[[], None] = lambda: None,
    ) -> Running:
        state, self.state = self.state, None
        before, self.console = self.console, ""
        with ExitStack() as stack, ExitStack() as ends:
            spec = replace(self.spec(start), cards=connected(self.cards, ends))
            machine = stack.enter_context(
                Machine.running(
                    self.hypervisor,
                    spec,
                    disks=self.disks,
                    logs=self.logs,
                    memory=memory,
                    state=state,
                    tpm_folder=self._tpm_folder if spec.tpm else None,
                    before=before,
                )
            )
            if self.captures and self.logs is not None:
                loop = self.hypervisor.loop
                stack.enter_context(capture.capturing(machine, loop, self.logs))

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
            machine.is_silent = helper.is_silent
            self.faults.switched_on(machine)  # a restored guest has them before it goes on
            if state is not None:
                helper.lead = self._lead
                self._go_on(machine, helper)
            running = Running(
                machine, self.blueprint, self.key, helper, stack.pop_all(), setup=self.setup
            )
            running.answered = self._answered
            running.stack.callback(running.hang_up)
            return running

    def _answered(self) -> None:
        self.faults.answered()
        for call in self.on_answer:
            call()

    def _go_on(self, machine: Machine, helper: Helper) -> None:
        """Let a machine go on from its state. One that has panicked stays as it is: it might restart."""
        if self.disks.recording is not None:
            return  # it goes on when it is told to
        if self.has_helper:
            resume.from_state(machine, helper, self._meet)
        elif machine.execute("query-status")["status"] != _PANICKED:
            self._meet()
            machine.resume()

    def spec(
        self, start: Start = Start.POWER_ON, blueprint: Blueprint | None = None
    ) -> MachineSpec:
        """What the next machine is started from.

        Args:
            blueprint: what the guest is made of then; None for what it is made of now.
        """
        made_of = blueprint or self.blueprint
        return made_of.machine(self.name, self.key.public, start, hostname=self.hostname)

    def disk_failure(self, running: Running | None) -> GuestLost | None:
        """The error if this host failed to use the guest's disks until now. Ask before it is off."""
        if self._disk_failure is None and running is not None:
            try:
                running.machine.check_disks()
            except GuestLost as error:
                self._disk_failure = error
        return self._disk_failure

    @cached_property
    def _tpm_folder(self) -> Path:
        """What the guest's TPM keeps without power.

        It is in the cache, usually below the user's home: there, Ubuntu's AppArmor lets swtpm write.
        """
        folder = self._own.enter_context(self.hypervisor.scratch("tpm"))
        for name, content in self.tpm.items():
            (folder / name).write_bytes(content)
        return folder

    def tpm_files(self) -> dict[str, bytes]:
        """The files of the guest's TPM as they are now; none without a TPM."""
        if "_tpm_folder" not in vars(self):
            return dict(self.tpm)
        files = sorted(self._tpm_folder.glob("[!.]*"))  # not its lock
        return {path.name: path.read_bytes() for path in files}

    def freeze_disks(self, machine: Machine | None) -> Disks:
        """The disks as they are now. What the guest writes from now on goes into files on top of them.

        Args:
            machine: the machine, which is paused; None if the guest is off.

        Raises:
            MonitorError: QEMU cannot do it.
        """
        frozen = self.disks.frozen(self._own)
        disks = frozen.on_top(self._fresh_overlay)
        if machine is not None:
            machine.drives.put_on_top(disks.tops())
        self.disks = disks
        return frozen

    def go_on_from(self, state: IO[bytes], lead: Lead, meet: Meet = alone) -> None:
        """Let the next machine go on from a saved state. `meet` is called right before its CPUs run."""
        self.state, self._lead, self._meet = state, lead, meet

    def save(self, running: Running, meet: Meet = alone) -> Saved:
        """Save the guest's memory and disks. It goes on afterwards.

        Args:
            meet: called right before its CPUs stop, and right before they run again.

        Raises:
            MonitorError: QEMU cannot do it.
            ConfigError: the guest has no helper.
        """
        machine = running.machine
        if unsaved := self.unsaved:
            raise ConfigError(
                f"the state of {self.name} cannot be saved: {unsaved}",
                remedy="end that fault before"
                if self.plugged
                else "use a newer QEMU, or boot fresh guests instead",
            )
        if (helper := running.helper) is None:
            why = None if self.setup is None else self.setup.failure
            raise ConfigError(
                f"the state of {self.name} cannot be saved: without a helper in the guest, its clock would be "
                "wrong when it goes on from there",
                details="" if why is None else why.brief,
                remedy="use an image that has the helper, such as debian-13",
            )
        faults = self.faults.in_force
        resume.pause(machine, helper, meet=meet)  # the helper has read everything so far
        try:
            frozen = self.freeze_disks(machine)
            state = self.unnamed_file()
            machine.save(state, with_memory=True)
            console = machine.console.saved
        finally:
            resume.from_pause(machine, helper, meet)
        return Saved(state, frozen, helper.lead, running.held, console, self.blueprint, faults)

    def roll_back(self, saved: Saved) -> None:
        """Let the next machine go on from a saved state."""
        self.go_on_from(saved.state, saved.lead)
        self.console, self.blueprint = saved.console, saved.blueprint
        for disk in self.disks.plugged:
            disk.close()  # unless the snapshot has its files
        self.disks = saved.disks.on_top(self._fresh_overlay)

    def unnamed_file(self) -> IO[bytes]:
        """A new file in the cache, without a name. It is closed when the guest is removed."""
        return self._own.enter_context(
            tempfile.TemporaryFile(dir=self.hypervisor.cache, buffering=0)
        )

    def _fresh_overlay(self, size: int) -> IO[bytes]:
        return self._own.enter_context(empty_overlay(size, self.hypervisor.cache))

    @property
    def unsaved(self) -> str:
        """Why the guest's state cannot be saved; empty if it can."""
        names = " and ".join(self.plugged)
        if names:
            return f"{names} is plugged in for a fault, and cannot be part of a saved state"
        return self.blueprint.unsaved

    @property
    def takes_disks(self) -> bool:
        """Whether a disk can be attached while the guest runs."""
        return self.blueprint.architecture.hot_plug != "none"

    def free_port(self, what: str) -> str:
        """A free root port.

        Args:
            what: that needs it, for the error.

        Raises:
            ConfigError: there is none.
        """
        taken = {port: name for name, port in self.plugged.items()}
        taken |= {disk.port: f"the disk {disk.name}" for disk in self.disks.plugged}
        taken |= {it.card.port: f"a card on {it.card.network}" for it in self.cards}
        for port in PORTS:
            if port not in taken:
                return port
        first = "detach a disk first: vm.detach(), or use" if self.disks.plugged else "use"
        raise ConfigError(
            f"{self.name} has no free port for {what}: {', '.join(sorted(taken.values()))} are in its {len(PORTS)}",
            remedy=f"{first} fewer networks. For disks that are always there, use disks=['1GiB']",
        )

    def disk_names(self) -> list[str]:
        """The names that disks of the guest have or may get."""
        fixed = disk_names(self.blueprint.hardware, has_base=self.disks.base is not None)
        return [*fixed, MODULES_DISK, *(disk.name for disk in self.disks.plugged)]

    def add(self, disk: PluggedDisk) -> None:
        """Note that a disk was attached. The next machines have it, too."""
        self._own.callback(disk.close)
        self.disks = replace(self.disks, plugged=(*self.disks.plugged, disk))

    def remove(self, disk: PluggedDisk) -> None:
        """Note that a disk was detached. Its content is gone, unless a snapshot has it."""
        rest = tuple(other for other in self.disks.plugged if other.name != disk.name)
        self.disks = replace(self.disks, plugged=rest)
        disk.close()

    def ssh_access(self, machine: Machine, user: str) -> SSHAccess:
        """What an SSH client needs to log in as a user.

        Raises:
            GuestLost: the guest does not answer on SSH.
        """
        check_way_in(self.blueprint, machine.spec.name)
        host, port = machine.forward(SSH_PORT)
        check_network(machine, self.blueprint, machine.check)
        folder = self.hypervisor.folder
        known, key = folder / f"known_hosts.{self.name}", folder / f"key.{self.key.name}"
        self.key.save(key)
        self._own.callback(known.unlink, missing_ok=True)
        known.write_text(f"[{host}]:{port} {self.blueprint.built.host_key}\n", encoding="utf-8")
        return SSHAccess(host=host, port=port, user=user, key_file=key, known_hosts_file=known)
