"""The part of the factory that makes clusters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.clusters.cluster import Cluster, opened
from pytest_vmsandbox.guests.clusters.declaration import Base, Declaration
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.networks.networks import Networks


class MakesClusters:
    """The part of `GuestFactory` that is about clusters."""

    backend: Backend
    networks: Networks

    def make_ready(self, image: Base, arguments: Mapping[str, object]) -> None:
        """Build what such guests are cloned from, if they can be cloned.

        Args:
            arguments: the hardware, as `boot` takes it.
        """
        raise NotImplementedError

    def started(
        self, image: Base, arguments: Mapping[str, object], hostname: str, stack: ExitStack
    ) -> Guest:
        """A fresh guest, running and answering, which `stack` ends. Called from several threads."""
        raise NotImplementedError

    @contextmanager
    def cluster(self, machines: object, *, networks: object = None) -> Iterator[Cluster]:
        """A context manager: several fresh guests on networks of their own. All is gone at the end.

        The machines are started at the same time. They answer, and know each other's names.

        Args:
            machines: a mapping of names to what they are made of: an image, as `boot` takes it, or a mapping
                of ``image`` and hardware. A name is the machine's hostname.
            networks: a mapping of names to the names of machines, or to a mapping of ``machines`` and what
                `network` takes. None for one network, ``lan``, with all machines.

        Yields:
            A `Cluster`: a mapping of the names to guests.

        Raises:
            ConfigError: something in it is invalid, or there is no such image.
            VMSandboxError: as `boot`. The error names the machine, and the others are ended.

        Example::

            with vm_factory.cluster({"db1": "debian-13", "db2": "debian-13"}) as cluster:
                cluster["db1"].run(["ping", "-c1", "db2"])
        """
        with opened(Declaration.read(machines, networks), self) as cluster:
            yield cluster
