"""Clusters of tests: what the run needs for them, and how they are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.plugin import cluster_marker, config as options
from pytest_vmsandbox.plugin.cluster_marker import NAME, ClusterMark
from pytest_vmsandbox.plugin.plan import plan_of, read_marks
from pytest_vmsandbox.plugin.run import Run

if TYPE_CHECKING:
    from pytest_vmsandbox.core.spec import Hardware
    from pytest_vmsandbox.guests.clusters.cluster import Cluster
    from pytest_vmsandbox.guests.factory import GuestFactory


def opened(factory: GuestFactory, mark: ClusterMark) -> AbstractContextManager[Cluster]:
    """The cluster of a test that drives it: fresh machines, or a clone of those that were formed."""
    if mark.form is None:
        return factory.cluster(**mark.arguments())
    formed = factory.prepare_cluster(form=mark.form, depends_on=mark.depends_on, **mark.arguments())
    return factory.cluster(formed)


def check(run: Run, items: Iterable[pytest.Item]) -> None:
    """Note what is wrong in the markers of tests that ask for a cluster."""
    for item in filter(_asks, items):
        try:
            guests(run, cluster_marker.read(item))
            if _has_only_a_cluster(item):  # else its plan has been made of the marker vm
                check_images(run, item)
        except ConfigError as error:
            run.note_usage_error(item.nodeid, error)


def check_images(run: Run, node: pytest.Item) -> None:
    """Check the marker `vm` of a test whose image a cluster declares.

    Raises:
        ConfigError: it is wrong, or names no image.
    """
    asked = read_marks(node.iter_markers("vm"), options.hardware(run.config))
    for patterns in (asked.images, *([glob] for glob in (*asked.skip, *asked.xfail))):
        if patterns:
            run.catalogue.fitting(patterns)


def guests(run: Run, mark: ClusterMark) -> dict[str, tuple[str, Hardware]]:
    """Image and hardware of each machine of a cluster, by name.

    Raises:
        ConfigError: a machine cannot be as the marker says.
    """
    found = {}
    for member in mark.machines.values():
        try:
            definition = run.catalogue.get(str(member.image))
            hardware = definition.hardware(options.hardware(run.config), member.hardware)
            definition.check(hardware)
        except ConfigError as error:
            error.brief = f"the machine {member.name!r}: {error.brief}"
            raise
        found[member.name] = definition.name, hardware
    return found


def refused(config: pytest.Config, inside: Iterable[pytest.Item]) -> Iterator[str]:
    """Errors for what tests inside a machine of a cluster cannot have."""
    clustered = [item.nodeid for item in inside if plan_of(item).cluster is not None]
    if clustered and options.record(config):
        more = f" and {len(clustered) - 1} more" if clustered[1:] else ""
        yield (
            f"{clustered[0]}{more}: --vm-record records one guest, and this test runs inside a machine of a "
            "cluster\nRemedy: leave out --vm-record, or deselect such tests, by -k or --deselect"
        )
    for item in inside:
        plan = plan_of(item)
        if plan.is_remote and item.get_closest_marker(NAME) is not None:
            yield (
                f"{item.nodeid}: only the guest can import {plan.file}, so nobody here can read its marker "
                "vm_cluster\nRemedy: import what only guests have inside the tests, or move the test to another "
                "file"
            )


def without_effect(config: pytest.Config, items: Iterable[pytest.Item]) -> Iterator[str]:
    """Lines about what has no effect in the marker `vm`, because the cluster declares it."""
    usual = options.hardware(config)
    for item in items:
        mark, is_outside = plan_of(item).cluster, _has_only_a_cluster(item)
        if mark is None and not is_outside:
            continue
        with suppress(ConfigError):  # has been noted
            asked = read_marks(item.iter_markers("vm"), usual)
            has_hardware = asked.hardware != usual or asked.kernels or asked.networks
            ours = {
                "images": asked.images,
                "hardware and networks": has_hardware,
                "isolation": is_outside and asked.isolation not in (None, "test"),
                "reasons to skip and xfail": is_outside and (asked.skip or asked.xfail),
            }
            if idle := ", ".join(name for name, is_given in ours.items() if is_given):
                verb = "has" if idle == "isolation" else "have"
                machines = f"the machine {mark.inside!r} has" if mark else "its machines have"
                yield (
                    f"{idle} in the marker vm of {item.nodeid} {verb} no effect: the marker vm_cluster says what "
                    f"{machines}"
                )


def images(run: Run, items: Iterable[pytest.Item]) -> Iterator[str]:
    """The image of each machine of the clusters that tests will ask for."""
    for _, mark in _coming(items):
        with suppress(ConfigError):  # the test reports it
            yield from (image for image, _ in guests(run, mark).values())


def guests_to_come(run: Run, items: Iterable[pytest.Item]) -> Iterator[tuple[str, Hardware]]:
    """Image and hardware of each fresh machine that tests will ask for.

    The machine that a test runs inside is not among them, nor are those of clusters that are formed once.
    """
    for item, mark in _coming(items):
        plan = plan_of(item)
        with suppress(ConfigError):
            if mark.form is None and (not plan.is_inside or plan.isolation == "test"):
                for name, guest in guests(run, mark).items():
                    if not plan.is_inside or name != mark.inside:
                        yield guest


def _asks(item: pytest.Item) -> bool:
    """Whether a test asks for the fixture."""
    return NAME in getattr(item, "fixturenames", ())


def _has_only_a_cluster(item: pytest.Item) -> bool:
    """Whether a test drives a cluster, and has no other guest, so its marker `vm` is about nothing."""
    return _asks(item) and "_vm_image" not in item.fixturenames  # type: ignore[attr-defined]


def _coming(items: Iterable[pytest.Item]) -> Iterator[tuple[pytest.Item, ClusterMark]]:
    """The tests that will have a cluster, and their markers."""
    for item in items:
        if item.get_closest_marker("skip") is not None:
            continue
        if (mark := plan_of(item).cluster) is not None:
            yield item, mark
        elif _asks(item):
            with suppress(ConfigError):
                yield item, cluster_marker.read(item)
