"""Kept guests: what is left of guests in which tests failed, in the user's cache.

A kept guest is a folder with everything that it needs: the state of its devices and its memory, the layers
of its disks, its key, and its image's files. So it does not matter what becomes of its image and its
template. Nobody writes to it. Only this user can read it. Files that the image and the template
have as well are linked, if the file system can do so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_vmsandbox.cache.files import own_size
from pytest_vmsandbox.cache.store import KEPT
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.guests import of_test
from pytest_vmsandbox.guests.of_test import OfTest, StoreOfTests, Words

STATE, CONSOLE, IMAGE, KERNEL, FLASH, TPM = (
    "state",
    "console.txt",
    "image",
    "kernel",
    "flash",
    "tpm",
)
_MAX_NUMBER = 1e18
_MAX_LABEL = 1 << 20  # characters
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a guest was kept, and why.

    Attributes:
        nodeid: of the test, with the image, as it is shown.
        rootdir: of its project, an absolute path.
        number: 1 for the first guest of the test, and so on.
        phase: ``setup``, ``call`` or ``teardown``; ``call`` for a test that passed.
        outcome: ``failed`` or ``passed``.
        error: one line; empty if it passed.
        folder: the project's files in the guest, for a test that runs inside.
        python: the interpreter in the guest, likewise.
        stands: whether an interpreter waits there where the test failed.
        environment: names of the variables that ``vm_env`` gave to the guest. Their values are in its memory.
    """

    nodeid: str
    rootdir: str
    number: int
    phase: str
    outcome: str
    error: str
    folder: str = ""
    python: str = ""
    stands: bool = False
    environment: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Group:
    """Guests that were on common networks, and were kept at one moment. They go on together.

    Attributes:
        id: of that moment.
        guests: the names of all of them.
        networks: for each card of this guest, what its network is made of, and a ``number`` that guests on
            the same network share; None for a card on no network.
    """

    id: str
    guests: tuple[str, ...]
    networks: tuple[Mapping[str, Any] | None, ...]


def key_of(moment: Moment) -> str:
    """The key of a guest that is kept: a later failure of the same test replaces it."""
    return of_test.key_of(moment.rootdir, moment.nodeid, moment.number)


# -- the shape of a record --------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(it, str) for it in value)


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


def _is_group(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"id", "guests", "networks"}:
        return value is None
    networks = value["networks"]
    return (
        isinstance(value["id"], str)
        and _are_texts(value["guests"])
        and isinstance(networks, list | tuple)
        and all(it is None or _is_network(it) for it in networks)
    )


def _is_network(value: object) -> bool:
    return isinstance(value, dict) and {name: type(it) for name, it in value.items()} == _NETWORK


_NETWORK = {"number": int, "ipv4": str, "ipv6": str, "addresses": str}
_MOMENT: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("nodeid", "rootdir", "phase", "outcome"), _is(str)),
    **dict.fromkeys(("error", "folder", "python"), _is(str)),
    "number": lambda value: _is_number(value) and isinstance(value, int),
    "stands": _is(bool),
    "environment": _are_texts,
}
_RECORD: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("guest", "image", "hostname"), _is(str)),
    **dict.fromkeys(("qemu", "accelerator", "version", "processor", "host", "line"), _is(str)),
    **dict.fromkeys(("saved_at", "lead"), _is_number),
    **dict.fromkeys(("has_memory", "has_helper", "answers"), _is(bool)),
    **dict.fromkeys(("more_args", "tpm"), _are_texts),
    **dict.fromkeys(("layers", "plugged", "cards"), _is(list, tuple)),
    **dict.fromkeys(("hardware", "helper"), _is(dict)),
    **dict.fromkeys(("kernel", "uefi"), _is(dict, type(None))),
    "group": _is_group,
}
_NEEDED = {"guest", "image", "qemu", "accelerator", "saved_at", "has_memory", "answers", "hardware"}


def misshapen(record: Mapping[str, Any]) -> str:
    """Which value of a record has the wrong type; empty if none has."""
    moment = record.get("moment")
    if not isinstance(moment, dict) or moment.keys() != _MOMENT.keys():
        return "moment"
    wrong = [f"moment.{name}" for name, fits in _MOMENT.items() if not fits(moment[name])]
    wrong += [
        name
        for name, fits in _RECORD.items()
        if (name in record or name in _NEEDED) and not fits(record.get(name))
    ]
    return next(iter(wrong), "")


def harmful(record: Mapping[str, Any]) -> str:
    """Which value of a stranger's record could do harm where it is used or shown; empty if none could.

    Args:
        record: its types are right.
    """
    moment = record["moment"]
    labels = {f"moment.{name}": moment[name] for name in ("nodeid", "rootdir", "phase", "outcome")}
    labels |= {name: record[name] for name in ("qemu", "accelerator", "version") if name in record}
    wrong = [name for name, text in labels.items() if not _is_label(text)]
    wrong += [name for name in ("guest", "image") if not _NAME.fullmatch(record[name])]
    group = record.get("group") or {"id": "x", "guests": []}
    wrong += ["group"] * (not all(map(_NAME.fullmatch, [group["id"], *group["guests"]])))
    return next(iter(wrong), "")


