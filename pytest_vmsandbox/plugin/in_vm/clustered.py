"""Opens clusters for tests that run inside one of their machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.clusters.cluster import Cluster
from pytest_vmsandbox.guests.clusters.sealed import SealedCluster
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.provision import PreparedImage, Step
from pytest_vmsandbox.plugin.cluster_marker import ClusterMark
from pytest_vmsandbox.plugin.plan import Place

Facts = Mapping[str, Any]


class Clustered:
    """The clusters of one run whose machines run tests.

    A cluster that is formed once has no session in it: the session depends on the project's files, and
    forming may take long. So the first clone of it gets the session. If more tests are to come, that clone is
    sealed with it.

    Args:
        tell: prints a line at the end of the run.
    """

    def __init__(self, factory: GuestFactory, tell: Callable[[str], object]) -> None:
        self._factory = factory
        self._tell = tell
        self._collected: dict[Place, tuple[SealedCluster, Facts]] = {}  # by kind

    @contextmanager
    def opened(
        self,
        mark: ClusterMark,
        image: PreparedImage,
        kind: Place,
        session: Step | None,
        *,
        more: Callable[[], bool],
    ) -> Iterator[tuple[Cluster, Facts]]:
        """A cluster, and what its session has collected.

        Args:
            image: what the machine inside is made of.
            kind: of its guest.
            session: starts a session in it; None if the caller does.
            more: tells whether more tests of this kind will come.

        Raises:
            VMSandboxError: there can be no such cluster.
        """
        factory = self._factory
        assert mark.inside is not None
        if mark.form is None:
            if session is not None:
                image = factory.with_step(image, session)
            with factory.cluster(**mark.arguments(image)) as cluster:
                yield cluster, cluster[mark.inside].engine.facts
        elif kind in self._collected:
            sealed, facts = self._collected[kind]
            with factory.cluster(sealed) as cluster:
                yield cluster, facts
        else:
            formed = factory.prepare_cluster(
                form=mark.form, depends_on=mark.depends_on, **mark.arguments(image)
            )
            with factory.cluster(formed) as cluster:
                facts = {} if session is None else session.run(cluster[mark.inside]) or {}
                if session is not None and more():
                    self._seal(cluster, kind, facts)
                yield cluster, facts

    def _seal(self, cluster: Cluster, kind: Place, facts: Facts) -> None:
        try:
            self._collected[kind] = cluster.seal(), facts
        except ConfigError as error:
            names = ", ".join(cluster)
            self._tell(f"each test inside the cluster of {names} is collected again: {error.brief}")
