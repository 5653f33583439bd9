"""Makes one clone of a template, gives it its name, and arms it if it is for later.

A clone maps its template's memory, and shares each page until it writes to it. To arm a clone, we resume
it, run a program in it, and pause it again. Under emulation, the first program in a clone takes ten
times as long as the next ones, because QEMU has to translate all code.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

from pytest_vmsandbox.core.errors import GuestLost, LaunchError
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.cloning.template_builder import OpenTemplate
from pytest_vmsandbox.guests.reaching.access import refusal
from pytest_vmsandbox.guests.reaching.commands import Command, ignore
from pytest_vmsandbox.guests.reaching.helper import Helper
from pytest_vmsandbox.guests.reaching.helper_setup import HelperSetup
from pytest_vmsandbox.guests.reaching.ways_in import check_network
from pytest_vmsandbox.guests.running import resume
from pytest_vmsandbox.guests.running.machines import Machines, Running

_EXERCISE = Command(argv=("true",))
_EXERCISE_SECONDS = 60.0
_UNUSED_PORT = 1  # nothing listens there
_REFUSAL_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Clone:
    """A cloned guest that nobody has used.

    Attributes:
        is_armed: whether a program has run in it and it is paused; if not, it runs.
        machines: of the guest.
        running: its current machine.
        helper: in the guest.
        stack: ends everything.
    """

    is_armed: bool
    machines: Machines
    running: Running
    helper: Helper
    stack: ExitStack


def cloned(backend: Backend, opened: OpenTemplate, blueprint: Blueprint, *, arm: bool) -> Clone:
    """A clone of a template.

    Args:
        arm: whether to arm it; if not, it runs.

    Raises:
        VMSandboxError: it cannot be made, or something in it cannot be corrected.
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
        setup = None
        if template.helper:
            setup = HelperSetup.of(blueprint, hypervisor.cache, template.helper)
        machines = Machines(
            blueprint,
            hypervisor,
            name=name,
            key=opened.key,
            disks=disks,
            logs=logs,
            setup=setup,
            console=opened.console,
            captures=backend.settings.captures,
        )
        # A clone of a damaged template may not answer for minutes.
        running = machines.clone(opened.memory, state, opened.check)
        clone = awake(machines, running, stack)
        state.close()  # QEMU has loaded it
        _check_reachable(running, opened, blueprint)
        resume.rename(clone.helper, name, in_files=_has_name_in_files(blueprint, setup))
        if arm:
            exercise(clone)
            running.machine.pause()
        return replace(clone, is_armed=arm, stack=stack.pop_all())


def awake(machines: Machines, running: Running, stack: ExitStack) -> Clone:
    """A clone that was just switched on.

    Args:
        stack: ends it.

    Raises:
        GuestLost: its helper is gone.
    """
    stack.push(running.stack)
    if (helper := running.helper) is None:
        raise GuestLost(f"the helper in {machines.name} is gone", stage="command")
    return Clone(is_armed=False, machines=machines, running=running, helper=helper, stack=stack)


def call(backend: Backend, clone: Clone, hostname: str) -> None:
    """Give a clone a hostname, and a name after that.

    Raises:
        GuestLost: the guest could not be renamed.
    """
    machines, machine, name = clone.machines, clone.running.machine, backend.name(hostname)
    machines.logs = machines.faults.logs = backend.callbacks.logs(name, machines.name)
    machines.name, machines.hostname = name, hostname
    machine.spec = replace(machine.spec, name=name, hostname=hostname)
    in_files = _has_name_in_files(machines.blueprint, machines.setup)
    resume.rename(clone.helper, hostname, in_files=in_files)


def _has_name_in_files(blueprint: Blueprint, setup: HelperSetup | None) -> bool:
    """Whether a guest's name is in its files, too, so that these have to change.

    A boot does not write it there if the image has a key of its own: nobody knows that system's files.
    """
    is_written_at_boot = blueprint.built.definition.init in ("systemd", "sysvinit")
    return is_written_at_boot and (setup is None or blueprint.built.key is None)


def _check_reachable(running: Running, opened: OpenTemplate, blueprint: Blueprint) -> None:
    """Check that the network of a template's first clone works.

    A kernel refuses a connection to an unused port at once. An emulated SSH server takes 0.25 s to greet.
    So we wait for the SSH server only if nothing is refused, for instance because of a firewall.

    Raises:
        GuestLost: the clone cannot be reached.
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


def exercise(clone: Clone) -> None:
    """Run a program in a clone."""
    process = clone.helper.start(_EXERCISE)
    seconds = clone.machines.blueprint.stretch(_EXERCISE_SECONDS)
    process.communicate(None, ignore, ignore, seconds)
    process.close()
