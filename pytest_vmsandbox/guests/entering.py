"""Enters a kept guest: it goes on from the moment at which it was kept.

What is done in it is gone afterwards. The kept guest stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_vmsandbox.catalogue.store import BuiltImage, image_in
from pytest_vmsandbox.core.architecture import ARCHITECTURES, native_architecture
from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import CacheError, ConfigError, LaunchError, VMSandboxError
from pytest_vmsandbox.guests import kept as names
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint, OwnKernel
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.keeping import line_digest, processor_digest
from pytest_vmsandbox.guests.kept import KeptGuest, KeptStore
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.reaching.helper_setup import HelperSetup
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.cards import Card, Loose
from pytest_vmsandbox.machine.disk import Disks, PluggedDisk, empty_overlay
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
    backend = source.backend if isinstance(source, GuestFactory) else source
    with ExitStack() as stack:
        try:
            stack.enter_context(KeptStore.hold(kept.folder))
            machines = _machines(backend, kept, stack)
        except FileNotFoundError as error:
            if not kept.folder.exists():
                raise _gone(kept) from error
            raise _damaged(kept, str(error)) from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _damaged(kept, str(error)) from error
        machines.is_awaited = wait and (kept.answers or not kept.has_memory)
        try:
            engine = stack.enter_context(backend.engine(machines))
        except LaunchError as error:
            if kept.has_memory and (damage := kept.damage()):
                raise _damaged(kept, damage) from error
            raise
        guest = Guest(engine)
        if wait and kept.answers and not machines.has_helper:
            _set_clock(guest, kept.record["lead"])
        yield guest


def _machines(backend: Backend, kept: KeptGuest, stack: ExitStack) -> Machines:
    """What starts the guest. `stack` closes its files.

    Raises:
        ConfigError: its state cannot be loaded here.
        OSError, ValueError, TypeError, KeyError: it is damaged.
    """
    blueprint = _blueprint(backend, kept, image_in(kept.folder / names.IMAGE))
    setup = None
    if way := kept.record["helper"]:
        setup = HelperSetup.of(blueprint, backend.cache, way)
    machines = Machines(
        blueprint,
        backend.hypervisor,
        name=kept.guest,
        key=KeyPair.of(kept.private_key),
        disks=stack.enter_context(_disks(blueprint, kept, backend.cache)),
        logs=backend.callbacks.logs(kept.guest),
        setup=setup,
        console=kept.console if kept.has_memory else "",
        tpm=_tpm(kept),
        has_helper=kept.record["has_helper"],
    )
    machines.cards += [Loose(Card.read(card)) for card in kept.record.get("cards", ())]
    if kept.has_memory:
        state = stack.enter_context((kept.folder / names.STATE).open("rb", buffering=0))
        machines.go_on_from(state, Lead(kept.record["lead"]))
    return machines


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
        disks = stack.enter_context(blueprint.disks(cache, frozen))
        plugged = [_plugged(record, kept.folder, cache, stack) for record in kept.record["plugged"]]
        yield replace(disks, plugged=tuple(plugged))


def _plugged(record: dict[str, Any], folder: Path, cache: Path, stack: ExitStack) -> PluggedDisk:
    layers = [stack.enter_context((folder / name).open("rb")) for name in record["layers"]]
    if not record["read_only"]:
        layers.append(stack.enter_context(empty_overlay(record["size"], cache)))
    base = record["base"]
    return PluggedDisk(
        name=record["name"],
        port=record["port"],
        size=record["size"],
        read_only=record["read_only"],
        base=None if base is None else stack.enter_context((folder / base).open("rb")),
        layers=tuple(layers),
    )


def _tpm(kept: KeptGuest) -> dict[str, bytes]:
    return {name: (kept.folder / names.TPM / name).read_bytes() for name in kept.record["tpm"]}
