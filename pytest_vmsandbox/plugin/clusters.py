"""The marker `vm_cluster`: what it says, and what the run needs for the tests that have it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.plugin import config as options
from pytest_vmsandbox.plugin.run import Run

if TYPE_CHECKING:
    from pytest_vmsandbox.core.spec import Hardware

NAME = "vm_cluster"  # the marker and the fixture
_ARGUMENTS = ("machines", "networks")
_EXAMPLE = "@pytest.mark.vm_cluster({'db1': 'debian-13', 'db2': 'debian-13'})"


def asks(item: pytest.Item) -> bool:
    """Whether a test asks for the fixture."""
    return NAME in getattr(item, "fixturenames", ())


def check(run: Run, items: Iterable[pytest.Item]) -> None:
    """Note what is wrong in the markers of tests that ask for a cluster."""
    for item in filter(asks, items):
        try:
            guests(run, item)
        except ConfigError as error:
            run.note_usage_error(item.nodeid, error)


def arguments(item: pytest.Item) -> dict[str, Any]:
    """What the closest marker of a test says, as `GuestFactory.cluster` takes it.

    Raises:
        ConfigError: there is no marker, or it has other arguments.
    """
    if (mark := item.get_closest_marker(NAME)) is None:
        raise ConfigError(
            "the fixture vm_cluster needs the marker vm_cluster, which declares the machines",
            remedy=f"add for instance {_EXAMPLE}",
        )
    found = {**dict(zip(_ARGUMENTS, mark.args, strict=False)), **mark.kwargs}
    unknown = [*mark.args[2:], *(name for name in found if name not in _ARGUMENTS)]
    twice = [name for name, _ in zip(_ARGUMENTS, mark.args, strict=False) if name in mark.kwargs]
    if unknown or twice or "machines" not in found:
        what = (
            f"does not take {unknown[0]!r}" if unknown else f"needs {[*twice, 'machines'][0]}= once"
        )
        raise ConfigError(
            f"pytest.mark.vm_cluster {what}",
            remedy=f"write {_EXAMPLE}, and networks={{…}} if you need it",
        )
    return found


def guests(run: Run, item: pytest.Item) -> list[tuple[str, Hardware]]:
    """Image and hardware of each machine that a test asks for.

    Raises:
        ConfigError: its marker is wrong, or a machine cannot be as it says.
    """
    from pytest_vmsandbox.guests.clusters.declaration import Declaration

    found = []
    for member in Declaration.read(**arguments(item)).machines:
        if not isinstance(member.image, str):
            raise ConfigError(
                f"the machine {member.name!r}: a marker takes names of images only",
                remedy="for prepared images, write a fixture that calls vm_factory.cluster()",
            )
        try:
            definition = run.catalogue.get(member.image)
            hardware = definition.hardware(options.hardware(run.config), member.hardware)
            definition.check(hardware)
        except ConfigError as error:
            error.brief = f"the machine {member.name!r}: {error.brief}"
            raise
        found.append((definition.name, hardware))
    return found


def guests_to_come(run: Run, items: Iterable[pytest.Item]) -> Iterator[tuple[str, Hardware]]:
    """Image and hardware of each machine that tests will ask for."""
    for item in filter(asks, items):
        if item.get_closest_marker("skip") is None:
            with suppress(ConfigError):  # the test reports it
                yield from guests(run, item)