def _is_label(text: str) -> bool:
    """Whether a text can be a part of a line."""
    return len(text) <= _MAX_LABEL and len(text.splitlines()) <= 1 and printable(text) == text


class KeptGuest(OfTest):
    """A guest that was kept."""

    @property
    def key(self) -> str:
        """Its name in the store."""
        return self.folder.name

    @property
    def nodeid(self) -> str:
        """See `OfTest.nodeid`."""
        return self.moment.nodeid

    @property
    def rootdir(self) -> str:
        """See `OfTest.rootdir`."""
        return self.moment.rootdir

    @property
    def moment(self) -> Moment:
        """When it was kept, and why."""
        values = dict(self.record["moment"])
        return Moment(**{**values, "environment": tuple(values["environment"])})

    @property
    def hostname(self) -> str:
        """What it is called inside, and by others on its networks."""
        return str(self.record.get("hostname") or self.guest)

    @property
    def group(self) -> Group | None:
        """Those that go on together with it; None if it was on no network."""
        if (record := self.record.get("group")) is None:
            return None
        guests, networks = tuple(record["guests"]), tuple(record["networks"])
        return Group(id=record["id"], guests=guests, networks=networks)

    @property
    def has_memory(self) -> bool:
        """Whether it goes on from that moment. If not, there are only its disks, and it is booted."""
        return bool(self.record["has_memory"])

    @property
    def answers(self) -> bool:
        """Whether programs could be started in it. If not, it is entered by its console."""
        return bool(self.record["answers"])

    @property
    def qemu(self) -> tuple[str, str]:
        """The release of the QEMU that saved it, and the digest of that program."""
        release, _, digest = str(self.record["qemu"]).partition(" ")
        return release, digest

    @property
    def accelerator(self) -> str:
        """What ran it: ``kvm`` or ``tcg``."""
        return str(self.record["accelerator"])

    @property
    def console(self) -> str:
        """What it had written to its console."""
        return (self.folder / CONSOLE).read_text(encoding="utf-8", errors="replace")


class KeptStore(StoreOfTests[KeptGuest]):
    """The kept guests of one cache folder: ``<cache>/kept/<key>/``."""

    words = Words(
        tests="tests with a kept guest",
        none="no guest of {} is kept",
        why="the test was not run with --vm-keep, it passed, it had no guest, or the guest was removed",
        there="kept are those of:",
        listing="vmsandbox kept list",
        remedy="run the test with --vm-keep=failed",
    )

    def __init__(self, cache: Path) -> None:
        super().__init__(cache, KEPT, KeptGuest)

    def get(self, key: str) -> KeptGuest | None:
        """The kept guest with that key, if it is there and its record has the right shape."""
        kept = super().get(key)
        return None if kept is None or misshapen(kept.record) else kept

    def find(self, nodeid: str, rootdir: Path) -> list[KeptGuest]:
        """All kept guests of a test, by their numbers. See `StoreOfTests.find`."""
        return sorted(super().find(nodeid, rootdir), key=lambda kept: kept.moment.number)

    def together(self, kept: KeptGuest) -> list[KeptGuest]:
        """A kept guest, and those of its group that are still there, in the order in which the test asked for them."""
        if (group := kept.group) is None:
            return [kept]
        test = kept.moment.rootdir, kept.moment.nodeid
        others = (
            it
            for it in self.all()
            if it.group is not None
            and it.group.id == group.id
            and (it.moment.rootdir, it.moment.nodeid) == test
        )
        return sorted(others, key=lambda it: it.moment.number)

    def below(self, nodeid: str, rootdir: Path) -> list[KeptGuest]:
        """All kept guests of the tests in a file, a class or a folder of a project; of all tests for a dot."""
        start = nodeid if "::" in nodeid else os.path.normpath(nodeid)
        return [
            kept
            for kept in self.all()
            if kept.moment.rootdir == os.fspath(rootdir)
            and (start == os.curdir or kept.moment.nodeid.startswith((f"{start}/", f"{start}::")))
        ]

    @property
    def size_on_disk(self) -> int:
        """Bytes that become free without any of them."""
        return own_size(kept.folder for kept in self.all())

    def limit(self, size: int, tell: Callable[[str], object]) -> None:
        """Remove the oldest kept guests until they take at most `size` bytes together.

        What is in use stays. Files that others have, too, such as an image's, do not count.

        Args:
            tell: gets a line for each that is removed.
        """
        there = sorted(self.all(), key=lambda kept: kept.saved_at)
        for oldest in list(there):
            if (total := own_size(kept.folder for kept in there)) <= size:
                return
            if self.discard([oldest.folder]).removed:
                there.remove(oldest)
                tell(
                    f"the kept guest {oldest.guest} of {oldest.moment.nodeid} was removed: kept guests took "
                    f"{format_size(total)}, and vm_keep_size is {format_size(size)}"
                )
