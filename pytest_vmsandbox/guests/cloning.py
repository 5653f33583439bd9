"""Cloning: one clone of a template is started, named, and armed if it is wanted later.

A clone maps its template's memory and shares it until it writes. To arm it is to resume it, to run a
program in it, and to pause it again: under emulation, the first program in a clone takes ten times
as long as the next ones, since all code is translated anew.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from pytest_vmsandbox.core.errors import GuestLost, LaunchError
from pytest_vmsandbox.guests import resume
from pytest_vmsandbox.guests.access import refusal
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.commands import Command
from pytest_vmsandbox.guests.helper import Helper
from pytest_vmsandbox.guests.machines import Machines, Running, check_network
from pytest_vmsandbox.guests.template_builder import OpenTemplate
from pytest_vmsandbox.machine.machine import Machine

_EXERCISE = Command(argv=("true",))
_EXERCISE_SECONDS = 60.0
_UNUSED_PORT = 1  # nobody listens there
_REFUSAL_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Clone:
    """A guest that was cloned, and nobody has used.

    Attributes:
        is_armed: whether a program has run in it, and it is paused; else it runs.
        machines: its own; they have switched it on.
        running: its machine now.
        helper: the one in it.
        stack: ends all of it.
    """

    is_armed: bool
    machines: Machines
    running: Running
    helper: Helper
    stack: ExitStack


def cloned(backend: Backend, opened: OpenTemplate, blueprint: Blueprint, *, arm: bool) -> Clone:
    """A clone of a template.

    Args:
        arm: whether it is armed; else it runs.

    Raises:
        VMSandboxError: it cannot be made, or something in it cannot be put right.
    """
    hypervisor, template = backend.hypervisor, opened.template
    name = backend.name(blueprint.image)
    logs = backend.callbacks.logs(name)
    with ExitStack() as stack:
        try:
            state = stack.enter_context(template.state())
            disks = stack.enter_context(blueprint.disks(hypervisor.cache, template.layers))
        except OSError as error:
            raise LaunchError(
                f"the template of {blueprint.image} cannot be read: {error}"
            ) from error
        opened.check_current()
        machines = Machines(
            blueprint, hypervisor, name=name, key=opened.key, disks=disks, logs=logs
        )
        # A clone of a damaged template may not answer for minutes.
        running = machines.clone(opened.memory, state, opened.check)
        stack.push(running.stack)
        state.close()  # it is loaded
        if (helper := running.helper) is None:
            raise GuestLost(f"the helper in {name} is gone", stage="command")
        _check_reachable(running, opened, blueprint)
        is_systemd = blueprint.built.definition.init == "systemd"
        resume.rename(helper, name, in_files=is_systemd)
        if arm:
            _arm(running.machine, helper, blueprint)
        return Clone(
            is_armed=arm,
            machines=machines,
            running=running,
            helper=helper,
            stack=stack.pop_all(),
        )


def _check_reachable(running: Running, opened: OpenTemplate, blueprint: Blueprint) -> None:
    """See that a template's first clone is reached through its network.

    Its kernel refuses a connection at once. Its SSH server takes 0.25 s to greet where it is emulated,
    so that is waited for only where nothing is refused, as by a firewall.

    Raises:
        GuestLost: it is not reached.
    """
    if opened.checked.is_set():
        return
    machine = running.machine

    def check() -> None:
        machine.check()
        opened.check()

    if not refusal(machine.forward(_UNUSED_PORT), _REFUSAL_SECONDS):
        check_network(machine, blueprint, check)
    opened.checked.set()


def _arm(machine: Machine, helper: Helper, blueprint: Blueprint) -> None:
    """Run a program in a clone, and pause it."""
    process = helper.start(_EXERCISE)
    process.communicate(None, _ignore, _ignore, blueprint.stretch(_EXERCISE_SECONDS))
    process.close()
    machine.pause()


def _ignore(_: bytes) -> None:
    """Output that nobody wants."""
