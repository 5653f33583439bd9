"""``vmsandbox images lock|update|verify``: the lock file of a project."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import click

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.lock import Lock, LockedImage, changes, lock_command, shown
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageState, ImageStore, build_command
from pytest_vmsandbox.cli.options import image_path_option, offline_option
from pytest_vmsandbox.cli.project import Project, ask, joined, project_options
from pytest_vmsandbox.cli.screen import Screen, write_json
from pytest_vmsandbox.core.errors import ConfigError, ImageError, VMSandboxError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings

_SHOWN = 40  # lines of differences of one image
_UPDATE = "vmsandbox images update"

names_argument = click.argument("names", nargs=-1, metavar="[NAME...]")


@click.command
@names_argument
@project_options
@image_path_option
def lock(*, names: tuple[str, ...], where: list[str], image_path: tuple[Path, ...]) -> None:
    """Add images to the project's lock file, vm-images.lock.

    Without a NAME, these are the images that pytest's configuration selects here, and those that markers
    of the tests name. A NAME may be a glob. Images must be built. Entries that are already there stay as they are: 'update' changes them.

    If a project has a lock file, its tests run only on images that are as they are locked.
    """
    screen = Screen()
    if names:
        project = ask(where)
    else:
        with screen.waiting("collecting tests"):
            project = ask(where, lambda text: screen.say(text, "yellow"))
    settings = _settings(project, image_path)
    catalogue, store = Catalogue(settings.image_path), ImageStore(cache_dir())
    before = project.lock
    errors: list[Exception] = []
    new: list[LockedImage] = []
    for name in catalogue.select(names) if names else project.images:
        try:
            found = LockedImage.of(store.require(catalogue.get(name)))
            if name not in before.images:
                new.append(found)
            elif before.images[name].breaches(found):
                before.check(store.require(catalogue.get(name)))
            else:
                screen.say(f"{name} is locked")
        except VMSandboxError as error:
            errors.append(error)
    if new:
        before = before.add(new)
        for entry in new:
            screen.say(f"{entry.name} is locked now: {_about(entry)}")
        screen.say(f"images in {before.file}: {len(before.images)}")
    if errors:
        raise ExceptionGroup("lock", errors)


@click.command
@names_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@offline_option
@project_options
@image_path_option
def update(
    *,
    names: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    offline: bool,
    where: list[str],
    image_path: tuple[Path, ...],
) -> None:
    """Make images again if something newer is there, and update the lock file.

    It looks for changed definitions, for newer packages in the archive of a distribution, and for other
    images in this machine's cache. It shows all differences and asks before it changes anything.
    Without a terminal, it needs --yes. Without a NAME, it updates the images in the lock file. Those for
    other architectures are left out unless they are built here.
    """
    project = ask(where)
    settings = replace(_settings(project, image_path), offline=offline)
    catalogue, store = Catalogue(settings.image_path), ImageStore(cache_dir())
    before, screen = project.lock, Screen()
    chosen = catalogue.select(names) if names else _those_here(before, catalogue, store, screen)
    if not before.images and not chosen:
        raise ConfigError(
            f"there is no image in {before.file}", remedy="add images: vmsandbox images lock"
        )
    definitions = [_definition(name, catalogue, before) for name in chosen]
    with screen.waiting("looking for changes"):
        found = [_look(definition, before, store, settings) for definition in definitions]
    changed = [one for one in found if one.lines]
    _show(screen, changed, before)
    if not changed or dry_run:
        return
    _confirm(yes=yes)
    made, errors = _make(changed, definitions, settings)
    entries: list[LockedImage] = []
    for name, definition in made.items():
        if name in chosen or name in before.images:
            try:
                found_now = LockedImage.of(store.require(definition))
                entries.append(found_now.kept(before.images.get(name)))
            except VMSandboxError as error:
                errors.append(error)
    if entries:
        before.add(entries)
    for entry in entries:
        screen.say(f"{entry.name} is locked now: {_about(entry)}")
    if errors:
        raise ExceptionGroup("update", errors)


def _those_here(lock: Lock, catalogue: Catalogue, store: ImageStore, screen: Screen) -> list[str]:
    """The images in a lock, without those that only machines of other architectures need to have."""
    native, known = catalogue.native(), catalogue.names()
    foreign = [
        name
        for name in lock.images
        if name in known and name not in native and not store.folders_of(name)
    ]
    if foreign:
        screen.say(
            f"left out, because they are for other architectures and not built here: {', '.join(foreign)}"
        )
    return [name for name in lock.images if name not in foreign]


@dataclass(frozen=True, kw_only=True)
class _Change:
    """What an update changes of one image.

    Attributes:
        definition: of the image.
        lines: what changes, for people; none if nothing does.
        build: whether the image has to be made.
        bases: whether its bases have to be made again before.
    """

    definition: ImageDefinition
    lines: list[str] = field(default_factory=list)
    build: bool = False
    bases: bool = False

    @property
    def lineage(self) -> list[ImageDefinition]:
        """The image, after the bases that have to be made before."""
        found = [self.definition]
        while self.bases and (parent := found[0].parent) is not None:
            found.insert(0, parent)
        return found


def _look(
    definition: ImageDefinition, before: Lock, store: ImageStore, settings: Settings
) -> _Change:
    """Look for what changes of an image."""
    from pytest_vmsandbox.catalogue.archive import (
        newer_packages,
    )  # other commands are quicker without

    entry, lines = before.images.get(definition.name), []
    state = store.state(definition)
    is_built = state is ImageState.BUILT
    known = LockedImage.of(store.require(definition)) if is_built else entry
    newer: list[tuple[str, str]] = []
    if known is not None and known.archive and not settings.offline:
        newer = newer_packages(known.archive, known.packages, definition.architecture)
        newest = dict(newer)
        packages = tuple(newest.get(package, package) for package in known.packages)
        known = replace(known, packages=packages)
    if entry is None:
        lines.append("is not in the lock file yet")
    elif is_built and known is not None:
        lines += map(str, entry.differences(known))
    else:
        if entry.definition != definition.digest:
            lines.append(f"definition: {entry.definition[:16]}… → {definition.digest[:16]}…")
        lines += [f"packages: {change}" for change in changes(*map(_packages, (entry, known)))]
    if newer:
        lines.append(f"the archive has newer packages ({len(newer)}), so it is built again")
    listed = _listed(definition, known, settings)
    lines += listed
    if not is_built:
        now = "stale" if state is ImageState.STALE else "not built"
        lines.append(f"is {now} here, so it is built")
    return _Change(
        definition=definition,
        lines=lines,
        build=bool(newer or listed) or not is_built,
        bases=bool(newer),
    )


def _packages(entry: LockedImage | None) -> tuple[str, ...]:
    return () if entry is None else entry.packages


def _listed(
    definition: ImageDefinition, known: LockedImage | None, settings: Settings
) -> list[str]:
    """What the list of digests of a source says now, if that is another file."""
    from pytest_vmsandbox.catalogue.importing.fetch import Fetcher

    source = definition.source
    if source is None or not source.checksums or known is None or settings.offline:
        return []
    there = Fetcher(cache_dir(), definition.folder, lambda _: None).digest(source)
    ours = known.digests.get(there.kind, "")
    if ours == there.hex:
        return []
    return [f"source: {ours[:16]}… → {there.hex[:16]}… (in {source.checksums})"]


def _make(
    changed: Iterable[_Change], chosen: Iterable[ImageDefinition], settings: Settings
) -> tuple[dict[str, ImageDefinition], list[Exception]]:
    """Make the images that have to be made. If packages are newer, the bases are made again first.

    Args:
        changed: what changes.
        chosen: all images that are updated. Those whose base was made again are made again, too.
        settings: where images are kept.

    Returns:
        The definitions of all images that may differ now, by name; and what failed.
    """
    from pytest_vmsandbox.cli.building import build_one

    differing: dict[str, ImageDefinition] = {}
    errors: list[Exception] = []
    made: set[str] = set()
    for one in changed:
        try:
            for definition in one.lineage if one.build else ():
                if definition.name not in made:
                    build_one(definition, settings, force=True)
                    made.add(definition.name)
                differing[definition.name] = definition
            differing[one.definition.name] = one.definition
        except VMSandboxError as error:
            errors.append(error)
    for definition in chosen:
        try:
            if definition.name not in made and made & {*_bases(definition)}:
                build_one(definition, settings)
                differing[definition.name] = definition
        except VMSandboxError as error:
            errors.append(error)
    return differing, errors


def _bases(definition: ImageDefinition) -> Iterator[str]:
    parent = definition.parent
    while parent is not None:
        yield parent.name
        parent = parent.parent


def _show(screen: Screen, changed: Sequence[_Change], before: Lock) -> None:
    if not changed:
        screen.say(f"nothing has changed: {before.file} is up to date")
    for one in changed:
        screen.say(one.definition.name, "bold")
        for line in shown(one.lines, _SHOWN):
            screen.say(line)


def _confirm(*, yes: bool) -> None:
    if yes:
        return
    if not _is_terminal():
        raise ConfigError(
            "nothing was changed, because there is no terminal to ask",
            remedy=f"add --yes, or only look: {_UPDATE} --dry-run",
        )
    click.confirm("Make these changes?", abort=True)


def _is_terminal() -> bool:
    return sys.stdin.isatty()


@click.command
@names_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@project_options
@image_path_option
@click.pass_context
def verify(
    ctx: click.Context,
    *,
    names: tuple[str, ...],
    as_json: bool,
    where: list[str],
    image_path: tuple[Path, ...],
) -> None:
    """Read images once, and compare them with their records and with the lock file.

    Without a NAME, these are the images in the lock file; without one, all that are built. Images for other
    architectures are left out unless they are built here. Each difference takes one line, with what to do
    about it. Then the exit status is 1.
    """
    project = ask(where)
    settings = _settings(project, image_path)
    catalogue, store = Catalogue(settings.image_path), ImageStore(cache_dir())
    known = project.lock if project.is_locked else None
    screen, found = Screen(stderr=as_json), {}
    if names:
        chosen = catalogue.select(names)
    elif known is not None:
        chosen = _those_here(known, catalogue, store, screen)
    else:
        chosen = [
            name
            for name in catalogue.names()
            if store.state(catalogue.get(name)) is ImageState.BUILT
        ]
    for name in chosen:
        with screen.waiting(f"reading {name}"):
            found[name] = _verdict(name, catalogue, store, known)
        if not as_json:
            _tell(screen, name, found[name], known)
    if as_json:
        write_json(
            {
                "lock": str(known.file) if known is not None else None,
                "images": [
                    {"name": name, "ok": not one.problems, **vars(one)}
                    for name, one in found.items()
                ],
            }
        )
    ctx.exit(1 if any(one.problems for one in found.values()) else 0)


@dataclass
class _Verdict:
    """What `verify` says of one image.

    Attributes:
        problems: what is wrong, a line each, with what to do.
        drift: differences that the lock allows.
    """

    problems: list[str] = field(default_factory=list)
    drift: list[str] = field(default_factory=list)


def _verdict(name: str, catalogue: Catalogue, store: ImageStore, known: Lock | None) -> _Verdict:
    try:
        built = store.require(_definition(name, catalogue, known))
        if damage := _damage(built):
            return _Verdict([f"{damage}. Remedy: {build_command(built.definition)} --force"])
        found = LockedImage.of(built)
    except (ConfigError, ImageError) as error:
        return _Verdict([f"{error.brief}. Remedy: {error.remedy}"])
    if known is None:
        return _Verdict()
    if name not in known.images:
        return _Verdict([f"is not in {known.file.name}. Remedy: {lock_command(name)}"])
    locked = known.images[name]
    breaches = locked.breaches(found)
    return _Verdict(
        [f"{difference}. Remedy: {_UPDATE} {name}" for difference in breaches],
        [str(one) for one in locked.differences(found) if one not in breaches],
    )


def _definition(name: str, catalogue: Catalogue, known: Lock | None) -> ImageDefinition:
    """The definition of an image that may be in the lock only.

    Raises:
        ConfigError: there is none, or it is invalid.
    """
    if known is not None and name in known.images and name not in catalogue.names():
        raise ConfigError(
            f"{known.file.name} has an image {name!r}, but there is no such image",
            remedy=f"remove its table [[image]] from {known.file}; or bring its definition back "
            "(vm_image_path, --image-path, or an import)",
        )
    return catalogue.get(name)


def _damage(built: BuiltImage) -> str:
    """Which file of an image has changed since it was made; empty if none has. All are read."""
    digests = built.record().get("digests", {})
    if not digests:
        return "was built by an old version, without digests of its files"
    return integrity.damage(built.folder, digests)


def _tell(screen: Screen, name: str, verdict: _Verdict, known: Lock | None) -> None:
    for problem in verdict.problems:
        screen.say(f"{name}: {problem}", "red")
    if not verdict.problems:
        screen.say(f"{name}: intact{', and as it is locked' if known is not None else ''}")
    for line in verdict.drift:
        screen.say(f"{name}: {line} (the lock allows that)")


def _settings(project: Project, image_path: Iterable[Path]) -> Settings:
    """The settings with the folders of images of the project, and those of the command."""
    return Settings(image_path=joined(project.image_path, image_path))


def _about(entry: LockedImage) -> str:
    parts = [f"definition {entry.definition[:16]}…"]
    parts += [f"{key} {digest[:16]}…" for key, digest in entry.digests.items()]
    if entry.packages:
        parts.append(f"{len(entry.packages)} packages")
    parts += [" of ".join(line.split()[1:]) for line in entry.archive[:1]]
    return ", ".join(parts)
