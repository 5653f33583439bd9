"""The machines of one guest, one after the other: each time that it is switched on it gets another one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests import resume
from pytest_vmsandbox.guests.access import SSHAccess
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.keys import KeyPair
from pytest_vmsandbox.guests.running import SSH_PORT, Running, check_network, helper_of
from pytest_vmsandbox.machine.cmdline import Start
from pytest_vmsandbox.machine.disk import Disks, empty_overlay
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine


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


class Machines:
    """Starts the machines of one guest, and saves what they are to go on from.

    Args:
        key: opens the guest.
        disks: its own.
        logs: the folder for its logs, or None.
        memory: the file that is its memory, if it becomes that of a template.
        state: what it goes on from when it is switched on next; its memory is in `memory`, if that is
            there, else in this file, too.
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
    ) -> None:
        self.name = name
        self.blueprint = blueprint
        self._hypervisor = hypervisor
        self._key = key
        self._disks = disks
        self._logs = logs
        self._memory = memory
        self._state = state
        self._lead = 0.0  # of the clock in that state
        self._ahead: Running | None = None  # a clone that is switched on already
        self._own = ExitStack()  # what snapshots have added to the disks, and files

    def close(self) -> None:
        """Let go of what snapshots, and users of SSH, have needed; the guest is off."""
        self._own.close()

    def switch_on(self) -> Running:
        """A machine that runs; its stack ends it."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return ahead
        state, self._state = self._state, None
        if state is not None:
            start = Start.RESTORED if self._memory is None else Start.CONTINUED
        else:
            start = Start.POWER_ON if self._memory is None else Start.TO_BE_SAVED
        return self._started(start, self._memory, state)

    def clone(self, memory: IO[bytes], state: IO[bytes], check: Callable[[], None]) -> Running:
        """Switch on a clone ahead of demand: what `switch_on` returns the first time.

        Args:
            memory, state: of its template.
            check: called often while its helper is waited for; raises what ends the wait.
        """
        self._ahead = self._started(Start.CLONED, memory, state, check)
        return self._ahead

    def _started(
        self,
        start: Start,
        memory: IO[bytes] | None,
        state: IO[bytes] | None,
        check: Callable[[], None] = lambda: None,
    ) -> Running:
        with ExitStack() as stack:
            machine = stack.enter_context(
                Machine.running(
                    self._hypervisor,
                    self.blueprint.machine(self.name, self._key.public, start),
                    disks=self._disks,
                    logs=self._logs,
                    memory=memory,
                    state=state,
                )
            )

            def check_all() -> None:
                machine.check()
                check()

            helper = helper_of(machine, self.blueprint, check_all)
            if state is not None:
                helper.lead = self._lead
                resume.from_state(machine, helper)
            return Running(machine, helper, self.blueprint, self._key, stack.pop_all())

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
            frozen = self._disks.frozen(self._own)
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
        """Let the next machine go on from a saved state."""
        self._state, self._lead = saved.state, saved.lead
        self._disks = self._disks.on_top(saved.frozen, self._fresh_overlays())

    def _fresh_overlays(self) -> list[IO[bytes]]:
        folder = self._hypervisor.cache
        return [self._own.enter_context(empty_overlay(size, folder)) for size in self._disks.sizes]

    def ssh_access(self, machine: Machine, user: str) -> SSHAccess:
        """What an SSH client needs to get in as a user.

        Raises:
            GuestLost: the guest does not answer on SSH.
        """
        host, port = machine.forward(SSH_PORT)
        check_network(machine, self.blueprint)
        folder = self._hypervisor.folder
        known, key = folder / f"known_hosts.{self.name}", folder / f"key.{self._key.name}"
        self._key.save(key)
        self._own.callback(known.unlink, missing_ok=True)
        known.write_text(f"[{host}]:{port} {self.blueprint.built.host_key}\n", encoding="utf-8")
        return SSHAccess(host=host, port=port, user=user, key_file=key, known_hosts_file=known)
