"""Is there a way into a guest? May somebody log in, and does its network work?"""

from __future__ import annotations

from collections.abc import Callable

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import ConfigError, GuestLost
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.reaching.access import greeting
from pytest_vmsandbox.machine.machine import Machine

SSH_PORT = 22
CONNECT_SECONDS = 20.0
LOOK_SECONDS = 2.0


def check_way_in(blueprint: Blueprint, name: str) -> None:
    """Check that programs can be started in a guest.

    Raises:
        ConfigError: nobody can log in.
    """
    if not blueprint.has_way_in:
        raise ConfigError(
            f"nothing can be run in {name}: there is no way into {blueprint.image} (login.method is "
            "'none')",
            remedy="drive it by its console and by QEMU: vm.console.wait_for(…), vm.console.text, "
            "vm.qmp(…), vm.power_cut(), vm.power_on()",
        )


def check_network(machine: Machine, blueprint: Blueprint, check: Callable[[], None]) -> None:
    """Check that we can reach the guest through its network.

    Args:
        check: called often. Its exception ends the wait.

    Raises:
        GuestLost: its SSH server does not greet.
    """
    address = machine.forward(SSH_PORT)
    deadline = Deadline(blueprint.stretch(CONNECT_SECONDS))
    while not greeting(address, deadline.remaining(LOOK_SECONDS)):
        check()
        if deadline.expired:
            raise GuestLost(
                f"{machine.spec.name} cannot be reached through its network: its SSH server does not "
                f"answer within {deadline.seconds:g} s",
                stage="ssh",
                remedy="check the SSH server and the network in the guest: a test or a preparation may have "
                "stopped or reconfigured them",
            )
        deadline.pause(LOOK_SECONDS / 10)
