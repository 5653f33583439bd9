"""Kept guests: what is left of guests in which tests failed, in the user's cache.

A kept guest is a folder with everything that it needs: the state of its devices and its memory, the layers
of its disks, its key, and its image's files. So it does not matter what becomes of its image and its
template. Nobody writes to it. Only this user can read it. Files that the image and the template
have as well are linked, if the file system can do so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_vmsandbox.cache.files import own_size
from pytest_vmsandbox.cache.store import KEPT, PRIVATE_KEY, Entry, Store
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Hardware, format_size
from pytest_vmsandbox.core.text import printable

STATE, CONSOLE, IMAGE, KERNEL, FLASH, TPM = (
    "state",
    "console.txt",
    "image",
    "kernel",
    "flash",
    "tpm",
)
_KEY_DIGITS = 16
_SHOWN = 10  # ids in an error
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


def key_of(moment: Moment) -> str:
    """The key of a guest that is kept: a later failure of the same test replaces it."""
    parts = json.dumps([moment.rootdir, moment.nodeid, moment.number])
    return hashlib.sha256(parts.encode()).hexdigest()[:_KEY_DIGITS]


# -- the shape of a record --------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(it, str) for it in value)


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


_MOMENT: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("nodeid", "rootdir", "phase", "outcome"), _is(str)),
    **dict.fromkeys(("error", "folder", "python"), _is(str)),
    "number": lambda value: _is_number(value) and isinstance(value, int),
    "stands": _is(bool),
    "environment": _are_texts,
}
_RECORD: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("guest", "image"), _is(str)),
    **dict.fromkeys(("qemu", "accelerator", "version", "processor", "host", "line"), _is(str)),
    **dict.fromkeys(("saved_at", "lead"), _is_number),
    **dict.fromkeys(("has_memory", "has_helper", "answers"), _is(bool)),
    **dict.fromkeys(("more_args", "tpm"), _are_texts),
    **dict.fromkeys(("layers", "plugged", "cards"), _is(list, tuple)),
    **dict.fromkeys(("hardware", "helper"), _is(dict)),
    **dict.fromkeys(("kernel", "uefi"), _is(dict, type(None))),
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
    return next(iter(wrong), "")


def _is_label(text: str) -> bool:
    """Whether a text can be a part of a line."""
    return len(text) <= _MAX_LABEL and len(text.splitlines()) <= 1 and printable(text) == text


class KeptGuest(Entry):
    """A guest that was kept."""

    @property
    def key(self) -> str:
        """Its name in the store."""
        return self.folder.name

    @property
    def moment(self) -> Moment:
        """When it was kept, and why."""
        values = dict(self.record["moment"])
        return Moment(**{**values, "environment": tuple(values["environment"])})

    @property
    def guest(self) -> str:
        """The guest's name, which is also its hostname."""
        return str(self.record["guest"])

    @property
    def image(self) -> str:
        """The name of its image."""
        return str(self.record["image"])

    @property
    def saved_at(self) -> float:
        """When it was saved, in seconds since the epoch."""
        return float(self.record["saved_at"])

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
    def hardware(self) -> Hardware:
        """Its hardware."""
        return Hardware.of_record(self.record["hardware"])

    @property
    def console(self) -> str:
        """What it had written to its console."""
        return (self.folder / CONSOLE).read_text(encoding="utf-8", errors="replace")

    @property
    def private_key(self) -> str:
        """The key that opens it, in OpenSSH's format."""
        return (self.folder / PRIVATE_KEY).read_text(encoding="utf-8")

    @property
    def size_on_disk(self) -> int:
        """Bytes that become free with it: files that others have, too, do not count."""
        return own_size([self.folder])


