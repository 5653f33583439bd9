"""What one guest stands on: its machine, switched on or woken up, and the ways into it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import ConfigError, GuestLost, VMSandboxError
from pytest_vmsandbox.core.transport import RemoteProcess, Transport
from pytest_vmsandbox.guests import resume
from pytest_vmsandbox.guests.access import SSHAccess, greeting
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.helper import Helper, HelperTransport
from pytest_vmsandbox.guests.keys import KeyPair
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


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The state of a guest, memory included, and its disks at that moment.

    Attributes:
        state: a file.
        frozen: what each disk had by then, lowest file first.
        lead: by how many seconds its clock was set ahead of this host's.
    """

    state: IO[bytes]
    frozen: tuple[tuple[IO[bytes], ...], ...]
    lead: float


class GuestPlatform:
    """What one guest stands on; see `Platform`.

    Args:
        key: opens it.
        disks: its own.
        logs: the folder for its logs, or None.
        memory: the file that is its memory, if it becomes that of a template.
        state: what it goes on from when it is switched on next; its memory is in `memory`, if that is
            there, else in this file, too.
        running: a machine that runs already, for the first time that it is switched on.
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
        memory: IO[bytes] | None = None,
        state: IO[bytes] | None = None,
        running: resume.RunningMachine | None = None,
    ) -> None:
        self.blueprint = blueprint
        self._hypervisor = hypervisor
        self._name = name
        self._key = key
        self._disks = disks
        self._logs = logs
        self._memory = memory
        self._state = state
        self._lead = 0.0  # of the clock in that state
        self._running_machine = running
        self._helper: Helper | None = None
        self._own = ExitStack()  # what snapshots have added to the disks, and files

    @contextmanager
    def machine(self) -> Iterator[Machine]:
        """See `Platform.machine`."""
        running, self._running_machine = self._running_machine, None
        if running is not None:
            self._helper = running.helper
            with running:
                yield running.machine
            return
        state, self._state = self._state, None
        if state is not None:
            start = Start.RESTORED if self._memory is None else Start.CONTINUED
        else:
            start = Start.POWER_ON if self._memory is None else Start.TO_BE_SAVED
        spec = self.blueprint.machine(self._name, self._key.public, start)
        with self.blueprint.running(
            self._hypervisor,
            spec,
            disks=self._disks,
            logs=self._logs,
            memory=self._memory,
            state=state,
        ) as machine:
            self._helper = helper_of(machine, self.blueprint)
            if state is not None:
                self._helper.lead = self._lead
                resume.from_state(machine, self._helper)
            yield machine

    @property
    def has_helper(self) -> bool:
        """Whether the guest has a helper that is there now."""
        return self._present is not None

    @property
    def _present(self) -> Helper | None:
        """The helper, if it is there now."""
        return self._helper if self._helper is not None and self._helper.is_there else None

    def connect(self, path: str) -> RemoteProcess | None:
        """See `Platform.connect`."""
        return None if (helper := self._present) is None else helper.connect(path)

    def transport(self, machine: Machine, user: str) -> Transport:
        """See `Platform.transport`."""
        if (helper := self._present) is not None:
            return HelperTransport(helper, user)
        from pytest_vmsandbox.guests import ssh  # slow to import, and most guests have a helper

        return ssh.SSHTransport(
            lambda: ssh.Endpoint(
                address=machine.forward(_SSH_PORT),
                user=user,
                key=self._key,
                host_key=self.blueprint.built.host_key,
            ),
            check=machine.check,
            connect_timeout=self.blueprint.stretch(_CONNECT_SECONDS),
            time_scale=self.blueprint.verdict.time_scale,
        )

    def answers(self, machine: Machine, timeout: float) -> bool:
        """See `Platform.answers`."""
        if machine.spec.start.is_loaded and self.has_helper:
            return True
        # A connection made before the guest's network is up waits for a retransmission, so the
        # console is asked first. An image that does not announce its server is just tried.
        announced = machine.wait_for_ssh(timeout)
        if announced and self.has_helper:
            return True
        try:
            address = machine.forward(_SSH_PORT)
        except VMSandboxError:
            return False  # the caller looks at why
        return greeting(address, timeout if announced else _UNANNOUNCED_SECONDS)

    def save(self, machine: Machine) -> Saved:
        """See `Platform.save`."""
        if (helper := self._present) is None:
            raise ConfigError(
                f"{self._name} has no helper, so its clock could not be set right after a rollback",
                remedy="use an image that has one, such as debian-13",
            )
        resume.pause(machine, helper)  # it has taken all that was said so far
        try:
            frozen = self._disks.frozen
            for file in (it for files in frozen for it in files):
                self._own.callback(file.close)
            fresh = self._fresh_overlays()
            machine.put_on_top(fresh)
            self._disks = self._disks.on_top(frozen, fresh)
            state = self._own.enter_context(
                tempfile.TemporaryFile(dir=self._hypervisor.cache, buffering=0)  # noqa: SIM115
            )
            machine.save(state, with_memory=True)
        finally:
            self.resume(machine)
        return Saved(state=state, frozen=frozen, lead=helper.lead)

    def roll_back(self, saved: Saved) -> None:
        """See `Platform.roll_back`."""
        self._state, self._lead = saved.state, saved.lead
        self._disks = self._disks.on_top(saved.frozen, self._fresh_overlays())

    def _fresh_overlays(self) -> list[IO[bytes]]:
        folder = self._hypervisor.cache
        return [self._own.enter_context(empty_overlay(size, folder)) for size in self._disks.sizes]

    def pause(self, machine: Machine) -> None:
        """See `Platform.pause`."""
        if (helper := self._present) is not None:
            resume.pause(machine, helper, _PAUSE_SECONDS)
        else:
            machine.pause()

    def resume(self, machine: Machine) -> None:
        """See `Platform.resume`."""
        if (helper := self._present) is not None:
            resume.from_pause(machine, helper)
        else:
            machine.resume()

    def ping(self) -> None:
        """See `Platform.ping`."""
        if (helper := self._present) is None:
            raise ConfigError(f"{self._name} has no helper")
        helper.ping()

    def close(self) -> None:
        """See `Platform.close`."""
        self._own.close()

    def going_down(self) -> None:
        """See `Platform.going_down`."""
        if self._helper is not None:
            self._helper.close()

    def ssh_access(self, machine: Machine, user: str) -> SSHAccess:
        """See `Platform.ssh_access`."""
        host, port = machine.forward(_SSH_PORT)
        check_network(machine, self.blueprint)
        folder = self._hypervisor.folder
        known, key = folder / f"known_hosts.{self._name}", folder / f"key.{self._key.name}"
        self._key.save(key)
        self._own.callback(known.unlink, missing_ok=True)
        known.write_text(f"[{host}]:{port} {self.blueprint.built.host_key}\n", encoding="utf-8")
        return SSHAccess(host=host, port=port, user=user, key_file=key, known_hosts_file=known)


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
