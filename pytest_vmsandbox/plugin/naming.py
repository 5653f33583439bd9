"""The ids of tests. An id has the image in it, and users can also write the plain id without it.

``test_x[2]`` in a plain run is ``test_x[debian-13-2]`` in a run inside guests. Ids that are shown
always have the image. pytest compares ids and names in five places. Here we make both match.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.plugin import plan as plans
from pytest_vmsandbox.plugin.run import Run

_WORD = re.compile(r"[\w:+.\[\]\\/-]+")  # of an expression of -k


class _Name(str):
    """A test's name while pytest selects tests. It equals the name with and without the image."""

    __slots__ = ("plain", "systems")
    plain: str
    systems: tuple[str, ...]  # the image, the kernel if it is not the image's own, and both

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or self.plain == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def lower(self) -> str:
        """The text in which ``-k`` looks for its words."""
        words = _Words(str.lower(self))
        words.plain = self.plain.lower()
        words.systems = tuple(map(str.lower, self.systems))
        return words


class _Words(_Name):
    """A test's name for ``-k``. Image and kernel match only a word that has the whole name of one."""

    __slots__ = ()

    def __contains__(self, word: object) -> bool:
        if not isinstance(word, str):
            return False
        if word in self.systems:
            return True
        if any(system in word for system in self.systems) and str.__contains__(self, word):
            return True
        return word in self.plain


def give_both_names(items: Iterable[object]) -> None:
    """Let pytest also select tests by their plain names, until `give_full_names`."""
    for item in items:
        if isinstance(item, pytest.Item) and (variant := plans.variant_of(item)) is not None:
            plain = plans.plain_nodeid(item)[len(item.nodeid) - len(item.name) :]
            name = item.name = _Name(item.name)
            name.plain = plain
            name.systems = (
                *(variant.image, variant.label),
                *([variant.release] if variant.release else []),
            )


def give_full_names(items: Iterable[pytest.Item]) -> None:
    """Give tests their ordinary names back."""
    for item in items:
        item.name = str.__str__(item.name)


