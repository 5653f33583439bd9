"""What to say of a name or a glob that is for no image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import islice
from typing import NamedTuple

from pytest_vmsandbox.catalogue import variants
from pytest_vmsandbox.catalogue.variants import SIGN
from pytest_vmsandbox.core.architecture import (
    ARCHITECTURES,
    by_any_name,
    debian_name,
    native_architecture,
)

_LISTED = 30  # names in an error
_CLOSE = 0.75  # how alike architectures are: arm and arm64, but not loongarch64 and aarch64
_FOLDER = (
    "If it is in a folder of yours, name that folder: vm_image_path (pytest), --image-path or "
    "VMSANDBOX_IMAGE_PATH (vmsandbox)"
)


class Known(NamedTuple):
    """An image that there is.

    Attributes:
        architecture: empty if its definition is wrong.
    """

    name: str
    architecture: str

    @property
    def stem(self) -> str:
        """The name without the architecture."""
        return variants.stem_of(self.name, self.architecture) if self.architecture else self.name


def remedy(name: str, images: Sequence[Known]) -> str:
    """What to do if there is no image with a name, or none that fits a glob."""
    if meant := by_any_name(name.lower()):
        own = [one.name for one in images if one.architecture == meant]
        all_of_them = f"its images are: {some(own)}. {_with('*', meant)!r} selects all of them"
        return f"this is an architecture, and {all_of_them if own else 'no image is for it'}"
    stem, architecture = variants.guessed(name) or (name, native_architecture())
    if stem == name and (said := _of_ending(name, images)):
        return said
    fitting = [one for one in images if fnmatchcase(one.stem, stem) and one.architecture]
    if not fitting:
        return _of_stem(stem, architecture if stem != name else "", images)
    if right := [one.name for one in fitting if one.architecture == architecture]:
        return _guess([_with(stem, architecture)] if variants.is_glob(stem) else right)
    said = f"{stem!r} is there only for {_architectures(fitting)}, not for {debian_name(architecture)}. "
    if stem == name:  # this machine's, which may have none
        return f"{said}They are emulated here: {some(one.name for one in fitting)}"
    same = [one.name for one in images if one.architecture == architecture]
    return f"{said}For {debian_name(architecture)} there are: {some(same)}"


def some(names: Iterable[str]) -> str:
    """Names, as an error lists them."""
    names = [*names]
    shown = ", ".join(islice(names, _LISTED)) or "none"
    more = len(names) - _LISTED
    return f"{shown} and {more} more (vmsandbox images list)" if more > 0 else shown


def _of_ending(name: str, images: Sequence[Known]) -> str:
    """What to say of a name that would be right with another architecture; otherwise empty."""
    stem, sign, end = name.rpartition(SIGN)
    fitting = [one for one in images if fnmatchcase(one.stem, stem) and one.architecture]
    own = [one.stem for one in images if SIGN in one.stem]  # such signs say nothing here
    if not sign or not fitting or variants.is_glob(end) or get_close_matches(name, own):
        return ""
    if close := get_close_matches(end.lower(), _spelled(fitting), cutoff=_CLOSE):
        meant = dict.fromkeys(map(by_any_name, close))
        if variants.is_glob(stem):
            return _guess([_with(stem, architecture) for architecture in meant])
        return _guess([one.name for one in fitting if one.architecture in meant])
    return f"{end!r} is no architecture. {stem!r} is there for {_architectures(fitting)}"


def _of_stem(stem: str, architecture: str, images: Sequence[Known]) -> str:
    """What to say if no image has such a name, for any architecture.

    Args:
        architecture: which one was asked for; empty if that was not said.
    """
    here = (architecture,) if architecture else (native_architecture(), "")
    names = {one.stem: one.name for one in images if one.architecture in here}
    close = [] if variants.is_glob(stem) else get_close_matches(stem.lower(), names)
    guess = f"{_guess([names[each] for each in close])} " if close else ""
    if architecture:
        return f"{guess}The images for {debian_name(architecture)} are: {some(names.values())}. {_FOLDER}"
    if not names and images:
        known = some(one.name for one in images)
        return (
            f"none is for {debian_name(here[0])}. Those that are emulated here: {known}. {_FOLDER}"
        )
    others = len(names) < len(images)
    more = "For other architectures: vmsandbox images list --all. " if others else ""
    return f"{guess}The images are: {some(names.values())}. {more}{_FOLDER}"


def _guess(names: Iterable[str]) -> str:
    return f"did you mean {' or '.join(map(repr, names))}?"


def _with(stem: str, architecture: str) -> str:
    return f"{stem}{SIGN}{debian_name(architecture)}"


def _architectures(images: Iterable[Known]) -> str:
    *most, last = sorted({debian_name(one.architecture) for one in images})
    return f"{', '.join(most)} and {last}" if most else last


def _spelled(images: Iterable[Known]) -> Mapping[str, None]:
    """Both names of the architectures of images."""
    there = [ARCHITECTURES[one.architecture] for one in images]
    return dict.fromkeys(name for one in there for name in (one.debian, one.name))
