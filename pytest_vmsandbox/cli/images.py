"""``vmsandbox images``: lists, builds and removes images, and has the commands of `lock.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from pytest_vmsandbox.catalogue import variants
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageEntry, ImageStore, columns, left_out
from pytest_vmsandbox.cli import kept
from pytest_vmsandbox.cli.importing import fetch, forget, import_
from pytest_vmsandbox.cli.lock import lock, update, verify
from pytest_vmsandbox.cli.options import image_path_option, offline_option
from pytest_vmsandbox.cli.project import joined, lock_here, project_options
from pytest_vmsandbox.cli.screen import Screen, write_json
from pytest_vmsandbox.core.errors import ConfigError, VMSandboxError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.guests.templates import TemplateStore

_STYLES = {"built": "green", "stale": "yellow", "missing": "dim", "other": "dim", "invalid": "red"}


@click.group
def images() -> None:
    """List, build, lock and remove images."""


@images.command("list")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--all", "every", is_flag=True, help="List the images for all architectures.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@image_path_option
def list_(
    *, names: tuple[str, ...], every: bool, as_json: bool, image_path: tuple[Path, ...]
) -> None:
    """List the images with their state, their size on the disk and a description.

    Without a NAME, these are the images for this machine's architecture, and others that are built. A
    NAME may be a glob such as 'debian-*_arm64'. Without _ it is for this machine's architecture, unless
    you add --all. --json lists all unless you give a NAME.

    \b
    built     ready
    stale     the definition has changed since it was built
    missing   not built
    other     built, but there is no definition of it
    invalid   the definition is wrong: the error below the list says how

    No tests run inside an image that is host-driven, because it has no Python 3.9 or newer. Tests that
    drive a guest from outside work with it.

    Below the images are their templates: guests that were booted once and saved, from which clones are
    made. Then come the kept guests of failed tests, which 'vmsandbox kept list' names. With a NAME, only
    those of the listed images are shown. Each line has the number of an image's templates or guests, and
    their size on the disk.
    """  # noqa: D301  # a mark for click
    catalogue = Catalogue(image_path)
    found = ImageStore(cache_dir()).entries(
        catalogue, None if (every or as_json) and not names else names, foreign=every
    )
    saved: dict[str, list[int]] = {}
    listed = {image.name for image in found}
    for template in sorted(TemplateStore(cache_dir()).all(), key=lambda template: template.image):
        if not names or template.image in listed:
            saved.setdefault(template.image, []).append(template.size_on_disk)
    sizes = kept.by_image(cache_dir())
    guests = {name: its for name, its in sizes.items() if not names or name in listed}
    if as_json:
        content = {"images": [asdict(image) for image in found]}
        write_json({**content, "templates": _summed(saved), "kept": _summed(guests)})
    else:
        _show(found, saved, guests)
        if more := left_out(catalogue, found, names):
            Screen().say(more, "dim")
    if problems := [ConfigError(image.problem) for image in found if image.problem]:
        raise ExceptionGroup("images", problems)


def _summed(sizes: Mapping[str, Sequence[int]]) -> list[dict[str, object]]:
    return [
        {"image": name, "count": len(its), "size_bytes": sum(its)} for name, its in sizes.items()
    ]


def _show(
    found: Sequence[ImageEntry],
    saved: Mapping[str, Sequence[int]],
    guests: Mapping[str, Sequence[int]],
) -> None:
    """Show images, and the sizes of their templates and of their kept guests, for people."""
    screen = Screen()
    width = max(map(len, (*saved, *guests, *(image.name for image in found))), default=0)
    for image, (name, state, size, description) in zip(found, columns(found, width), strict=True):
        screen.parts(
            (name, "bold"),
            (f"  {state}", _STYLES[image.state]),
            (f"  {size}", ""),
            (f"  {description}", ""),
        )
    rows = [
        (name, "saved", sizes, _number(len(sizes)) + ", for clones")
        for name, sizes in saved.items()
    ]
    rows += [
        (name, "kept", sizes, f"{len(sizes)} guest{'' if len(sizes) == 1 else 's'} of tests")
        for name, sizes in guests.items()
    ]
    for name, state, sizes, what in rows:
        screen.parts(
            (f"{name:{width}}", "bold"),
            (f"  {state:7}", "cyan"),
            (f"  {format_size(sum(sizes)):>9}", ""),
            (f"  {what}", ""),
        )


@images.command
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--force", is_flag=True, help="Build images again even if they are built.")
@offline_option
@project_options
@image_path_option
def build(
    *,
    names: tuple[str, ...],
    force: bool,
    offline: bool,
    where: list[str],
    image_path: tuple[Path, ...],
) -> None:
    """Build images, unless they are built.

    A NAME may be a glob such as 'debian-*', or 'all'. If one build fails, the others are still tried.
    If the project here has a lock file, the images are compared with it. It is not changed.
    """
    from pytest_vmsandbox.cli.building import build_each  # `images list` is quicker without it

    locked, folders = lock_here(where)
    settings = Settings(image_path=joined(folders, image_path), offline=offline)
    catalogue = Catalogue(settings.image_path)
    build_each(catalogue.select(names), catalogue, settings, force=force, lock=locked)


@images.command
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@image_path_option
def rm(*, names: tuple[str, ...], image_path: tuple[Path, ...]) -> None:
    """Remove built images and their templates, unless guests use them.

    What 'images import' has written for them goes, too, and what was downloaded for them. A NAME may be
    a glob. Without _ it is for this machine's architecture; 'debian-*_*' is for all. The kept guests of
    failed tests stay, and work without the image.
    """
    catalogue, store = Catalogue(image_path), ImageStore(cache_dir())
    templates = TemplateStore(cache_dir())
    built = {template.image: "" for template in templates.all()}
    built |= {image.definition.name: image.definition.architecture for image in store.all()}
    chosen: dict[str, None] = {}
    for pattern in names:
        chosen |= dict.fromkeys(_to_remove(pattern, catalogue, built))
    screen = Screen()
    errors: list[Exception] = []
    for name in chosen:
        removed, freed, _ = templates.discard(templates.of_image(name))
        said = f"removed {name}{f' and {_number(removed)}' if removed else ''}"
        try:
            freed += store.remove(name)
        except VMSandboxError as error:
            errors.append(error)
            said = f"removed {_number(removed)} of {name}"
        else:
            freed += forget(name, catalogue)
            if not freed:
                screen.say(f"{name} is not built, so there is nothing to remove")
        if freed:
            screen.say(f"{said}: freed {format_size(freed)}")
    left = sorted(
        name
        for name, architecture in built.items()
        if name not in chosen and any(variants.fits(glob, name, architecture) for glob in names)
    )
    if left:
        screen.say(f"left, because a glob without _ is for this machine only: {', '.join(left)}")
    sizes = kept.by_image(cache_dir())
    if theirs := [size for name in chosen for size in sizes.get(name, ())]:
        screen.say(f"{kept.total(theirs)} stay, and work without the image: vmsandbox kept list")
    if errors:
        raise ExceptionGroup("images", errors)


def _to_remove(pattern: str, catalogue: Catalogue, built: Mapping[str, str]) -> list[str]:
    """The names that a pattern selects, in the catalogue or only among what is in the cache.

    Args:
        pattern: a name or a glob.
        catalogue: all images.
        built: names of what is in the cache, and architectures.
    """
    known = catalogue.names()
    others = [
        name
        for name, architecture in sorted(built.items())
        if name not in known
        and variants.fits(pattern, name, architecture)
        and variants.selects(pattern, architecture)
    ]
    try:
        found = catalogue.select([pattern])
    except ConfigError:
        if not others:
            raise
        return others
    return [name for name in found if name in built] + others or found


for _command in (import_, fetch, lock, update, verify):
    images.add_command(_command)


def _number(templates: int) -> str:
    return f"{templates} template{'' if templates == 1 else 's'}"