def deselect_by_plain_ids(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Let ``--deselect`` also match the beginnings of plain ids."""
    if prefixes := tuple(config.getoption("deselect", default=None) or ()):
        config.option.deselect += [
            item.nodeid for item in items if plans.plain_nodeid(item).startswith(prefixes)
        ]


def tell_of_words(run: Run, items: Sequence[pytest.Item]) -> None:
    """Tell that a word of ``-k`` names an image or an architecture, if no test is left by it.

    Args:
        items: all tests, before any was deselected. `give_both_names` has seen them.
    """
    words = [word.lower() for word in _WORD.findall(run.config.getoption("keyword", default=""))]
    if "not" in words or not any(map(plans.variant_of, items)):
        return
    with suppress(ConfigError):
        for word in words:
            meant = _meant(run, word)
            if meant and not any(word in item.name.lower() for item in items):
                run.tell(
                    f"{word!r} in -k is in no test's name. Images are selected by --vm, such as "
                    f"{shlex.join(f'--vm={pattern}' for pattern in meant)}"
                )


def _meant(run: Run, word: str) -> list[str]:
    """The images that a word may mean."""
    # Suites without guests do not need these.
    from pytest_vmsandbox.catalogue import variants
    from pytest_vmsandbox.core.architecture import by_any_name, debian_name

    catalogue = run.catalogue
    names = catalogue.names()
    by_spelling = {name.lower(): name for name in [*names, *catalogue.spellings]}
    if word in by_spelling:
        return [by_spelling[word]]
    if not (architecture := by_any_name(word)):
        return []
    selected = [variants.guessed(name) or (name, "") for name in run.images()]
    wanted = (variants.variant_name(stem, architecture) for stem, _ in selected)
    found = [name for name in dict.fromkeys(wanted) if name in names]
    return found or catalogue.select([f"*{variants.SIGN}{debian_name(architecture)}"])[:1]


def not_selected(run: Run, args: Iterable[str]) -> list[str]:
    """Remedies if pytest has not found one of these ids: it may name an image that is not selected."""
    remedies = []
    with suppress(ConfigError):
        selected = run.images()
        for arg in args:
            remedies += _with_short_name(run, arg, selected)
            named = [name for name in run.catalogue.names() if _without_image(arg, name) != arg]
            if named and not {*named} & {*selected}:
                image = max(named, key=len)
                remedies.append(
                    f"{arg} names the image {image}, which is not selected\nRemedy: add --vm={image}"
                )
    return remedies


def _with_short_name(run: Run, arg: str, selected: Sequence[str]) -> list[str]:
    """The remedy for an id that spells the name of a selected image with its architecture."""
    return [
        f"{arg} names the image {name} by a longer name\nRemedy: use {with_image(plain, name)}"
        for longer, name in run.catalogue.spellings.items()
        if name in selected and (plain := _without_image(arg, longer)) != arg
    ]


def know_again(run: Run, nodeids: Sequence[str]) -> None:
    """Let ``--lf``, ``--ff``, ``--nf`` and ``--sw`` recognize tests by their ids in former runs.

    The former run may have been a plain one and this one inside guests, or the other way round.

    Args:
        nodeids: some or all tests of this run. You may call this several times.
    """
    plugins: Any = run.config.pluginmanager
    last_failed = plugins.get_plugin("lfplugin")
    if last_failed is not None and last_failed.active:
        for former, ids in _now_called(run, last_failed.lastfailed, nodeids).items():
            del last_failed.lastfailed[former]
            last_failed.lastfailed.update(dict.fromkeys(ids, True))
    stepwise = plugins.get_plugin("stepwiseplugin")
    if stepwise is not None and (former := stepwise.cached_info.last_failed):
        now = _now_called(run, [former], nodeids)
        stepwise.cached_info.last_failed = now.get(former, [former])[0]
    new_first = plugins.get_plugin("nfplugin")
    if new_first is not None and new_first.active:
        for ids in _now_called(run, new_first.cached_nodeids, nodeids).values():
            new_first.cached_nodeids.update(ids)


def _now_called(run: Run, known: Iterable[Any], nodeids: Sequence[str]) -> dict[Any, list[Any]]:
    """Former ids of these tests → their ids now, where the two differ.

    Args:
        known: ids as pytest keeps them: texts, or since pytest 9.2 objects made from texts.
    """
    by_text = {str(nodeid): nodeid for nodeid in known}
    found: dict[Any, list[Any]] = {}
    images: Sequence[str] = ()
    if by_text:
        with suppress(ConfigError):  # reported where it matters
            images = [*run.catalogue.names(), *run.labels]
    others = _on_other_kernels(by_text, nodeids, run.labels)
    for nodeid in nodeids:
        for other in _namesakes(nodeid, images) | others.get(nodeid, set()):
            if (former := by_text.get(other)) is not None:
                kept = getattr(type(former), "parse", str)(nodeid)
                found.setdefault(former, []).append(kept)
    return found


def _on_other_kernels(
    known: Iterable[str], nodeids: Sequence[str], labels: Iterable[str]
) -> dict[str, set[str]]:
    """Ids of tests → former ids on another release of a kernel, which may change with each build.

    If a test runs on several kernels, nobody knows which one was which.

    Args:
        known: ids of former runs.
        nodeids: of this run.
        labels: the images of this run, with the releases of their kernels.
    """
    places: dict[tuple[str, str, str], list[str]] = {}
    for nodeid in nodeids:
        base, rest = _at_bracket(nodeid)
        for label in labels:
            if rest.startswith((f"{label}-", f"{label}]")):
                image, end = label.partition("+")[0], rest.removeprefix(label)
                places.setdefault((base, image, end), []).append(nodeid)
    former: dict[tuple[str, str], set[str]] = {}
    for nodeid in known if places else ():
        base, rest = _at_bracket(nodeid)
        if "+" in rest:
            former.setdefault((base, rest.partition("+")[0]), set()).add(nodeid)
    return {
        now[0]: {
            other
            for other in former.get((base, image), ())
            if other.endswith(end) and other != now[0]
        }
        for (base, image, end), now in places.items()
        if len(now) == 1
    }


def _namesakes(nodeid: str, images: Iterable[str]) -> set[str]:
    """The ids of the same test without an image, and with one."""
    calls = (with_image, _without_image)
    return {call(nodeid, image) for image in images for call in calls} - {nodeid}


def with_image(nodeid: str, image: str) -> str:
    """The id of a test on an image.

    Example:
        >>> with_image("test_x.py::test_x[2]", "tiny"), with_image("test_x.py::test_y", "tiny")
        ('test_x.py::test_x[tiny-2]', 'test_x.py::test_y[tiny]')
    """
    base, rest = _at_bracket(nodeid)
    return f"{base}[{image}-{rest}" if rest else f"{base}[{image}]"


def _without_image(nodeid: str, image: str) -> str:
    base, rest = _at_bracket(nodeid)
    if rest == f"{image}]":
        return base
    if rest.startswith(f"{image}-"):
        return f"{base}[{rest.removeprefix(f'{image}-')}"
    return nodeid


def _at_bracket(nodeid: str) -> tuple[str, str]:
    """A node id before and after the bracket of its parameters. The path may have brackets, too."""
    path, colons, names = nodeid.partition("::")
    base, _, rest = names.partition("[")
    return f"{path}{colons}{base}", rest