class KeptStore(Store[KeptGuest]):
    """The kept guests of one cache folder: ``<cache>/kept/<key>/``."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache, KEPT, KeptGuest)

    def get(self, key: str) -> KeptGuest | None:
        """The kept guest with that key, if it is there and its record has the right shape."""
        kept = super().get(key)
        return None if kept is None or misshapen(kept.record) else kept

    def find(self, nodeid: str, rootdir: Path) -> list[KeptGuest]:
        """All kept guests of a test, by their numbers.

        Args:
            nodeid: the test's id, the id without the image, the end of only one id, or one of these without
                parameters.
            rootdir: of the user's project. Its own guests come before those of other projects.

        Raises:
            ConfigError: there are none, or those of several tests.
        """
        tests: dict[tuple[str, str], list[KeptGuest]] = {}
        for kept in self.all():
            tests.setdefault((kept.moment.rootdir, kept.moment.nodeid), []).append(kept)
        own = os.fspath(rootdir)
        for matches in (
            _is_id,
            _is_id_without_image,
            _is_end,
            _is_end_without_image,
            _is_without_parameters,
        ):
            found = {test: kept for test, kept in tests.items() if matches(kept[0], nodeid)}
            found = {test: kept for test, kept in found.items() if test[0] == own} or found
            if len(found) == 1:
                (guests,) = found.values()
                return sorted(guests, key=lambda kept: kept.moment.number)
            if found:
                raise ConfigError(
                    f"{nodeid!r} can be one of {len(found)} tests with a kept guest",
                    details="\n".join(sorted(_shown(test, own) for test in found)),
                    remedy="give more of its id; or run the command in the folder of its project",
                )
        raise _none_of(nodeid, tests, own)

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


def _is_id(kept: KeptGuest, nodeid: str) -> bool:
    return kept.moment.nodeid == nodeid


def _is_id_without_image(kept: KeptGuest, nodeid: str) -> bool:
    return _without_image(kept) == nodeid


def _is_end(kept: KeptGuest, nodeid: str) -> bool:
    return _ends_with(kept.moment.nodeid, nodeid)


def _is_end_without_image(kept: KeptGuest, nodeid: str) -> bool:
    return _ends_with(_without_image(kept), nodeid)


def _is_without_parameters(kept: KeptGuest, nodeid: str) -> bool:
    name = kept.moment.nodeid.partition("[")[0]
    return name == nodeid or _ends_with(name, nodeid)


def _ends_with(whole: str, end: str) -> bool:
    return bool(end) and whole.endswith((f"/{end}", f"::{end}"))


def _without_image(kept: KeptGuest) -> str:
    """The id of its test without the image, which is the first or the last of the parameters."""
    nodeid, image = kept.moment.nodeid, kept.image
    name, bracket, parameters = nodeid.partition("[")
    if not bracket:
        return nodeid
    inside = parameters.removesuffix("]")
    kernel = kept.record["kernel"]
    for label in ([] if kernel is None else [f"{image}+{kernel['release']}"]) + [image]:
        if inside == label:
            return name
        for rest in (inside.removeprefix(f"{label}-"), inside.removesuffix(f"-{label}")):
            if rest != inside:
                return f"{name}[{rest}]"
    return nodeid


def _none_of(
    nodeid: str, tests: Mapping[tuple[str, str], Sequence[KeptGuest]], own: str
) -> ConfigError:
    """That no guest of a test is kept, which ones could be meant, and what can be done."""
    remedy = "run the test with --vm-keep=failed"
    why = (
        "the test was not run with --vm-keep, it passed, it had no guest, or the guest was removed"
    )
    if not tests:
        return ConfigError(f"no guest of {nodeid!r} is kept", details=why, remedy=remedy)
    # Those of this project first, then the newest.
    newest = sorted(tests, key=lambda test: tests[test][0].saved_at, reverse=True)
    newest.sort(key=lambda test: test[0] != own)
    shown = [f"  {_shown(test, own)}" for test in newest[:_SHOWN]]
    if more := len(newest) - len(shown):
        shown.append(f"  and {more} more: 'vmsandbox kept list'")
    return ConfigError(
        f"no guest of {nodeid!r} is kept",
        details="\n".join([why, "kept are those of:", *shown]),
        remedy=f"name one of these tests, or {remedy}",
    )


def _shown(test: tuple[str, str], own: str) -> str:
    rootdir, nodeid = test
    return nodeid if rootdir == own else f"{nodeid} (in {rootdir})"
