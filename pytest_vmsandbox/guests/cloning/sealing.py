"""Seals a running guest at one moment. Clones go on from there, and so does the guest itself.

The guest waits only while its state and memory are written to a file. A QEMU that never runs the guest
then loads that file into a file that has nothing but the memory, and saves the devices once more. So
the guest is like a template: its clones share each page of the memory until they write to it.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.cloning.making import Clone, awake, exercise
from pytest_vmsandbox.guests.cloning.pool import CLAIM
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.reaching.helper_setup import HelperSetup
from pytest_vmsandbox.guests.running import resume
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.guests.running.saved import Saved
from pytest_vmsandbox.guests.running.together import Meet, alone, in_step
from pytest_vmsandbox.machine import host, memory
from pytest_vmsandbox.machine.cards import Card, Connected, HasCard, Loose
from pytest_vmsandbox.machine.cmdline import Start
from pytest_vmsandbox.machine.disk import Disks, empty_overlay
from pytest_vmsandbox.machine.firmware import Flash
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine

_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """A guest at one moment, from which clones go on.

    Attributes:
        blueprint: what it is made of.
        hostname: what it is called inside.
        label: what the names of its clones begin with.
        spec: its hardware, with its user.
        key: opens the clones.
        memory: the clones' memory, which they cannot change.
        state: of its devices.
        disks: its disks. Nobody writes to their files any more.
        lead: by how much its clock had to be ahead of this host's.
        held: whether it must not be paused, because something goes on in it.
        console: what it had written to its console.
        setup: how it gets a helper after a boot; None if it gets none.
        cards: its network cards in root ports.
    """

    blueprint: Blueprint
    hostname: str
    label: str
    spec: Hardware
    key: KeyPair
    memory: IO[bytes]
    state: IO[bytes]
    disks: Disks
    lead: Lead
    held: bool
    console: str
    setup: HelperSetup | None
    cards: tuple[Card, ...]


def sealed_all(backend: Backend, engines: Sequence[Engine], stack: ExitStack) -> list[Sealed]:
    """Seal several guests at one moment. They all go on when the memory of all is written.

    Args:
        stack: closes all files.

    Raises:
        VMSandboxError: one of them cannot be sealed. Then all go on.
    """
    for engine in engines:
        _check(engine)
    own = [stack.enter_context(ExitStack()) for _ in engines]
    with _ONE_AT_A_TIME:  # a second thread would wait for the same guests in another order
        return in_step(
            [
                partial(sealed, backend, engine, its)
                for engine, its in zip(engines, own, strict=True)
            ]
        )


def sealed(backend: Backend, engine: Engine, stack: ExitStack, meet: Meet = alone) -> Sealed:
    """Seal a guest. It goes on when its memory is written.

    Args:
        stack: closes all files.
        meet: called right before its CPUs stop, and right before they run again.

    Raises:
        ConfigError: it cannot be sealed as it is now.
        GuestLost: it is switched off or gone.
        LaunchError: there is no room for its memory.
        MonitorError: QEMU cannot do it.
    """
    _check(engine)
    with ExitStack() as own:
        saved = engine.save(meet)
        size = saved.blueprint.hardware.memory
        backend.quota.claim(size, spare=False)
        own.callback(backend.quota.release, size)
        disks = saved.disks.frozen(own)  # the guest may close its own sooner
        machines, hypervisor = engine.machines, backend.hypervisor
        state, ram = _unpacked(hypervisor, machines, replace(saved, disks=disks), own)
        stack.push(own.pop_all())
    return Sealed(
        blueprint=saved.blueprint,
        hostname=machines.hostname or machines.name,
        label=machines.hostname or saved.blueprint.image,
        spec=engine.spec,
        key=machines.key,
        memory=ram,
        state=state,
        disks=disks,
        lead=saved.lead,
        held=saved.held,
        console=saved.console,
        setup=machines.setup,
        cards=tuple(it.card for it in machines.cards),
    )


def _check(engine: Engine) -> None:
    """Check that nothing keeps a guest from being sealed.

    Raises:
        ConfigError: a fault is in force, or a disk is recorded.
    """
    faults = engine.machines.faults
    faults.refuse_recorded(
        f"the state of {engine.name} cannot be saved",
        "fork or seal before crash_points begins, or after its block",
    )
    if texts := [entry.text for entry in faults.in_force]:
        raise ConfigError(
            f"the state of {engine.name} cannot be saved while faults are in force: {', '.join(texts)}",
            remedy="end them before, or begin them in the guests that go on from it: nobody could end them there",
        )


def _unpacked(
    hypervisor: Hypervisor, machines: Machines, saved: Saved, stack: ExitStack
) -> tuple[IO[bytes], IO[bytes]]:
    """The state of a saved guest's devices, and its memory, each in a file of its own.

    Args:
        stack: closes the files.
    """
    blueprint = saved.blueprint
    cards = tuple(Connected(it.card, None) for it in machines.cards)
    spec = replace(machines.spec(Start.UNPACKED, blueprint), cards=cards)
    identity = host.guest_identity(spec.accelerator)
    ram = stack.enter_context(memory.sealable(blueprint.hardware.memory))
    state = stack.enter_context(
        tempfile.TemporaryFile(dir=hypervisor.cache, buffering=0)  # noqa: SIM115
    )
    with ExitStack() as own:
        tpm = own.enter_context(hypervisor.scratch("tpm")) if spec.tpm else None
        if identity is not None:  # QEMU opens the file itself, as that user
            os.fchown(ram.fileno(), identity.uid, identity.gid)
        disks = _with_fresh(blueprint, saved.disks, hypervisor.cache, own)
        with Machine.running(
            hypervisor, spec, disks=disks, memory=ram, state=saved.state, tpm_folder=tpm
        ) as machine:
            machine.save(state, with_memory=False)
            machine.end(0)
    os.fchown(ram.fileno(), os.geteuid(), os.getegid())
    memory.free_zeros(ram)  # QEMU has touched every page
    memory.seal(ram)
    return state, ram


def _with_fresh(blueprint: Blueprint, frozen: Disks, folder: Path, stack: ExitStack) -> Disks:
    """The disks of one clone, with empty files on top. `stack` closes these."""

    def fresh(size: int) -> IO[bytes]:
        return stack.enter_context(empty_overlay(size, folder))

    disks = frozen.on_top(fresh)
    if blueprint.uefi is None:
        return disks
    return replace(disks, flash=stack.enter_context(Flash.open(blueprint.uefi, folder)))


def clones_of(
    backend: Backend,
    members: Sequence[tuple[Sealed, Sequence[HasCard]]],
    stack: ExitStack,
    *,
    arm: bool,
) -> list[Clone]:
    """Clones that go on from several sealed guests at one moment.

    Args:
        members: sealed guests, each with the cards of its clone: see `clone_of`.
        stack: ends the clones.
        arm: whether to arm them; if not, they run.

    Raises:
        VMSandboxError: one of them cannot be made.
    """

    def made(sealed: Sealed, cards: Sequence[HasCard], own: ExitStack, meet: Meet) -> Clone:
        clone = clone_of(backend, sealed, cards, meet, arm=arm)
        own.push(clone.stack)
        return clone

    own = [stack.enter_context(ExitStack()) for _ in members]
    return in_step([partial(made, *member, its) for member, its in zip(members, own, strict=True)])


def go_on(clones: Sequence[Clone]) -> None:
    """Let armed clones go on at one moment.

    Raises:
        GuestLost: one of them does not answer, or its clock cannot be set.
    """
    in_step([partial(resume.from_pause, it.running.machine, it.helper) for it in clones])


def clone_of(
    backend: Backend,
    sealed: Sealed,
    cards: Sequence[HasCard] = (),
    meet: Meet = alone,
    *,
    arm: bool = False,
) -> Clone:
    """A clone that goes on from a sealed guest. In it, everything but the clock and random numbers is the same.

    Args:
        cards: its network cards, which connect it to networks. Without them, its cards are on no network.
        meet: called right before its CPUs run; and before they stop again, if it is armed.
        arm: whether to arm it; if not, it runs.

    Raises:
        VMSandboxError: it cannot be made, or something in it cannot be corrected.
    """
    hypervisor, blueprint = backend.hypervisor, sealed.blueprint
    name = backend.name(sealed.label)
    setup = None
    if sealed.setup is not None:
        setup = HelperSetup.of(blueprint, hypervisor.cache, sealed.setup.record())
    with ExitStack() as stack:
        backend.quota.require(CLAIM, spare=arm)
        stack.callback(backend.quota.release, CLAIM)
        machines = Machines(
            blueprint,
            hypervisor,
            name=name,
            hostname=sealed.hostname,
            key=sealed.key,
            disks=_with_fresh(blueprint, sealed.disks, hypervisor.cache, stack),
            logs=backend.callbacks.logs(name),
            setup=setup,
            console=sealed.console,
            captures=backend.settings.captures,
        )
        machines.cards = list(cards or map(Loose, sealed.cards))
        running = machines.clone(sealed.memory, sealed.state, lambda: None, sealed.lead, meet)
        running.held = sealed.held
        clone = awake(machines, running, stack)
        if arm:
            exercise(clone)
            meet()
            running.machine.pause()
        return replace(clone, is_armed=arm, stack=stack.pop_all())
