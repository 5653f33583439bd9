"""What the cache keeps for single tests, and which of it the id that a user types means."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from pytest_vmsandbox.cache.files import own_size
from pytest_vmsandbox.cache.store import PRIVATE_KEY, Entry, Store
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Hardware

_KEY_DIGITS = 16
_SHOWN = 10  # ids in an error


def key_of(rootdir: str, nodeid: str, *more: int) -> str:
    """The key of what is kept for a test: a later one replaces it."""
    parts = json.dumps([rootdir, nodeid, *more])
    return hashlib.sha256(parts.encode()).hexdigest()[:_KEY_DIGITS]


class OfTest(Entry):
    """Something that was kept for a test."""

    @property
    def nodeid(self) -> str:
        """The id of the test, with the image."""
        return str(self.record["nodeid"])

    @property
    def rootdir(self) -> str:
        """The folder of the test's project, an absolute path."""
        return str(self.record["rootdir"])

    @property
    def guest(self) -> str:
        """The guest's name, which is also its hostname."""
        return str(self.record["guest"])

    @property
    def image(self) -> str:
        """The name of its image."""
        return str(self.record["image"])

    @property
    def hardware(self) -> Hardware:
        """Its hardware."""
        return Hardware.of_record(self.record["hardware"])

    @property
    def saved_at(self) -> float:
        """When it was saved, in seconds since the epoch."""
        return float(self.record["saved_at"])

    @property
    def private_key(self) -> str:
        """The key that opens it, in OpenSSH's format."""
        return (self.folder / PRIVATE_KEY).read_text(encoding="utf-8")

    @property
    def size_on_disk(self) -> int:
        """Bytes that become free with it: files that others have, too, do not count."""
        return own_size([self.folder])


T = TypeVar("T", bound=OfTest)


@dataclass(frozen=True, kw_only=True)
class Words:
    """How errors speak of what is kept.

    Attributes:
        tests: tests that have such a thing.
        none: that a test has none; ``{}`` is its id.
        why: what can be the cause of that.
        there: what comes before the ids of those that have one.
        remedy: how a test gets one.
        listing: the command that lists all; empty if there are never more than an error shows.
    """

    tests: str
    none: str
    why: str
    there: str
    remedy: str
    listing: str = ""


class StoreOfTests(Store[T]):
    """Things that were kept for tests."""

    words: Words

    def project(self, here: Path) -> Path:
        """The nearest folder from `here` upwards that is the rootdir of one of them; else `here`."""
        known = {it.rootdir for it in self.all()}
        return next((it for it in (here, *here.parents) if os.fspath(it) in known), here)

    def find(self, nodeid: str, rootdir: Path) -> list[T]:
        """All that is kept for one test.

        Args:
            nodeid: the test's id, the id without the image, the end of only one id, or one of these without
                parameters.
            rootdir: of the user's project. Its own ones come before those of other projects.

        Raises:
            ConfigError: there is nothing, or the id can be that of several tests.
        """
        tests: dict[tuple[str, str], list[T]] = {}
        for it in self.all():
            tests.setdefault((it.rootdir, it.nodeid), []).append(it)
        own = os.fspath(rootdir)
        for group in ({test: its for test, its in tests.items() if test[0] == own}, tests):
            for matches in _MATCHES:
                found = {test: its for test, its in group.items() if matches(its[0], nodeid)}
                if len(found) == 1:
                    return next(iter(found.values()))
                if found:
                    raise ConfigError(
                        f"{nodeid!r} can be one of {len(found)} {self.words.tests}",
                        details="\n".join(sorted(_shown(test, own) for test in found)),
                        remedy="give more of its id; or run the command in the folder of its project",
                    )
        raise self._none_of(nodeid, tests, own)

    def _none_of(
        self, nodeid: str, tests: Mapping[tuple[str, str], Sequence[T]], own: str
    ) -> ConfigError:
        """That a test has none, which ones could be meant, and what can be done."""
        words = self.words
        message = words.none.format(repr(nodeid))
        if not tests:
            return ConfigError(message, details=words.why, remedy=words.remedy)
        # Those of this project first, then the newest.
        newest = sorted(tests, key=lambda test: tests[test][0].saved_at, reverse=True)
        newest.sort(key=lambda test: test[0] != own)
        shown = [f"  {_shown(test, own)}" for test in newest[:_SHOWN]]
        if more := len(newest) - len(shown):
            shown.append(f"  and {more} more: '{words.listing}'")
        return ConfigError(
            message,
            details="\n".join([words.why, words.there, *shown]),
            remedy=f"name one of these tests, or {words.remedy}",
        )


def _shown(test: tuple[str, str], own: str) -> str:
    rootdir, nodeid = test
    return nodeid if rootdir == own else f"{nodeid} (in {rootdir})"


# -- does an id mean it? -----------------------------------------------------------------------------


class _Matches(Protocol):
    def __call__(self, it: OfTest, nodeid: str, /) -> bool: ...


def _is_id(it: OfTest, nodeid: str) -> bool:
    return it.nodeid == nodeid


def _is_id_without_image(it: OfTest, nodeid: str) -> bool:
    return _without_image(it) == nodeid


def _is_end(it: OfTest, nodeid: str) -> bool:
    return _ends_with(it.nodeid, nodeid)


def _is_end_without_image(it: OfTest, nodeid: str) -> bool:
    return _ends_with(_without_image(it), nodeid)


def _is_without_parameters(it: OfTest, nodeid: str) -> bool:
    name = it.nodeid.partition("[")[0]
    return name == nodeid or _ends_with(name, nodeid)


_MATCHES: tuple[_Matches, ...] = (
    _is_id,
    _is_id_without_image,
    _is_end,
    _is_end_without_image,
    _is_without_parameters,
)


def _ends_with(whole: str, end: str) -> bool:
    return bool(end) and whole.endswith((f"/{end}", f"::{end}"))


def _without_image(it: OfTest) -> str:
    """The id of its test without the image, which is the first or the last of the parameters."""
    nodeid, image = it.nodeid, it.image
    name, bracket, parameters = nodeid.partition("[")
    if not bracket:
        return nodeid
    inside = parameters.removesuffix("]")
    kernel = it.record.get("kernel")
    for label in ([] if kernel is None else [f"{image}+{kernel['release']}"]) + [image]:
        if inside == label:
            return name
        for rest in (inside.removeprefix(f"{label}-"), inside.removesuffix(f"-{label}")):
            if rest != inside:
                return f"{name}[{rest}]"
    return nodeid
