"""The plan of a test: where it runs, and in which guest. Collection makes it from the test's markers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.settings import ISOLATIONS, Isolation
from pytest_vmsandbox.core.spec import HARDWARE_NAMES, Hardware, parse_kernel
from pytest_vmsandbox.plugin import cluster_marker, config as options
from pytest_vmsandbox.plugin.cluster_marker import ClusterMark

if TYPE_CHECKING:
    from pytest_vmsandbox.catalogue.catalogue import Catalogue

NO_IMAGE = "no-image"  # the parameter's id for tests to which no selected image applies
# Fixtures of tests that drive guests from this machine.
_DRIVES = {"vm", "vm_factory", "vm_artifacts", "vm_prepared", cluster_marker.NAME}
_USUAL = Hardware()
_ARGUMENTS = (*HARDWARE_NAMES, "networks", "isolation", "test_timeout", "skip", "xfail")


class Variant(NamedTuple):
    """The system that a test runs on.

    Attributes:
        image: the image.
        kernel: the path of another kernel than the image's; None for the image's own.
        release: the kernel's name in ids; empty for the image's own.
    """

    image: str
    kernel: Path | None = None
    release: str = ""

    @property
    def label(self) -> str:
        """What ids of tests show."""
        return f"{self.image}+{self.release}" if self.release else self.image


class Place(NamedTuple):
    """Which guest a test runs inside. Tests with the same place share a guest.

    Attributes:
        shared: what shares the guest: ``session``, a file, or a test.
        networks: the names of its own networks.
        cluster: the cluster that the guest is a machine of; None if it is none.
    """

    image: str
    hardware: Hardware
    shared: str
    networks: tuple[str, ...] = ()
    cluster: ClusterMark | None = None


class Repetition(NamedTuple):
    """What an item repeats.

    Attributes:
        test: the id of the test.
        number: of the repetition, from 1.
    """

    test: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is decided for a test.

    Attributes:
        image: empty for a test that needs no guest.
        release: of the kernel, as ids show it, if it is not the image's own.
        networks: the names of networks of its guest's own.
        is_inside: whether it belongs inside its guest; if not, it drives the guest from here.
        isolation: which tests share the guest.
        cluster: that of the machine it runs inside; None if that is a guest of its own.
        plain: the test's id without the image.
        is_remote: whether only the guest could collect it.
        indices: of its parameters, without that of the image; None if it has none.
        skip, xfail: the marker's reason for this image; None without one.
        is_rerun: whether a plugin may run the test again when it fails.
        timeout: seconds for the test inside its guest; None for the run's default.
        call_timeout: seconds for the test's function alone; None for no limit.
        repetition: the number of this repetition, from 1; 0 without ``--vm-repeat``.
        marks: the test's marks at that time.
    """

    image: str
    hardware: Hardware
    is_inside: bool
    isolation: Isolation
    plain: str
    cluster: ClusterMark | None = None
    release: str = ""
    networks: tuple[str, ...] = ()
    is_remote: bool = False
    indices: Mapping[str, int] | None = None
    skip: str | None = None
    xfail: str | None = None
    is_rerun: bool = False
    timeout: float | None = None
    call_timeout: float | None = None
    repetition: int = 0
    marks: tuple[pytest.Mark, ...] = ()

    @property
    def variant(self) -> Variant:
        """The system that it runs on."""
        return Variant(self.image, self.hardware.kernel, self.release)

    @property
    def runs_inside(self) -> bool:
        """Whether the test runs in the guest. A test that is skipped needs no guest."""
        return self.is_inside and self.skip is None

    @property
    def file(self) -> str:
        """Its file, relative to the rootdir."""
        return self.plain.partition("::")[0]

    @property
    def place(self) -> Place:
        """The place of the guest that it runs inside."""
        own = f"{self.plain}#{self.repetition}" if self.repetition else self.plain
        shared = {"session": "session", "module": self.file, "test": own}
        shared_by = shared[self.isolation]
        return Place(self.image, self.hardware, shared_by, self.networks, self.cluster)

    def shares_with(self, item: pytest.Item | None) -> bool:
        """Whether another test belongs inside the same guest."""
        return item is not None and plan_of(item).is_inside and plan_of(item).place == self.place

    @property
    def kind(self) -> Place:
        """The kind of its guest: equal for tests with one guest each of the same image and hardware."""
        return self.place._replace(shared="") if self.isolation == "test" else self.place


PLAN = pytest.StashKey[Plan]()
REPEATED = pytest.StashKey[Repetition]()  # set in items that are one of several repetitions
_NO_GUEST = Plan(image="", hardware=_USUAL, is_inside=False, isolation="test", plain="")


