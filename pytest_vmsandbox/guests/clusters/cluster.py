"""Several guests at once, as users hold them: started together, on networks of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Protocol

from pytest_vmsandbox.core.errors import ConfigError, VMSandboxError
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.clusters.declaration import Base, Declaration, Member
from pytest_vmsandbox.guests.clusters.sealed import SealedCluster, sealed
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.leasing import leased
from pytest_vmsandbox.guests.networks.joining import joined_all
from pytest_vmsandbox.guests.networks.making import Networks
from pytest_vmsandbox.guests.networks.network import Network
from pytest_vmsandbox.guests.running.together import in_threads


class Maker(Protocol):
    """Makes what a cluster is made of. `GuestFactory` does."""

    backend: Backend
    networks: Networks

    def make_ready(self, image: Base, arguments: Mapping[str, object]) -> None:
        """Build what such a guest is cloned from, if it can be cloned."""

    def started(
        self, image: Base, arguments: Mapping[str, object], hostname: str, stack: ExitStack
    ) -> Guest:
        """A fresh guest, which `stack` ends. Called from several threads."""


class Cluster(Mapping[str, Guest]):
    """Guests that belong together, and their networks. `GuestFactory.cluster` makes it and ends it.

    It is a mapping: the name of a machine → its `Guest`, in the order in which you declared them.

    Attributes:
        networks: the name of a network → the network, likewise.
        backend: what runs the guests. Not part of the public interface: it changes without notice.
    """

    def __init__(
        self,
        backend: Backend,
        guests: Mapping[str, Guest],
        networks: Mapping[str, Network],
        seeds: Mapping[str, int],
    ) -> None:
        self.backend = backend
        self._guests = dict(guests)
        self._seeds = dict(seeds)
        self.networks: Mapping[str, Network] = MappingProxyType(dict(networks))

    def __getitem__(self, name: str) -> Guest:
        if name not in self._guests:
            raise KeyError(f"{name}: the machines of this cluster are {', '.join(self._guests)}")
        return self._guests[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._guests)

    def __len__(self) -> int:
        return len(self._guests)

    def __repr__(self) -> str:
        return f"<Cluster {', '.join(self._guests)} on {', '.join(self.networks) or 'no network'}>"

    @property
    def network(self) -> Network:
        """The only network, or the first one that you declared.

        Raises:
            ConfigError: there is none.
        """
        for network in self.networks.values():
            return network
        raise ConfigError("this cluster has no network", remedy="leave out networks={}")

    def seal(self) -> SealedCluster:
        """Save the whole cluster as it is at this moment: memory, devices and disks of all machines.

        It goes on afterwards. Clones of the whole go on from that moment, with the same names and addresses
        on networks of their own. Their clocks are right, and their random numbers are new. Connections
        between the machines stay open. Conditions on links are not saved.

        Returns:
            A `SealedCluster`, for `GuestFactory.cluster`.

        Raises:
            ConfigError: a machine has no helper, a fault is in force in it, or a disk of it is recorded.
            GuestLost: a machine is switched off.
            MonitorError: the state of a machine cannot be saved.
            LaunchError: this host has no room.

        Example::

            with vm_factory.cluster({"db1": "tiny", "db2": "tiny"}) as cluster:
                form(cluster)
                with cluster.seal() as sealed, vm_factory.cluster(sealed) as clone:
                    clone["db1"].power_cut()
        """
        return sealed(self.backend, self._guests, self.networks, self._seeds)


@contextmanager
def opened(declared: Declaration, maker: Maker) -> Iterator[Cluster]:
    """A cluster whose machines run, answer, and know each other. All of it is gone at the end.

    Raises:
        ConfigError: there is no such image, hardware or network.
        VMSandboxError: one of its machines does not come up. The error names it, and the others are ended.
    """
    with ExitStack() as stack:
        networks = {
            network.name: stack.enter_context(maker.networks.make(network.name, **network.settings))
            for network in declared.networks
        }
        guests = _started(declared, maker, stack)
        wanted = {
            guest: [networks[each] for each in declared.networks_of(name)]
            for name, guest in guests.items()
        }
        stack.enter_context(joined_all(wanted))
        seeds = {network.name: network.settings["seed"] for network in declared.networks}
        yield stack.enter_context(handed_out(Cluster(maker.backend, guests, networks, seeds)))


@contextmanager
def handed_out(cluster: Cluster) -> Iterator[Cluster]:
    """Hand out all machines. At the end, all are looked at before the first one is gone."""
    with ExitStack() as stack:
        for guest in cluster.values():
            stack.enter_context(leased(cluster.backend, guest))
        yield cluster


def _started(declared: Declaration, maker: Maker, stack: ExitStack) -> dict[str, Guest]:
    """The guests, started at the same time. `stack` ends them."""
    for member in declared.machines:  # threads would build the same template twice
        with _about(member.name):
            maker.make_ready(member.image, member.hardware)

    def start(member: Member, own: ExitStack) -> Guest:
        return maker.started(member.image, member.hardware, member.name, own)

    works = [
        partial(start, member, stack.enter_context(ExitStack())) for member in declared.machines
    ]
    starts = in_threads(works, os.cpu_count() or 1, all_or_none=True)
    errors = {it: it.exception() for it in starts if not it.cancelled()}
    failed = [
        it
        for it, error in errors.items()
        if error is not None and not isinstance(error, KeyboardInterrupt)  # which had to give up
    ]
    named = {member.name: it for member, it in zip(declared.machines, starts, strict=True)}
    for name, it in named.items():
        if it in failed or not failed:
            with _about(name):
                it.result()
    return {name: it.result() for name, it in named.items()}


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Let an error name the machine of the cluster."""
    try:
        yield
    except VMSandboxError as error:
        error.brief = f"the machine {name!r} of the cluster: {error.brief}"
        raise
