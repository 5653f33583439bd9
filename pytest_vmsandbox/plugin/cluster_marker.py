"""What the marker `vm_cluster` says, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmsandbox.core.errors import ConfigError

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.clusters.declaration import Member
    from pytest_vmsandbox.guests.provision import PreparedImage

NAME = "vm_cluster"  # the marker and the fixture
ARGUMENTS = ("machines", "networks", "inside", "form", "depends_on")
_BY_POSITION = ARGUMENTS[:2]
_EXAMPLE = "@pytest.mark.vm_cluster({'db1': 'debian-13', 'db2': 'debian-13'})"


@dataclass(frozen=True, kw_only=True)
class ClusterMark:
    """A cluster, as a marker declares it. Equal ones are declared alike.

    Attributes:
        key: a text of all arguments.
        machines: image and hardware of each, by name.
        networks: as `GuestFactory.cluster` takes them.
        inside: the machine that tests inside run in; None if nobody has said it.
        form: forms the cluster once, for all tests; None if each test has fresh machines.
        depends_on: what `form` depends on.
    """

    key: str
    machines: Mapping[str, Member] = field(compare=False)
    networks: Any = field(compare=False)
    inside: str | None = field(compare=False)
    form: Callable[..., object] | None = field(compare=False)
    depends_on: Sequence[Any] = field(compare=False)

    def arguments(self, image: PreparedImage | None = None) -> dict[str, Any]:
        """The arguments of `GuestFactory.cluster`.

        Args:
            image: what the machine inside is made of; None for its own image.
        """
        made_of = {name: {"image": it.image, **it.hardware} for name, it in self.machines.items()}
        if image is not None and self.inside is not None:
            made_of[self.inside]["image"] = image
            for hardware in made_of.values():  # else all would get the kernel of the test's guest
                hardware.setdefault("kernel", None)
        networks = {} if self.networks is None else {"networks": self.networks}
        return {"machines": made_of, **networks}


def read(node: pytest.Item) -> ClusterMark:
    """What the closest marker of a test says. Whether the images exist is not checked.

    Raises:
        ConfigError: there is no marker, or something in it is wrong.
    """
    from pytest_vmsandbox.guests.clusters.declaration import Declaration

    said = _said(node)
    declared = Declaration.read(said["machines"], said.get("networks"))
    machines = {member.name: member for member in declared.machines}
    for name, member in machines.items():
        if not isinstance(member.image, str):
            raise ConfigError(
                f"the machine {name!r}: a marker takes names of images only",
                remedy="for prepared images, write a fixture that calls vm_factory.cluster()",
            )
    inside, form, depends_on = (said.get(name) for name in ARGUMENTS[2:])
    if inside is not None and inside not in [*machines]:  # it may be anything, such as a list
        raise ConfigError(
            f"inside={inside!r}: there is no such machine",
            remedy=f"use one of {', '.join(machines)}, or add it to machines=",
        )
    if form is None and depends_on is not None:
        raise ConfigError(
            "depends_on= says what form= depends on, and there is no form=",
            remedy="name the function that forms the cluster, form=form, or leave out depends_on=",
        )
    if form is not None:
        _check_form(form, depends_on)
    return ClusterMark(
        key=f"{declared} {inside} {id(form)} {depends_on}",
        machines=machines,
        networks=said.get("networks"),
        inside=next(iter(machines)) if inside is None and len(machines) == 1 else inside,
        form=form,
        depends_on=depends_on or (),
    )


def _check_form(form: object, depends_on: object) -> None:
    from pytest_vmsandbox.guests.provision import check_inputs

    if not callable(form):
        raise ConfigError(
            f"form={form!r} cannot be called", remedy="pass a function that takes a cluster"
        )
    try:
        signature = inspect.signature(form)
    except ValueError:  # some functions that are written in C have none
        pass
    else:
        try:
            signature.bind(object())
        except TypeError as error:
            raise ConfigError(
                f"form={form!r} cannot be called with a cluster alone: {error}",
                remedy="pass a function that takes one argument, the cluster",
            ) from error
    if depends_on is not None:
        check_inputs("form=", depends_on)


def _said(node: pytest.Item) -> dict[str, Any]:
    """The arguments of the closest marker, by name."""
    if (mark := node.get_closest_marker(NAME)) is None:
        raise ConfigError(
            "the fixture vm_cluster needs the marker vm_cluster, which declares the machines",
            remedy=f"add for instance {_EXAMPLE}",
        )
    found = {**dict(zip(_BY_POSITION, mark.args, strict=False)), **mark.kwargs}
    unknown = [
        *mark.args[len(_BY_POSITION) :],
        *(name for name in found if name not in ARGUMENTS),
    ]
    twice = [name for name, _ in zip(_BY_POSITION, mark.args, strict=False) if name in mark.kwargs]
    if unknown or twice or "machines" not in found:
        what = (
            f"does not take {unknown[0]!r}" if unknown else f"needs {[*twice, 'machines'][0]}= once"
        )
        raise ConfigError(
            f"pytest.mark.vm_cluster {what}",
            remedy=f"write {_EXAMPLE}, and networks={{…}}, inside=, form= or depends_on= if you need them",
        )
    return found


def of_inside(node: pytest.Item) -> ClusterMark | None:
    """The cluster of a test that runs inside a machine; None if that machine is a guest of its own.

    Raises:
        ConfigError: the marker is wrong, or does not say in which machine.
    """
    if node.get_closest_marker(NAME) is None:
        return None
    mark = read(node)
    if mark.inside is not None:
        return mark
    if node.get_closest_marker("in_vm") is None:  # by --in-vm, and it does not ask for the cluster
        return None
    names = ", ".join(mark.machines)
    raise ConfigError(
        f"this test runs inside a machine, and its marker vm_cluster does not say in which one of {names}",
        remedy=f"add inside={next(iter(mark.machines))!r} to the marker vm_cluster. To drive the machines from "
        "here, remove the marker in_vm and ask for the fixture vm_cluster",
    )