def plan_of(item: pytest.Item) -> Plan:
    """The plan of a test. It has no image if the test needs no guest, or is not collected yet."""
    return item.stash.get(PLAN, _NO_GUEST)


def selectable(item: pytest.Item) -> str:
    """The id by which users select a test. A repetition has the id of its test."""
    return item.stash[REPEATED].test if REPEATED in item.stash else item.nodeid


def limit(item: pytest.Item, seconds: float, *, of_call: bool) -> None:
    """Give a test the timeout of a plugin. The shorter of two timeouts applies.

    Args:
        of_call: whether the timeout is for the test's function alone.
    """
    plan = plan_of(item)
    if of_call:
        plan = replace(plan, call_timeout=float(seconds))
    else:
        plan = replace(plan, timeout=min(float(seconds), plan.timeout or seconds))
    item.stash[PLAN] = plan


def alike(items: Iterable[pytest.Item], plan: Plan) -> Iterator[Plan]:
    """The plans of all tests that belong inside the same kind of guest as `plan`."""
    return (other for other in map(plan_of, items) if other.is_inside and other.kind == plan.kind)


def variant_of(item: pytest.Item) -> Variant | None:
    """The system of a test, even before it has a plan; None if it needs none or none applies."""
    if PLAN not in item.stash and has_parameter(item):
        variant: Variant | None = item.callspec.params["_vm_image"]  # type: ignore[attr-defined]
        return variant
    plan = plan_of(item)
    return plan.variant if plan.image else None


def plain_nodeid(item: pytest.Item) -> str:
    """The id of a test without its image, even before it has a plan."""
    if PLAN in item.stash or not has_parameter(item):
        return plan_of(item).plain or item.nodeid
    identity: str = item.callspec.id  # type: ignore[attr-defined]
    base = item.nodeid.removesuffix(f"[{identity}]")
    # The rest is for other parameters. Their id may be "".
    variant = variant_of(item)
    rest = identity.removeprefix(variant.label if variant else NO_IMAGE)
    return f"{base}[{rest[1:]}]" if rest else base


