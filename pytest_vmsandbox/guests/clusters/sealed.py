"""A cluster at one moment, from which clones of the whole go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

from pytest_vmsandbox.core.errors import ConfigError, LaunchError
from pytest_vmsandbox.core.lasting import Lasting
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.cloning.sealing import Sealed, sealed_all
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.networks.network import Network


class NotSealedError(LaunchError):
    """There can be no sealed cluster of these machines here. It can still be formed for each test."""


class SealedCluster(Lasting):
    """A cluster at one moment. `GuestFactory.cluster` makes clones of it.

    `Cluster.seal` and `GuestFactory.prepare_cluster` return it. It is a context manager: at its end, or at
    that of the run, it is gone. Clones that run go on.

    Attributes:
        machines: the names of its machines.
        is_over: whether there can be no more clones of it.
        members: each machine at that moment, by name. Not part of the public interface.
        networks: what each network is made of, by name. Not part of the public interface.
        form: forms such a cluster where none can be sealed; None where it is sealed. Not part of the public
            interface.
        stack: ends everything. Not part of the public interface.
    """

    def __init__(
        self,
        members: Mapping[str, Sealed],
        networks: Mapping[str, Mapping[str, Any]],
        stack: ExitStack,
    ) -> None:
        self.machines = tuple(members)
        self.members = dict(members)
        self.networks = dict(networks)
        self.form: Callable[[], AbstractContextManager[Any]] | None = None
        self.stack = stack
        self.is_over = False

    @classmethod
    def formed_each_time(
        cls, machines: Iterable[str], form: Callable[[], AbstractContextManager[Any]]
    ) -> Self:
        """What stands for one that cannot be sealed: a cluster is formed for each test.

        Args:
            machines: their names.
            form: returns a context manager with a cluster.
        """
        made = cls({}, {}, ExitStack())
        made.machines, made.form = tuple(machines), form
        return made

    def __repr__(self) -> str:
        return f"<SealedCluster {', '.join(self.machines)}>"

    def end(self) -> None:
        """End it before the run ends, which frees its memory. A second call does nothing."""
        self.is_over = True
        self.stack.close()

    def check(self) -> None:
        """Check that clones can be made. Not part of the public interface.

        Raises:
            ConfigError: it is over.
        """
        if self.is_over:
            raise ConfigError(
                f"the sealed cluster of {', '.join(self.machines)} is over",
                remedy="make its clones within its block, or before you call its end()",
            )


def sealed(
    backend: Backend,
    guests: Mapping[str, Guest],
    networks: Mapping[str, Network],
    seeds: Mapping[str, int],
) -> SealedCluster:
    """Seal a cluster. It goes on, and what it is now ends with the run at the latest.

    Raises:
        VMSandboxError: one of its machines cannot be sealed.
    """
    settings = {
        name: {
            "ipv4": str(network.ipv4),
            "ipv6": str(network.ipv6),
            "addresses": network.addresses,
            "seed": seeds[name],
        }
        for name, network in networks.items()
    }
    with ExitStack() as stack:
        members = sealed_all(backend, [guest.engine for guest in guests.values()], stack)
        found = SealedCluster(dict(zip(guests, members, strict=True)), settings, stack.pop_all())
    backend.stack.callback(found.end)
    return found
