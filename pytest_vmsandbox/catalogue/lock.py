"""The lock file of a project, ``vm-images.lock``: which images its tests use, by digest.

It is TOML in a stable order, so people can review its changes. What an image *is* comes from its record
and from small files beside it, which its maker has written. So a check of a run reads no disk.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pytest_vmsandbox.cache import files, integrity
from pytest_vmsandbox.catalogue import variants
from pytest_vmsandbox.catalogue.definition import ImageDefinition, check_name
from pytest_vmsandbox.catalogue.store import (
    ARCHIVE,
    PACKAGES,
    BuiltImage,
    build_command,
    damaged,
)
from pytest_vmsandbox.catalogue.tables import Table, line, line_or_empty, texts
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import ConfigError, LockError

SCHEMA = 1
HEADER = """\
# The images that this project's tests use. Commit this file. It is written by
#     vmsandbox images lock      adds images
#     vmsandbox images update    shows what would change, makes the images again, and writes it
# Neither keeps comments.
#
# What "locked" names must be the same wherever the tests run. Otherwise they do not start:
#     definition    image.toml, the recipe, and what they use
#     source        the files that were fetched or imported
#     packages      the versions of the packages
# What "may_drift" names can differ between two builds:
#     archive       the date of the distribution's archive
#     files         what each build makes new: host key, times, layout of the disk
#     packages      only if you move it there
"""

_LOCKABLE, _DRIFTING = ("definition", "source", "packages"), ("archive", "files", "packages")
_ORIGINS = ("recipe", "from", "source")
_PLACES = ("url", "kernel", "initrd")
_DIGESTS = {"sha256": 64, "sha512": 128, "kernel_sha256": 64, "initrd_sha256": 64}  # → digits
_KEYS = (
    *(
        "name",
        "architecture",
        "origin",
        "base",
        "definition",
        *_PLACES,
        *_DIGESTS,
        "archive",
        "signature",
    ),
    *("locked", "may_drift", "packages"),
)
_MARKERS = re.compile(r"(?m)^(<{7}|={7}|>{7})( |$)")  # as git writes them
_SHOWN = 10  # lines of differences in an error
_SHORT = 16  # digits of a digest, for people
_NONE = "none"
_BY_LOCK = "given by the lock file"  # what an image that was made with a lock has as `checked`


class Difference(NamedTuple):
    """What is not as it is locked.

    Attributes:
        what: ``definition``, ``source``, ``packages``, ``archive``, ``origin`` or ``signature``.
        text: for people: which, and from what to what.
    """

    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.what}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class LockedImage:
    """What identifies an image: as a lock file has it, or as an image in the cache is.

    Attributes:
        name: of the image, as this machine calls it. In the file it has no architecture.
        architecture: of an image that is one of several; else empty. Each of them has an entry.
        origin: as `ImageDefinition.origin`.
        base: the image that it derives from, without its architecture; or empty.
        definition: the digest of its definition. It covers that of its base.
        places: where files from elsewhere came from: ``url``, ``kernel``, ``initrd``.
        digests: of those files: ``sha256`` or ``sha512``, ``kernel_sha256``, ``initrd_sha256``.
        archive: of each suite that packages came from: URL, name, and date.
        signature: what was checked of its origin, for people.
        packages: name and version of each.
        locked: what must not differ.
        may_drift: what may.
    """

    name: str
    origin: str
    definition: str
    base: str = ""
    architecture: str = ""
    places: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    archive: tuple[str, ...] = ()
    signature: str = _NONE
    packages: tuple[str, ...] = ()
    locked: tuple[str, ...] = ()
    may_drift: tuple[str, ...] = ()

    @classmethod
    def of(cls, built: BuiltImage) -> LockedImage:
        """What an image in the cache is. No large file is read.

        Raises:
            ImageError: its record, or a small file beside it, is damaged.
        """
        record, definition = built.record(), built.definition
        packages, archive = (_lines(built, record, name) for name in (PACKAGES, ARCHIVE))
        suites = [words for words in map(str.split, archive) if len(words) == 4]
        source = _source(record, definition)
        digests = {key: source[key] for key in _DIGESTS if source.get(key)}
        return cls(
            name=definition.name,
            architecture=definition.architecture if definition.of_several else "",
            origin=definition.origin,
            base=_stem_of_base(definition),
            definition=built.digest,
            places={key: source[key] for key in _PLACES if source.get(key)},
            digests=digests,
            archive=tuple(" ".join(words[:3]) for words in suites),
            signature=_signature(source, digests, suites),
            packages=tuple(packages),
            locked=("definition", *(["source"] * bool(digests)), *(["packages"] * bool(packages))),
            may_drift=(*(["archive"] * bool(archive)), "files"),
        )

    @classmethod
    def read(cls, file: Path, number: int, values: object) -> LockedImage:
        """An entry of a lock file.

        Raises:
            ConfigError: a key is missing or unknown, or a value is not allowed.
        """
        if not isinstance(values, dict):
            values = {"image": values}  # an unknown key
        top = Table(file, f"image {values.get('name', number)}: ", values, _KEYS)
        name = top.read("name", "the name of an image", line)
        check_name(name, file)
        architecture = top.choice("architecture", tuple(ARCHITECTURES), "")
        some = {key: top.read(key, "one line of text", line, "") for key in _PLACES}
        digests = {
            key: top.read(key, f"{digits} hexadecimal digits", partial(_hex, digits), "")
            for key, digits in _DIGESTS.items()
        }
        none: tuple[str, ...] = ()
        drift = top.read("may_drift", f"some of {', '.join(_DRIFTING)}", _words(_DRIFTING), none)
        locked = top.read("locked", f"some of {', '.join(_LOCKABLE)}", _words(_LOCKABLE))
        if "definition" not in locked:
            raise top.missing("locked", "locked must have 'definition'")
        if both := {*locked} & {*drift}:
            raise ConfigError(
                f"{file}: {', '.join(both)} of the image {name!r} is both locked and may drift",
                remedy="remove it from one of the two lists",
            )
        return cls(
            name=variants.variant_name(name, architecture) if architecture else name,
            architecture=architecture,
            origin=top.choice("origin", _ORIGINS),
            base=top.read("base", "the name of an image", line, ""),
            definition=top.read("definition", "64 hexadecimal digits", partial(_hex, 64)),
            places={key: value for key, value in some.items() if value},
            digests={key: value for key, value in digests.items() if value},
            archive=top.read("archive", "a list of lines", _listed, none),
            signature=top.read("signature", "one line of text", line_or_empty, _NONE),
            packages=top.read("packages", "a list of 'NAME VERSION'", _listed, none),
            locked=locked,
            may_drift=drift,
        )

    def values(self) -> dict[str, object]:
        """What a lock file has of it, in order."""
        found: dict[str, object] = {
            "name": self._stem,
            **{name: getattr(self, name) for name in ("architecture", "origin", "base")},
            "definition": self.definition,
            **self.places,
            **self.digests,
            **{name: list(getattr(self, name)) for name in ("archive", "packages")},
            "signature": self.signature,
            **{name: list(getattr(self, name)) for name in ("locked", "may_drift")},
        }
        return {key: found[key] for key in _KEYS if found.get(key)}

    @property
    def _stem(self) -> str:
        architecture = self.architecture
        return variants.stem_of(self.name, architecture) if architecture else self.name

    @property
    def order(self) -> tuple[str, str]:
        """Its place in a lock file, which is the same on every machine."""
        return self._stem, self.architecture

    def kept(self, before: LockedImage | None) -> LockedImage:
        """The same image after an older entry: what may drift still may."""
        if before is not None and _BY_LOCK in self.signature:
            return replace(self, signature=before.signature).kept(before)
        if before is None or "packages" not in before.may_drift or not self.packages:
            return self
        locked = tuple(what for what in self.locked if what != "packages")
        return replace(self, locked=locked, may_drift=(*self.may_drift, "packages"))

    def differences(self, found: LockedImage) -> list[Difference]:
        """How `found` differs from what is locked, the most important first."""
        different = [
            Difference(what, f"{_brief(mine)} → {_brief(theirs)}")
            for what, mine, theirs in self._pairs(found)
            if mine != theirs
        ]
        packages = (Difference("packages", text) for text in changes(self.packages, found.packages))
        suites = (entry.archive for entry in (self, found))
        archive = (Difference("archive", text) for text in changes(*map(_dates, suites)))
        return [*different, *packages, *archive]

    def is_newer_than(self, found: LockedImage) -> bool:
        """Whether packages of the locked image come from a newer archive."""
        ours, theirs = ([line.split()[-1] for line in one.archive] for one in (self, found))
        return bool(ours and theirs) and max(ours) > max(theirs)

    def _pairs(self, found: LockedImage) -> Iterator[tuple[str, str, str]]:
        yield "origin", self._origin, found._origin
        yield "definition", self.definition, found.definition
        for key in _DIGESTS:
            yield "source", self.digests.get(key, ""), found.digests.get(key, "")
        if _BY_LOCK not in found.signature:
            yield "signature", self.signature, found.signature

    @property
    def _origin(self) -> str:
        return f"{self.origin} {self.base}".strip()

    def breaches(self, found: LockedImage) -> list[Difference]:
        """The differences in what is locked."""
        return [
            difference
            for difference in self.differences(found)
            if difference.what in (*self.locked, "origin")
        ]


@dataclass(frozen=True)
class Lock:
    """A lock file.

    Attributes:
        file: its path.
        images: its entries by name.
    """

    file: Path
    images: Mapping[str, LockedImage]

    @classmethod
    def read(cls, file: Path) -> Lock:
        """The lock file at that path.

        Raises:
            ConfigError: it cannot be read, or is not what we write.
        """
        top = Table(file, "", _content(file), ("schema", "image"))
        if (schema := top.values.get("schema")) != SCHEMA or isinstance(schema, bool):
            raise ConfigError(
                f"{file}: schema = {schema!r} is not known",
                remedy=f"use a version of pytest-vmsandbox that knows it; this one knows {SCHEMA}",
            )
        nothing: list[object] = []
        entries = top.read(
            "image",
            "tables [[image]]",
            lambda value: value if isinstance(value, list) else None,
            nothing,
        )
        images: dict[str, LockedImage] = {}
        for number, values in enumerate(entries, 1):
            entry = LockedImage.read(file, number, values)
            if images.setdefault(entry.name, entry) is not entry:
                raise ConfigError(
                    f"{file}: there are two entries for the image {entry.name!r}",
                    remedy=f"remove one, or both and run: {lock_command(entry.name)}",
                )
        return cls(file, images)

    def entry(self, name: str) -> LockedImage:
        """The entry of an image.

        Raises:
            LockError: there is none.
        """
        if name not in self.images:
            raise LockError(
                f"the image {name!r} is not in {self.file.name}",
                details=f"expected: an entry for {name!r} in {self.file}\n"
                f"found: {', '.join(self.images) or 'no image'}",
                remedy=lock_command(name),
            )
        return self.images[name]

    def check_definition(self, definition: ImageDefinition) -> None:
        """Check that the definition of an image is the locked one.

        Raises:
            LockError: it is not, or the image is not in the lock.
            ConfigError: a file of the definition cannot be read.
        """
        name, locked = definition.name, self.entry(definition.name)
        if locked.definition != definition.digest:
            text = f"{_brief(locked.definition)} → {_brief(definition.digest)}"
            raise self._differs(
                name,
                [Difference("definition", text)],
                "if the image, or pytest-vmsandbox, was changed on purpose, run 'vmsandbox images "
                f"update {name}' and commit the lock file; otherwise restore {definition.folder}, or "
                "the version of pytest-vmsandbox that the lock was written with",
            )

    def check(self, built: BuiltImage) -> list[Difference]:
        """Check that an image in the cache is the locked one. No large file is read.

        Returns:
            Differences that the lock allows.

        Raises:
            LockError: it is not, or the image is not in the lock.
            ImageError: the image is damaged.
        """
        name = built.definition.name
        locked, found = self.entry(name), LockedImage.of(built)
        if breaches := locked.breaches(found):
            remedy = (
                f"run 'vmsandbox images update {name}' to take this image into the lock, and commit "
                "that; or get the locked image from the machine that has it"
            )
            if locked.is_newer_than(found):
                again = f"{build_command(built.definition)} --force"
                remedy = f"the image here is older than the lock. Run '{again}'"
            raise self._differs(name, breaches, remedy)
        return locked.differences(found)

    def _differs(self, name: str, differences: Sequence[Difference], remedy: str) -> LockError:
        kinds = " and ".join(dict.fromkeys(difference.what for difference in differences))
        return LockError(
            f"the image {name!r} differs from {self.file.name}: {kinds}",
            details="\n".join(
                (f"expected in {self.file} → found here:", *shown(differences, _SHOWN))
            ),
            remedy=remedy,
        )

    def with_images(self, entries: Iterable[LockedImage]) -> Lock:
        """The lock with these entries added or replaced."""
        images = {**self.images, **{entry.name: entry for entry in entries}}
        return Lock(self.file, images)

    def text(self) -> str:
        """The content of the file."""
        import tomli_w

        ordered = sorted(self.images.values(), key=lambda entry: entry.order)
        entries = [entry.values() for entry in ordered]
        return f"{HEADER}\n{tomli_w.dumps({'schema': SCHEMA, 'image': entries})}"

    def add(self, entries: Iterable[LockedImage]) -> Lock:
        """Add or replace entries in the file. It is always complete: the old one, or the new one.

        It is read again before, because another process may have written it.

        Returns:
            The lock that was written.

        Raises:
            ConfigError: it cannot be read or written.
        """
        target = Path(os.path.realpath(self.file))  # a link stays a link
        try:
            with files.locked(target.parent, on_busy=lambda: None):
                lock = read_or_empty(self.file).with_images(entries)
                lock._replace(target)
                return lock
        except OSError as error:
            raise ConfigError(
                f"{self.file} cannot be written: {error.strerror or error}",
                remedy="make room there, or make the folder writable. The file is unchanged",
            ) from error

    def _replace(self, target: Path) -> None:
        new = target.with_name(f".{target.name}.new")
        try:
            with new.open("w", encoding="utf-8", newline="\n") as stream:
                stream.write(self.text())
                stream.flush()
                os.fsync(stream.fileno())
            if target.exists():
                new.chmod(target.stat().st_mode & 0o777)
            new.replace(target)
        finally:
            if not new.is_dir():
                new.unlink(missing_ok=True)


def read_or_empty(file: Path) -> Lock:
    """The lock file at that path, or a lock without images if there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    return Lock.read(file) if os.path.lexists(file) else Lock(file, {})