def plain_indices(item: pytest.Item) -> dict[str, int] | None:
    """The indices of a test's parameters, without that of its image; None if it has none."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return None
    return {name: index for name, index in callspec.indices.items() if name != "_vm_image"} or None


def has_parameter(item: pytest.Item) -> bool:
    """Whether a test has a parameter for its image."""
    callspec = getattr(item, "callspec", None)
    return callspec is not None and "_vm_image" in callspec.params


# -- what markers say ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GuestRequest:
    """What the markers of one test ask for.

    Attributes:
        images: names and globs; empty for those of the run.
        kernels: paths, or ``image`` for the image's own; empty for those of the run.
        networks: names.
        isolation: None for the default.
        test_timeout: seconds for a test inside a guest; None for the default.
        skip, xfail: image glob → reason; those of the closest marker come first.
    """

    images: tuple[str, ...] = ()
    kernels: tuple[str | os.PathLike[str], ...] = ()
    hardware: Hardware = field(default_factory=Hardware)
    networks: tuple[str, ...] = ()
    isolation: Isolation | None = None
    test_timeout: float | None = None
    skip: Mapping[str, str] = field(default_factory=dict)
    xfail: Mapping[str, str] = field(default_factory=dict)


def read_marks(marks: Iterable[pytest.Mark], defaults: Hardware = _USUAL) -> GuestRequest:
    """What the `vm` markers of a test ask for.

    Each argument comes from the closest marker that sets it; `skip` and `xfail` add up.

    Args:
        marks: the closest first.
        defaults: the hardware without any marker.

    Raises:
        ConfigError: an argument is unknown or invalid.
    """
    marks = list(marks)
    single: dict[str, object] = {}
    reasons: dict[str, dict[str, str]] = {"skip": {}, "xfail": {}}
    for name, value in (pair for mark in marks for pair in mark.kwargs.items()):
        if name not in _ARGUMENTS:
            raise ConfigError(
                f"pytest.mark.vm has no argument {name!r}",
                remedy=f"use names or globs of images, and the arguments {', '.join(_ARGUMENTS)}",
            )
        if name in reasons:
            for glob, why in _reasons(name, value).items():
                reasons[name].setdefault(glob, why)
        else:
            single.setdefault(name, value)
    images = next((mark.args for mark in marks if mark.args), ())
    if (kernel := single.pop("kernel", None)) is not None:
        single["kernels"] = kernel
    ours = {name: read(single.pop(name)) for name, read in _READERS.items() if name in single}
    return GuestRequest(
        images=tuple(map(_image, images)),
        hardware=defaults.changed(single),
        skip=reasons["skip"],
        xfail=reasons["xfail"],
        **ours,
    )


def applicable(
    request: GuestRequest, selection: tuple[Sequence[str], bool], catalogue: Catalogue
) -> list[str]:
    """The images that a test runs on.

    Args:
        request: of the test.
        selection: the images of the run, and whether `--vm` named them. If not, the test also runs on
            an image that a marker names exactly.
        catalogue: all images.

    Raises:
        ConfigError: a pattern matches nothing in the catalogue.
    """
    selected, from_command_line = selection
    if not request.images:
        return list(selected)
    fitting = catalogue.fitting(request.images)
    images = [name for name in selected if name in fitting]
    if not from_command_line:
        images += catalogue.named(request.images)
    return list(dict.fromkeys(images))


def reason(reasons: Mapping[str, str], image: str, catalogue: Catalogue) -> str | None:
    """The reason of the first glob that matches an image."""
    fits = (why for glob, why in reasons.items() if image in catalogue.fitting([glob]))
    return next(fits, None)


def belongs_inside(node: pytest.Item, fixturenames: Iterable[str]) -> bool:
    """Whether a test, or a test function, belongs inside a guest.

    Raises:
        ConfigError: its marker `in_vm` is wrong, or contradicts its fixtures.
    """
    drives = not _DRIVES.isdisjoint(fixturenames)
    if (mark := node.get_closest_marker("in_vm")) is None:
        return options.inside(node.config) and not drives
    are_right = all(isinstance(arg, bool) for arg in mark.args)
    if mark.kwargs or len(mark.args) > 1 or not are_right:
        raise ConfigError(
            "pytest.mark.in_vm takes no argument but True or False",
            remedy="give images and hardware to pytest.mark.vm",
        )
    if drives and mark.args != (False,):
        raise _contradiction(fixturenames)
    return mark.args != (False,)


def _contradiction(fixturenames: Iterable[str]) -> ConfigError:
    about = "a test that runs inside a guest cannot drive a guest: it has the marker in_vm, and asks for the"
    if cluster_marker.NAME in fixturenames:
        return ConfigError(
            f"{about} fixture vm_cluster",
            remedy="remove the marker in_vm or that fixture. With inside= in the marker vm_cluster, a test runs "
            "inside one machine without that fixture, and reaches the others by their names",
        )
    return ConfigError(
        f"{about} fixture vm or another one that drives guests",
        remedy="remove the marker in_vm or that fixture",
    )


def _isolation(value: object) -> object:
    if value not in ISOLATIONS:
        raise ConfigError(
            f"isolation={value!r} is unknown", remedy=f"use one of {', '.join(ISOLATIONS)}"
        )
    return value


def _kernels(value: object) -> tuple[str | os.PathLike[str], ...]:
    """The kernels that a marker names: one, or a list of them."""
    kernels = (value,) if isinstance(value, str | os.PathLike) else value
    if not isinstance(kernels, Iterable):
        kernels = (value,)
    for kernel in (kernels := tuple(kernels)) or ("",):
        parse_kernel(kernel)
    return kernels


def _networks(value: object) -> tuple[str, ...]:
    """The names of networks in a marker: one, or several."""
    from pytest_vmsandbox.guests.networks.subnets import checked_name
    from pytest_vmsandbox.machine.cmdline import PORTS

    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ConfigError(
            f"networks={value!r} is not a list of names",
            remedy="write for instance networks=['lan']: each guest of the marker gets new networks of these names",
        )
    names = tuple(map(checked_name, (value,) if isinstance(value, str) else value))
    if len({*names}) < len(names):
        raise ConfigError(
            f"networks={value!r} names a network twice", remedy="name each network once"
        )
    if len(names) > len(PORTS):
        raise ConfigError(
            f"networks={value!r} are {len(names)} networks, and a guest can be on {len(PORTS)}",
            remedy=f"name at most {len(PORTS)}",
        )
    return names


def _image(arg: object) -> str:
    if not isinstance(arg, str) or not arg:
        raise ConfigError(
            f"pytest.mark.vm({arg!r}): an image is a name or a glob, which is a str",
            remedy="write for instance pytest.mark.vm('debian-*')",
        )
    return arg


def _reasons(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(part, str) for pair in value.items() for part in pair
    ):
        raise ConfigError(
            f"{name}={value!r} does not map image globs to reasons",
            remedy=f"write for instance {name}={{'debian-12': 'no nftables'}}",
        )
    return dict(value)


_READERS: dict[str, Callable[[object], Any]] = {
    "isolation": _isolation,
    "kernels": _kernels,
    "networks": _networks,
    "test_timeout": lambda value: options.seconds(value, "test_timeout"),
}
