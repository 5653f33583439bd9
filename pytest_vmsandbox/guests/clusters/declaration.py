"""What a cluster is made of, as frozen values, and how we read what users write."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pytest_vmsandbox.catalogue.variants import is_glob
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.networks.subnets import checked_name, checked_settings
from pytest_vmsandbox.guests.provision import PreparedImage, PreparedLayer

Base = str | PreparedImage | PreparedLayer
Kind = Literal["machine", "network"]
DEFAULT_NETWORK = "lan"
# Of a network, as `GuestFactory.network` takes them.
_SETTINGS = {"ipv4": None, "ipv6": None, "addresses": "fixed", "seed": 1}
_RESERVED = ("localhost", "localdomain", "broadcasthost")
_NAME = re.compile(r"(?!\d+$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MACHINES = "machines={'db1': 'debian-13', 'db2': {'image': 'debian-13', 'memory': '1GiB'}}"
_NETWORKS = "networks={'lan': ['db1', 'db2'], 'wan': {'machines': ['db1'], 'ipv4': '10.9.0.0/24'}}"


@dataclass(frozen=True)
class Member:
    """A machine of a cluster.

    Attributes:
        name: its hostname.
        image: what it is made of.
        hardware: what differs from the run's default, as `Hardware.changed` takes it.
    """

    name: str
    image: Base
    hardware: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """A network of a cluster.

    Attributes:
        machines: the names of those that are connected, in their order.
        settings: all arguments of `Networks.make` but the name.
    """

    name: str
    machines: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=lambda: dict(_SETTINGS))


@dataclass(frozen=True)
class Declaration:
    """The machines and networks of a cluster, in the order in which they are declared."""

    machines: tuple[Member, ...]
    networks: tuple[Segment, ...]

    @classmethod
    def read(cls, machines: object, networks: object = None) -> Declaration:
        """What users declare.

        Args:
            machines: name → image, or a mapping of ``image`` and hardware.
            networks: name → names of machines, or a mapping of ``machines`` and settings. None for one
                network with all machines.

        Raises:
            ConfigError: something is invalid. Whether the images exist is not checked.
        """
        members = tuple(_member(name, made_of) for name, made_of in _named(machines, "machine"))
        if not members:
            raise ConfigError("a cluster needs a machine", remedy=f"write for instance {_MACHINES}")
        names = tuple(member.name for member in members)
        if networks is None:
            return cls(members, (Segment(DEFAULT_NETWORK, names),))
        segments = (_segment(name, said, names) for name, said in _named(networks, "network"))
        return cls(members, tuple(segments))

    def networks_of(self, machine: str) -> list[str]:
        """The names of the networks that a machine is connected to, in order."""
        return [network.name for network in self.networks if machine in network.machines]


def _named(value: object, kind: Kind) -> list[tuple[str, object]]:
    """Pairs of a name and what is said of it."""
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{kind}s={value!r} does not map names to {kind}s",
            remedy=f"write for instance {_MACHINES if kind == 'machine' else _NETWORKS}",
        )
    for name in value:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(
                f"{name!r} cannot be the name of a {kind}",
                remedy="use up to 63 lower-case letters, digits and '-', with a letter in it, such as 'db1'",
            )
    return list(value.items())


def _member(name: str, value: object) -> Member:
    arguments: dict[str, object] = {"image": value}
    if isinstance(value, Mapping):
        arguments = dict(value)
    image = arguments.pop("image", None)
    where = f"the machine {name!r}"
    try:
        Hardware().changed(arguments)
    except ConfigError as error:
        remedy = error.remedy if image else f"name the image, 'image': 'debian-13'; {error.remedy}"
        raise ConfigError(f"{where}: {error.brief}", remedy=remedy) from error
    if not isinstance(image, str | PreparedImage | PreparedLayer) or not image:
        raise ConfigError(
            f"{where} has no image" if image in (None, "") else f"{where}: {image!r} is no image",
            remedy="name one ('vmsandbox images list' shows them), or use what vm_factory.prepare() "
            f"returned: {_MACHINES}",
        )
    if isinstance(image, str) and (is_glob(image) or image.startswith("!") or image == "all"):
        raise ConfigError(
            f"{where}: {image!r} may stand for several images, and a machine is made of one",
            remedy="name the image. To test several, parametrize a fixture that calls vm_factory.cluster()",
        )
    return Member(name, image, arguments)


def _segment(name: str, value: object, known: tuple[str, ...]) -> Segment:
    settings: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"machines": value}
    where = f"the network {name!r}"
    machines = settings.pop("machines", known)
    if isinstance(machines, str) or not isinstance(machines, Collection):
        raise ConfigError(
            f"{where}: {machines!r} is not a list of machines",
            remedy=f"write for instance {_NETWORKS}",
        )
    if unknown := [each for each in machines if each not in known]:
        raise ConfigError(
            f"{where}: there is no machine {unknown[0]!r}",
            remedy=f"use one of {', '.join(known)}, or add it to machines=",
        )
    if not machines:
        raise ConfigError(
            f"{where} has no machine", remedy="name the machines on it, or leave out the network"
        )
    if len({*machines}) < len(machines):
        raise ConfigError(f"{where} names a machine twice", remedy="name each of its machines once")
    if wrong := [each for each in settings if each not in _SETTINGS]:
        raise ConfigError(
            f"{where} has no setting {wrong[0]!r}",
            remedy=f"use machines, {', '.join(_SETTINGS)}",
        )
    settings = {**_SETTINGS, **settings}
    try:
        checked_name(name)
        checked_settings(**settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.brief}", remedy=error.remedy) from error
    return Segment(name, tuple(each for each in known if each in machines), settings)