def shown(differences: Sequence[object], limit: int) -> list[str]:
    """At most `limit` lines, and how many more there are."""
    lines = [f"  {difference}" for difference in differences[:limit]]
    more = len(differences) - limit
    return [*lines, f"  … and {more} more"] if more > 0 else lines


def changes(before: Iterable[str], after: Iterable[str]) -> list[str]:
    """How two lists of packages differ: ``openssl 3.0.15 → 3.0.16``."""
    old, new = _versions(before), _versions(after)
    return [
        f"{name} {', '.join(old.get(name, ())) or _NONE} → {', '.join(new.get(name, ())) or _NONE}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def lock_command(name: str) -> str:
    """The command that adds an image to the lock."""
    return f"vmsandbox images lock {name}"


def _dates(archive: Iterable[str]) -> list[str]:
    """The suites of an archive, written like packages: name and date. The mirror may be another."""
    return [" ".join(line.split()[1:]) for line in archive]


def _versions(packages: Iterable[str]) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for package in sorted(packages):
        name, _, version = package.partition(" ")
        found[name].append(version)
    return dict(found)


def _brief(text: str) -> str:
    is_digest = re.fullmatch("[0-9a-f]{64,}", text)
    return f"{text[:_SHORT]}…" if is_digest else text or _NONE


# -- the file -----------------------------------------------------------------------------------------


def _content(file: Path) -> dict[str, Any]:
    try:
        if file.exists() and not file.is_file():  # reading a FIFO would wait for its writer
            raise ValueError("it is not a regular file")
        text = file.read_bytes().decode("utf-8-sig")
        if _MARKERS.search(text):
            raise ConfigError(
                f"{file} has conflict markers of a merge",
                remedy="resolve them: keep the whole [[image]] tables of one side or the other, one "
                "for each image. 'vmsandbox images verify' compares the result with the images here",
            )
        return tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not TOML, or not UTF-8
        raise ConfigError(
            f"{file} cannot be read: {getattr(error, 'strerror', None) or error}",
            remedy="restore it from your repository, or remove it and run 'vmsandbox images lock'",
        ) from error


def _hex(digits: int, value: object) -> str | None:
    is_right = isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value)
    return str(value) if is_right else None


