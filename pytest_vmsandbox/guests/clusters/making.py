"""The part of the factory that makes clusters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, cast

from pytest_vmsandbox.core.errors import CacheError, ConfigError
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.clusters import storing
from pytest_vmsandbox.guests.clusters.cluster import Cluster, handed_out, opened
from pytest_vmsandbox.guests.clusters.declaration import Base, Declaration
from pytest_vmsandbox.guests.clusters.sealed import NotSealedError, SealedCluster
from pytest_vmsandbox.guests.clusters.whole import Clones
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.networks.making import Networks
from pytest_vmsandbox.guests.provision import Provision, Step


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

    def made_of(
        self, image: Base, arguments: Mapping[str, object]
    ) -> tuple[Blueprint, Sequence[Step]]:
        """What such guests are made of, and their preparations."""
        raise NotImplementedError

    @contextmanager
    def cluster(self, machines: object, *, networks: object = None) -> Iterator[Cluster]:
        """A context manager: several fresh guests on networks of their own. All is gone at the end.

        The machines are started at the same time. They answer, and know each other's names. Or it is a clone
        of a sealed cluster: its machines go on together from the moment at which it was sealed.

        Args:
            machines: a mapping of names to what they are made of: an image, as `boot` takes it, or a mapping
                of ``image`` and hardware. A name is the machine's hostname. Or a `SealedCluster`.
            networks: a mapping of names to the names of machines, or to a mapping of ``machines`` and what
                `network` takes. None for one network, ``lan``, with all machines; or for those of the
                sealed cluster.

        Yields:
            A `Cluster`: a mapping of the names to guests.

        Raises:
            ConfigError: something in it is invalid, or there is no such image.
            VMSandboxError: as `boot`. The error names the machine, and the others are ended.

        Example::

            with vm_factory.cluster({"db1": "debian-13", "db2": "debian-13"}) as cluster:
                cluster["db1"].run(["ping", "-c1", "db2"])
        """
        if not isinstance(machines, SealedCluster):
            with opened(Declaration.read(machines, networks), self) as cluster:
                yield cluster
            return
        if networks is not None:
            raise ConfigError(
                "the clone of a sealed cluster has the networks that were sealed",
                remedy="leave out networks=",
            )
        seeds = {name: settings["seed"] for name, settings in machines.networks.items()}
        machines.check()
        if machines.form is not None:
            with machines.form() as cluster:
                yield cluster
            return
        with (
            self._clones_of(machines).lent() as (guests, its),
            handed_out(Cluster(self.backend, guests, its, seeds)) as cluster,
        ):
            yield cluster

    def _clones_of(self, sealed: SealedCluster) -> Clones:
        if sealed not in self._whole:
            clones = self._whole[sealed] = Clones(self.backend, self.networks, sealed)
            sealed.stack.callback(clones.close)
        return self._whole[sealed]

    @cached_property
    def _whole(self) -> dict[SealedCluster, Clones]:
        return {}

    @cached_property
    def _formed(self) -> dict[str, SealedCluster]:
        return {}

    def prepare_cluster(
        self,
        machines: object,
        form: Callable[[Cluster], object],
        *,
        networks: object = None,
        depends_on: Sequence[str | os.PathLike[str]],
    ) -> SealedCluster:
        """Form a cluster and seal it, for `cluster`. ``form`` is called once, and again if its inputs change.

        It is done now, unless this run or an earlier one has done so. What ``form`` leaves running goes on
        running in every clone. The result lies in the cache: put no secret into it.

        Where there can be no clones, ``form`` is called for each test. A line on the terminal says so.

        Args:
            machines: as `cluster` takes them.
            form: called with a fresh cluster.
            networks: as `cluster` takes them.
            depends_on: the inputs, as `prepare` takes them. The code of ``form`` counts by itself.

        Returns:
            A `SealedCluster`. It is gone with the run; the next run finds it in the cache.

        Raises:
            ConfigError: an argument is invalid, a fault is in force, or a disk is recorded.
            VMSandboxError: as `boot`, and as `Cluster.seal`. What ``form`` raises is passed on.
        """
        declared = Declaration.read(machines, networks)
        about = getattr(form, "__qualname__", "formed")
        step = Provision(name=about, depends_on=depends_on, run=cast("Any", form)).step()
        made_of = {it.name: self.made_of(it.image, it.hardware) for it in declared.machines}
        key = storing.key_of(declared, made_of, step)

        if key not in self._formed or self._formed[key].is_over:
            blueprints = {name: blueprint for name, (blueprint, _) in made_of.items()}
            self._formed[key] = self._sealed(key, declared, blueprints, form)
        return self._formed[key]

    def _sealed(
        self,
        key: str,
        declared: Declaration,
        blueprints: Mapping[str, Blueprint],
        form: Callable[[Cluster], object],
    ) -> SealedCluster:
        """A cluster of the cache, or what forms one for each test if there can be none."""

        @contextmanager
        def formed() -> Iterator[Cluster]:
            with opened(declared, self) as cluster:
                form(cluster)
                yield cluster

        each_time = SealedCluster.formed_each_time(blueprints, formed)
        if self.backend.settings.clones == "never":
            return each_time
        try:
            return storing.obtained(self.backend, key, blueprints, formed)
        except storing.FormError as error:
            raise error.args[0] from None
        except (NotSealedError, CacheError) as error:
            if error.transient:
                raise
            self.backend.callbacks.tell(
                f"the cluster of {', '.join(blueprints)} is formed for each test, because it cannot be sealed: "
                f"{error.brief}. Tests give the same results, but are slower"
            )
            return each_time
