"""A guest from when it is switched on until it is off: its machine, and the ways into it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_vmsandbox.core.deadline import Deadline, monotonic
from pytest_vmsandbox.core.errors import BootError, GuestLost, VMSandboxError
from pytest_vmsandbox.core.transport import Command
from pytest_vmsandbox.guests import resume
from pytest_vmsandbox.guests.access import greeting
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.helper import Helper
from pytest_vmsandbox.guests.keys import KeyPair
from pytest_vmsandbox.guests.process import RemoteProcess
from pytest_vmsandbox.machine.machine import Machine

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.ssh import SSHTransport

SSH_PORT = 22
_CONNECT_SECONDS = 20.0
_ANSWER_SECONDS = 20.0
_QUIET_SECONDS = 0.5
_UNANNOUNCED_SECONDS = 0.5
_LOOK_SECONDS = 2.0
_PAUSE_SECONDS = 1.0  # after which a guest that does not answer is not paused


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
        self,
        machine: Machine,
        helper: Helper,
        blueprint: Blueprint,
        key: KeyPair,
        stack: ExitStack,
    ) -> None:
        self.machine = machine
        self.users = 0
        self.held = False
        self.resting = False
        self.last_use = monotonic()
        self.stack = stack
        self._helper = helper
        self._blueprint = blueprint
        self._key = key
        self._transports: dict[str, SSHTransport] = {}
        self._left: list[RemoteProcess] = []
        self._lock = threading.Lock()
        stack.callback(self.hang_up)

    @property
    def helper(self) -> Helper | None:
        """The guest's helper, if it is there now."""
        return self._helper if self._helper.is_there else None

    def start(self, command: Command, user: str) -> RemoteProcess:
        """Start a program.

        Args:
            user: the guest's own, who runs it unless the command names somebody. Root becomes
                another user, anybody else logs in as them.
        """
        self.machine.check()
        login = user
        if command.user == user:
            command = replace(command, user=None)
        elif command.user is not None and user != "root":
            login, command = command.user, replace(command, user=None)
        if (helper := self.helper) is not None:
            return helper.start(command, login)
        with self._lock:
            if login not in self._transports:
                self._transports[login] = self._transport(login)
            transport = self._transports[login]
        return transport.start(command)

    def keep(self, process: RemoteProcess) -> None:
        """Let a program go on also if whoever has started it forgets it."""
        self._left.append(process)

    def _transport(self, login: str) -> SSHTransport:
        from pytest_vmsandbox.guests import ssh  # slow to import, and most guests have a helper

        return ssh.SSHTransport(
            lambda: ssh.Endpoint(
                address=self.machine.forward(SSH_PORT),
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
        announced = self.machine.reaches("ssh", timeout)
        if announced and self.helper is not None:
            return True
        try:
            address = self.machine.forward(SSH_PORT)
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
        self._left.clear()
        with self._lock:
            transports, self._transports = self._transports, {}
        for transport in transports.values():
            transport.close()
        self._helper.close()


def helper_of(machine: Machine, blueprint: Blueprint, check: Callable[[], None]) -> Helper:
    """The helper of a machine; whether it is there, it has to say itself.

    Args:
        check: called often; raises what ends a wait.
    """
    scale = blueprint.verdict.time_scale
    return Helper(
        machine.helper,
        check=check,
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
    address = machine.forward(SSH_PORT)
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