def _listed(value: object) -> tuple[str, ...] | None:
    return texts(value, lambda text: line(text.strip()) is not None)


def _words(allowed: Sequence[str]) -> Callable[[object], tuple[str, ...] | None]:
    return lambda value: texts(value, lambda word: word in allowed)


# -- the image ----------------------------------------------------------------------------------------


def _lines(built: BuiltImage, record: Mapping[str, Any], name: str) -> list[str]:
    """The lines of a small file of an image; none if its maker has written no such file."""
    file, digest = built.folder / name, record.get("digests", {}).get(name)
    if digest is None:
        return []
    try:
        if integrity.file_digest(file) == digest:
            return file.read_text(encoding="utf-8", errors="replace").splitlines()
        why = "has changed since it was built"
    except OSError as error:
        why = error.strerror or str(error)
    raise damaged(built.definition, f"{file} {why}")


def _stem_of_base(definition: ImageDefinition) -> str:
    """The name of an image's base, without the architecture if the base is one of several."""
    if definition.parent is not None:
        return definition.parent.variant_of or definition.base
    if definition.of_several:  # a definition from a record has no parent
        return variants.stem_of(definition.base, definition.architecture)
    return definition.base


def _source(record: Mapping[str, Any], definition: ImageDefinition) -> dict[str, str]:
    """Where the files came from, as their maker has recorded it; else as the definition says."""
    if recorded := record.get("source"):
        return {key: str(value) for key, value in recorded.items() if value}
    source = definition.source
    given = {} if source is None else {key: getattr(source, key) for key in (*_PLACES, *_DIGESTS)}
    return {key: value for key, value in given.items() if value}


def _signature(
    source: Mapping[str, str], digests: Mapping[str, str], suites: Sequence[Sequence[str]]
) -> str:
    """What was checked of an image's origin."""
    if digests:
        checked = source.get("checked") or "sha256 given by the definition"
        return checked if "signed by" in checked else f"none; {checked}"
    keys = sorted({key[-_SHORT:] for words in suites for key in words[3].split(",") if key != "-"})
    return f"the archive's, by the keys {', '.join(keys)}" if keys else _NONE
