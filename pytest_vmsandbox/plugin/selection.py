"""Which images and which hardware a test gets: what its `vm` markers say (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.settings import ISOLATIONS, Isolation
from pytest_vmsandbox.core.spec import HARDWARE_NAMES, Hardware

if TYPE_CHECKING:
    import pytest

_MOST_SECONDS = 86_400
_GLOB = frozenset("*?[!")
_ARGUMENTS = (*HARDWARE_NAMES, "isolation", "test_timeout", "skip", "xfail")


@dataclass(frozen=True, kw_only=True)
class GuestRequest:
    """What the markers of one test ask for.

    Attributes:
        images: names and globs; empty for those of the run.
        isolation: None for the default.
        test_timeout: seconds for a test inside a guest; None for the default.
        skip, xfail: image glob → reason, the closest marker's first.
    """

    images: tuple[str, ...] = ()
    hardware: Hardware = field(default_factory=Hardware)
    isolation: Isolation | None = None
    test_timeout: float | None = None
    skip: Mapping[str, str] = field(default_factory=dict)
    xfail: Mapping[str, str] = field(default_factory=dict)


def read_marks(marks: Iterable[pytest.Mark], defaults: Hardware) -> GuestRequest:
    """Resolve each argument from the closest marker that sets it; `skip` and `xfail` add up.

    Args:
        marks: the closest first.
        defaults: the hardware where no marker says otherwise.

    Raises:
        ConfigError: an argument is unknown or invalid.
    """
    images: tuple[str, ...] = ()
    single: dict[str, object] = {}
    reasons: dict[str, dict[str, str]] = {"skip": {}, "xfail": {}}
    for mark in marks:
        for name, value in mark.kwargs.items():
            if name not in _ARGUMENTS:
                raise ConfigError(
                    f"pytest.mark.vm has no argument {name!r}",
                    remedy=f"use image names or globs, and {', '.join(_ARGUMENTS)}",
                )
            if name in reasons:
                for glob, why in _reasons(name, value).items():
                    reasons[name].setdefault(glob, why)
            else:
                single.setdefault(name, value)
        if mark.args and not images:
            images = tuple(_image(arg) for arg in mark.args)
    ours = {name: read(single.pop(name)) for name, read in _READERS.items() if name in single}
    return GuestRequest(
        images=images,
        hardware=defaults.changed(single),
        skip=reasons["skip"],
        xfail=reasons["xfail"],
        **ours,
    )


def in_guest(marks: Iterable[pytest.Mark]) -> bool | None:
    """What the closest `in_vm` marker says; None where there is none.

    Raises:
        ConfigError: its argument is neither True nor False.
    """
    for mark in marks:
        are_right = all(isinstance(arg, bool) for arg in mark.args)
        if mark.kwargs or len(mark.args) > 1 or not are_right:
            raise ConfigError(
                "pytest.mark.in_vm takes no argument, or False",
                remedy="images and hardware are the arguments of pytest.mark.vm",
            )
        return bool(mark.args[0]) if mark.args else True
    return None


def applicable(
    request: GuestRequest,
    *,
    selected: Sequence[str],
    from_command_line: bool,
    select: Callable[[Sequence[str]], Sequence[str]],
) -> list[str]:
    """The images that a test runs on.

    Args:
        request: of the test.
        selected: the images of the run.
        from_command_line: whether `--vm` named them. If not, a literal name in a marker also
            runs where it was not selected.
        select: the names that patterns match in the catalogue.

    Raises:
        ConfigError: a pattern matches nothing in the catalogue.
    """
    if not request.images:
        return list(selected)
    matching = select(request.images)
    images = [name for name in selected if name in matching]
    if not from_command_line:
        images += [name for name in request.images if not _GLOB & set(name) and name != "all"]
    return list(dict.fromkeys(images))


def reason(reasons: Mapping[str, str], image: str) -> str | None:
    """The reason of the first glob that matches an image."""
    return next((why for glob, why in reasons.items() if fnmatchcase(image, glob)), None)


def _isolation(value: object) -> Isolation:
    for isolation in ISOLATIONS:
        if value == isolation:
            return isolation
    raise ConfigError(
        f"isolation={value!r} is unknown", remedy=f"use one of {', '.join(ISOLATIONS)}"
    )


def seconds(value: object, name: str) -> float:
    """A time-out that a user has written.

    Raises:
        ConfigError: it is no number of seconds, or is out of range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= _MOST_SECONDS:  # type: ignore[operator]
        raise ConfigError(
            f"{name}={value!r} is not a positive number of seconds",
            remedy=f"use more than 0 and at most {_MOST_SECONDS}, which is a day",
        )
    return float(value)  # type: ignore[arg-type]


def _image(arg: object) -> str:
    if not isinstance(arg, str) or not arg:
        raise ConfigError(
            f"pytest.mark.vm({arg!r}): an image is named by a str", remedy="for instance 'debian-*'"
        )
    return arg


def _reasons(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(part, str) for pair in value.items() for part in pair
    ):
        raise ConfigError(
            f"{name}={value!r} does not map image globs to reasons",
            remedy=f"for instance {name}={{'debian-12': 'no nftables'}}",
        )
    return dict(value)


_READERS: dict[str, Callable[[object], Any]] = {
    "isolation": _isolation,
    "test_timeout": lambda value: seconds(value, "test_timeout"),
}
