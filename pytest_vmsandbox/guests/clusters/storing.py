"""Sealed clusters in the user's cache: formed once, and again if something changes that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pytest_vmsandbox.cache.copying import copy_to
from pytest_vmsandbox.cache.store import CLUSTERS, PRIVATE_KEY, Entry, Store
from pytest_vmsandbox.core.errors import LaunchError, MonitorError
from pytest_vmsandbox.guests import plugged_files
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.cloning.sealing import Sealed
from pytest_vmsandbox.guests.cloning.template_builder import template_key
from pytest_vmsandbox.guests.clusters.cluster import Cluster
from pytest_vmsandbox.guests.clusters.declaration import Declaration
from pytest_vmsandbox.guests.clusters.sealed import NotSealedError, SealedCluster
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.provision import Step
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.reaching.helper_setup import HelperSetup
from pytest_vmsandbox.guests.templates import CONSOLE, MEMORY, STATE, layer_name
from pytest_vmsandbox.machine import memory
from pytest_vmsandbox.machine.cards import Card

FORMAT = 2  # raise it when we change what we do to a cluster before we seal it, or keep of it
_TRIES = 3


class KeptCluster(Entry):
    """A sealed cluster in the cache."""


def key_of(
    declared: Declaration, made_of: Mapping[str, tuple[Blueprint, Sequence[Step]]], form: Step
) -> str:
    """The digest of everything that a sealed cluster depends on.

    Args:
        made_of: blueprint and preparations of each machine, by name.
        form: what is done to the cluster.
    """
    machines = {
        name: [template_key(blueprint, steps), blueprint.hardware.network, blueprint.hardware.user]
        for name, (blueprint, steps) in made_of.items()
    }
    networks = [asdict(network) for network in declared.networks]
    parts = [FORMAT, list(machines.items()), networks, form.digest]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _written(folder: Path, cluster: Cluster) -> dict[str, object] | str:
    """Seal a cluster, and write it into an empty folder. Returns the record, or why that cannot be done."""
    for guest in cluster.values():  # a power cut in a clone must not undo what was formed
        guest.run(["sync"], user="root")
    for name, guest in cluster.items():
        if not guest.engine.has_helper:
            return f"there is no helper in {name}"
    try:
        with cluster.seal() as sealed:
            return _write_all(folder, sealed)
    except (LaunchError, MonitorError) as error:
        if error.transient:
            raise
        return error.brief
    except OSError as error:
        return f"it cannot be written: {error.strerror or error}"


def _write_all(folder: Path, sealed: SealedCluster) -> dict[str, object]:
    """Write a sealed cluster into an empty folder. Returns the record."""
    machines = {name: _write(folder, name, member) for name, member in sealed.members.items()}
    keys = {name: member.key.private for name, member in sealed.members.items()}
    (folder / PRIVATE_KEY).touch(0o600)
    (folder / PRIVATE_KEY).write_text(json.dumps(keys), encoding="utf-8")
    return {"machines": machines, "networks": sealed.networks}


def _write(folder: Path, name: str, sealed: Sealed) -> dict[str, object]:
    copy_to(sealed.memory, folder / f"{name}.{MEMORY}")
    copy_to(sealed.state, folder / f"{name}.{STATE}")
    (folder / f"{name}.{CONSOLE}").write_text(sealed.console, "utf-8", "replace")
    layers = []
    for number, files in enumerate(sealed.disks.overlays):
        names = [f"{name}.{layer_name(number, depth)}" for depth in range(len(files))]
        for file, its in zip(files, names, strict=True):
            copy_to(file, folder / its)
        layers.append(names)
    return {
        "hostname": sealed.hostname,
        "label": sealed.label,
        "layers": layers,
        "plugged": plugged_files.write(sealed.disks.plugged, folder, f"{name}."),
        "lead": sealed.lead.seconds,
        "held": sealed.held,
        "helper": None if sealed.setup is None else sealed.setup.record(),
        "cards": [asdict(card) for card in sealed.cards],
    }


class FormError(Exception):
    """Its argument is what was raised while a cluster was formed, so that nobody takes it for an error of the cache."""


def obtained(
    backend: Backend,
    key: str,
    blueprints: Mapping[str, Blueprint],
    form: Callable[[], AbstractContextManager[Cluster]],
) -> SealedCluster:
    """The kept cluster with that key. It is formed and sealed if there is none.

    Args:
        blueprints: of the machines, by name.
        form: returns a context manager with the cluster.

    Raises:
        FormError: it cannot be formed.
        NotSealedError: it cannot be sealed here.
        CacheError: it cannot be kept.
        LaunchError: what was kept is damaged again and again.
    """
    for name, blueprint in blueprints.items():
        if why := blueprint.unsaved or ("" if blueprint.has_way_in else "it has no way in"):
            raise NotSealedError(f"{name}: {why}")
    store, names = Store(backend.cache, CLUSTERS, KeptCluster), ", ".join(blueprints)
    say, about = backend.callbacks.say, f"the cluster of {names}"

    def fill(folder: Path, _lock: int) -> dict[str, object]:
        say(f"forming {about}. This is done once, and again if its inputs change")
        with ExitStack() as stack:
            try:
                cluster = stack.enter_context(form())
            except Exception as error:
                raise FormError(error) from error
            record = _written(folder, cluster)
        if isinstance(record, str):
            raise NotSealedError(record)
        return record

    for _ in range(_TRIES):
        kept = store.get(key) or store.make(
            key, fill, on_busy=lambda: say(f"waiting: another run is forming {about}")
        )
        with ExitStack() as stack:
            try:
                found, damage = _read_all(backend, kept, blueprints, stack)
                if not damage:
                    found.stack.push(stack.pop_all())
                    backend.stack.callback(found.end)
                    return found
            except (OSError, ValueError, KeyError) as error:
                damage = kept.damage() or str(error)
        store.throw_away(key, kept)
        backend.callbacks.tell(f"{about} was damaged ({damage}), so it is formed again")
    raise LaunchError(f"{about} was damaged {_TRIES} times in a row")


def _read_all(
    backend: Backend, kept: KeptCluster, blueprints: Mapping[str, Blueprint], stack: ExitStack
) -> tuple[SealedCluster, str]:
    """A kept cluster, open, and which of its files has changed; empty if none has.

    Threads do it: large files are read, and some QEMUs need copies of the memories.

    Args:
        stack: closes its files.

    Raises:
        OSError, ValueError, KeyError: it is damaged.
        ImageError: an image below it is damaged.
    """
    stack.enter_context(Store.hold(kept.folder))
    keys: dict[str, str] = json.loads((kept.folder / PRIVATE_KEY).read_text(encoding="utf-8"))

    def read(name: str) -> Sealed:
        record = kept.record["machines"][name]
        return _read(backend, kept.folder, name, record, blueprints[name], keys[name], own[name])

    own = {name: stack.enter_context(ExitStack()) for name in blueprints}
    images = {blueprint.image: blueprint.built for blueprint in blueprints.values()}
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="vmsandbox-cluster") as threads:
        verified = [threads.submit(built.verified) for built in images.values()]
        damage = threads.submit(kept.damage)
        members = dict(zip(own, threads.map(read, own), strict=True))
    for each in verified:
        each.result()
    return SealedCluster(members, kept.record["networks"], ExitStack()), damage.result()


def _read(
    backend: Backend,
    folder: Path,
    name: str,
    record: Mapping[str, Any],
    blueprint: Blueprint,
    key: str,
    stack: ExitStack,
) -> Sealed:
    helper, disks = record["helper"], stack.enter_context(blueprint.disks(backend.cache))
    overlays = tuple(
        tuple(stack.enter_context((folder / layer).open("rb")) for layer in layers)
        for layers in record["layers"]
    )
    plugged = tuple(plugged_files.read(it, folder, stack) for it in record["plugged"])
    shared = memory.for_clones(folder / f"{name}.{MEMORY}", blueprint.qemu.version)
    return Sealed(
        blueprint=blueprint,
        hostname=record["hostname"],
        label=record["label"],
        spec=blueprint.hardware,
        key=KeyPair.of(key),
        memory=stack.enter_context(shared),
        state=stack.enter_context((folder / f"{name}.{STATE}").open("rb", buffering=0)),
        disks=replace(disks, overlays=overlays, plugged=plugged),
        lead=Lead(record["lead"]),
        held=record["held"],
        console=(folder / f"{name}.{CONSOLE}").read_text("utf-8"),
        setup=None if helper is None else HelperSetup.of(blueprint, backend.cache, helper),
        cards=tuple(Card.read(card) for card in record["cards"]),
    )
