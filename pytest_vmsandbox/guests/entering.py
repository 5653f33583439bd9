"""Enters kept guests: they go on from the moment at which they were kept.

What is done in them is gone afterwards. The kept guests stay as they were. Those of one group go on at
the same moment, on new networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pytest_vmsandbox.catalogue.store import BuiltImage, image_in
from pytest_vmsandbox.core.architecture import ARCHITECTURES, native_architecture
from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import CacheError, ConfigError, LaunchError, VMSandboxError
from pytest_vmsandbox.guests import kept as names, plugged_files
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint, OwnKernel
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.keeping import line_digest, processor_digest
from pytest_vmsandbox.guests.kept import KeptGuest, KeptStore
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.networks.joining import admit, seats_of
from pytest_vmsandbox.guests.networks.making import Networks
from pytest_vmsandbox.guests.networks.network import Network
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.reaching.helper_setup import HelperSetup
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.guests.running.together import Meet, in_step
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.cards import Card, HasCard, Loose
from pytest_vmsandbox.machine.disk import Disks, empty_overlay
from pytest_vmsandbox.machine.firmware import Uefi
from pytest_vmsandbox.machine.qemu import Qemu, find_qemu


@contextmanager
def entered(
    source: GuestFactory | Backend, kept: KeptGuest, *, wait: bool = True
) -> Iterator[Guest]:
    """A kept guest, which goes on from its moment. It is gone at the end.

    Its clock is right, its random numbers are new, and its network is up. A guest of which only the disks
    were kept is booted.

    Args:
        wait: whether to wait for SSH, or for the boot of one that is off. Nobody waits for one that did not
            answer when it was kept.

    Raises:
        ConfigError: its state cannot be loaded here: QEMU or the CPU is another one, or it is gone.
        CacheError: its files are damaged.
        LaunchError: QEMU cannot be started, or this host has no room.
        BootError: it does not come up.
    """
    with all_entered(source, [kept], wait=wait) as (guest,):
        yield guest


@contextmanager
def all_entered(
    source: GuestFactory | Backend, group: Sequence[KeptGuest], *, wait: bool = True
) -> Iterator[list[Guest]]:
    """Kept guests, which go on from their moment together, on networks of their own. See `entered`.

    Args:
        group: those that are woken. Others of their networks are not there.
        wait: as for `entered`, for the first one. The others are waited for.

    Raises:
        LaunchError: at the end, too: the switch of their networks is gone.
        VMSandboxError: as `entered`.
    """
    backend = source.backend if isinstance(source, GuestFactory) else source
    with ExitStack() as stack:
        networks = _Networks(backend, stack)
        found = [_prepared(backend, kept, networks, stack) for kept in group]
        for kept, machines in zip(group, found, strict=True):
            waits = wait or kept is not group[0]
            machines.is_awaited = waits and (kept.answers or not kept.has_memory)
        own = [stack.enter_context(ExitStack()) for _ in group]
        works = [
            partial(_switched_on, backend, *each) for each in zip(group, found, own, strict=True)
        ]
        yield in_step(works)


class _Networks:
    """New networks for kept guests. `stack` ends them."""

    def __init__(self, backend: Backend, stack: ExitStack) -> None:
        self._networks = Networks(backend)
        self._stack = stack
        self._made: dict[int, Network] = {}

    def cards(self, kept: KeptGuest) -> list[HasCard]:
        """The cards of a kept guest, on networks that others of its group are on, too."""
        cards = [Card.read(card) for card in kept.record.get("cards", ())]
        networks = kept.group.networks if kept.group is not None else [None] * len(cards)
        return [
            Loose(card) if its is None else self._network(card, its).seat(kept.hostname, card=card)
            for card, its in zip(cards, networks, strict=True)
        ]

    def _network(self, card: Card, its: Mapping[str, Any]) -> Network:
        if (made := self._made.get(its["number"])) is None:
            settings = {name: its[name] for name in ("ipv4", "ipv6", "addresses")}
            made = self._networks.make(card.network, **settings, seed=1)
            self._made[its["number"]] = self._stack.enter_context(made)
        return made


def _prepared(backend: Backend, kept: KeptGuest, networks: _Networks, stack: ExitStack) -> Machines:
    """What starts a kept guest. `stack` closes its files, and lets others remove it."""
    try:
        stack.enter_context(KeptStore.hold(kept.folder))
        machines = _machines(backend, kept, stack)
        machines.cards += networks.cards(kept)
    except FileNotFoundError as error:
        if not kept.folder.exists():
            raise _gone(kept) from error
        raise _damaged(kept, str(error)) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(kept, str(error)) from error
    return machines


def _switched_on(
    backend: Backend, kept: KeptGuest, machines: Machines, stack: ExitStack, meet: Meet
) -> Guest:
    """A guest that goes on. `stack` ends it.

    Args:
        meet: called right before its CPUs run, if it goes on from a moment.
    """
    if kept.has_memory:
        state = stack.enter_context((kept.folder / names.STATE).open("rb", buffering=0))
        machines.go_on_from(state, Lead(kept.record["lead"]), meet)
    engine = backend.engine(machines)
    guest, seats = Guest(engine), seats_of(engine)
    if not kept.has_memory:  # it gets its addresses when it has booted
        admit(guest, seats)
    try:
        stack.enter_context(engine)
    except LaunchError as error:
        if kept.has_memory and (damage := kept.damage()):
            raise _damaged(kept, damage) from error
        raise
    if kept.has_memory:
        admit(guest, seats)
    if machines.is_awaited and kept.answers and not machines.has_helper:
        _set_clock(guest, kept.record["lead"])
    return guest


def _machines(backend: Backend, kept: KeptGuest, stack: ExitStack) -> Machines:
    """The machines of a kept guest, without its cards. `stack` closes its files.

    Raises:
        ConfigError: its state cannot be loaded here.
        OSError, ValueError, TypeError, KeyError: it is damaged.
    """
    blueprint = _blueprint(backend, kept, image_in(kept.folder / names.IMAGE))
    setup = None
    if way := kept.record["helper"]:
        setup = HelperSetup.of(blueprint, backend.cache, way)
    return Machines(
        blueprint,
        backend.hypervisor,
        name=kept.guest,
        hostname=kept.record.get("hostname", ""),
        key=KeyPair.of(kept.private_key),
        disks=stack.enter_context(_disks(blueprint, kept, backend.cache)),
        logs=backend.callbacks.logs(kept.guest),
        setup=setup,
        console=kept.console if kept.has_memory else "",
        tpm=_tpm(kept),
        has_helper=kept.record["has_helper"],
    )


def _set_clock(guest: Guest, lead: float) -> None:
    """Set the clock of a guest without a helper, if its system has such a command."""
    with suppress(VMSandboxError):
        guest.run(["date", "-s", f"@{wall() + lead:.0f}"], user="root", check=False)


def _gone(kept: KeptGuest) -> ConfigError:
    return ConfigError(
        f"the kept guest of {kept.moment.nodeid} was removed",
        remedy="run the test again with --vm-keep=failed",
    )


def _damaged(kept: KeptGuest, what: str) -> CacheError:
    return CacheError(
        f"the kept guest of {kept.moment.nodeid} is damaged: {what}",
        remedy="run the test again with --vm-keep=failed",
    )


# -- what it is made of ----------------------------------------------------------------------------


def _blueprint(backend: Backend, kept: KeptGuest, built: BuiltImage) -> Blueprint:
    """The blueprint of a kept guest.

    Raises:
        ConfigError: its state cannot be loaded here.
    """
    record = kept.record
    qemu = find_qemu(built.definition.architecture)
    if kept.has_memory:
        _check_qemu(kept, qemu, built)
    blueprint = Blueprint(
        built=built,
        qemu=qemu,
        verdict=_verdict(backend, kept, built),
        hardware=kept.hardware,
        qemu_args=lambda _: record["more_args"],
        kernel=_kernel(kept),
        uefi=_uefi(kept),
        pace=backend.hypervisor.pace,
    )
    if kept.has_memory and line_digest(blueprint, record["more_args"]) != record["line"]:
        raise ConfigError(
            f"the guest of {kept.moment.nodeid} cannot go on here: pytest-vmsandbox {record['version']} saved "
            "it, and this version starts guests with another hardware",
            remedy=f"use pytest-vmsandbox {record['version']}, or run the test again with --vm-keep=failed",
        )
    return blueprint


def _check_qemu(kept: KeptGuest, qemu: Qemu, built: BuiltImage) -> None:
    if kept.record["qemu"] == qemu.build:
        return
    release, digest = kept.qemu
    its = ARCHITECTURES[built.definition.architecture]
    variable = "VMSANDBOX_QEMU"
    if its.name != native_architecture():
        variable += f"_{its.debian.upper()}"
    here = qemu.build.rpartition(" ")[2]
    raise ConfigError(
        f"the guest of {kept.moment.nodeid} cannot go on with this QEMU: another build has saved it",
        details=f"saved by: QEMU {release} (SHA-256 {digest})\n"
        f"found:    QEMU {qemu.release} (SHA-256 {here}), {qemu.path}",
        remedy=f"install QEMU {release} from the same package, or set {variable} to the program that saved it",
    )


def _verdict(backend: Backend, kept: KeptGuest, built: BuiltImage) -> Verdict:
    """The accelerator and the CPU model that ran the guest.

    Raises:
        ConfigError: they are not here.
    """
    if not kept.has_memory:
        return backend.verdict_of(built)
    wanted, asked = kept.accelerator, backend.settings.accelerator
    what = f"the guest of {kept.moment.nodeid} cannot go on here: it was saved with {wanted}"
    if asked not in ("auto", wanted):
        raise ConfigError(f"{what}, and not with {asked}", remedy="leave --accel out")
    try:
        verdict = backend.verdict_of(built, wanted)
    except LaunchError as error:
        raise ConfigError(
            f"{what}, which this machine does not have",
            details=str(error),
            remedy="enter it on the machine where the test ran",
        ) from error
    if processor_digest(wanted) != kept.record["host"]:
        raise ConfigError(
            f"{what} on another CPU than this machine's",
            remedy="enter it on a machine with the same CPU, or run the test with --vm-accel=tcg: such "
            "guests go on with any CPU",
        )
    return replace(verdict, processor=kept.record["processor"])


def _kernel(kept: KeptGuest) -> OwnKernel | None:
    if (record := kept.record["kernel"]) is None:
        return None
    folder = kept.folder / names.KERNEL
    return OwnKernel(
        release=record["release"],
        digest=record["digest"],
        image=folder / "image",
        initrd=folder / "initrd",
        modules=folder / "modules" if record["has_modules"] else None,
    )


def _uefi(kept: KeptGuest) -> Uefi | None:
    if (record := kept.record["uefi"]) is None:
        return None
    folder = kept.folder / names.FLASH
    return Uefi(code=folder / "code", variables=folder / "variables", **record)


@contextmanager
def _disks(blueprint: Blueprint, kept: KeptGuest, cache: Path) -> Iterator[Disks]:
    """The disks as they were, with empty files on top."""
    frozen = [[kept.folder / name for name in layers] for layers in kept.record["layers"]]
    with ExitStack() as stack:
        disks, plugged = stack.enter_context(blueprint.disks(cache, frozen)), []
        for record in kept.record["plugged"]:
            disk = plugged_files.read(record, kept.folder, stack)
            if not disk.read_only:
                top = stack.enter_context(empty_overlay(disk.size, cache))
                disk = replace(disk, layers=(*disk.layers, top))
            plugged.append(disk)
        yield replace(disks, plugged=tuple(plugged))


def _tpm(kept: KeptGuest) -> dict[str, bytes]:
    return {name: (kept.folder / names.TPM / name).read_bytes() for name in kept.record["tpm"]}
