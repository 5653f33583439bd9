"""Makes images, wherever they come from. Some need a guest for that, so this is above the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pytest_vmsandbox.catalogue.builder import build as build_image, run_recipe
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.lock import Lock
from pytest_vmsandbox.catalogue.making import Build
from pytest_vmsandbox.catalogue.origin import ADOPTED
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageStore
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.images import second_stage
from pytest_vmsandbox.guests.images.deriving import derive
from pytest_vmsandbox.machine.qemu import find_qemu


def make_image(
    definition: ImageDefinition,
    settings: Settings,
    *,
    progress: Callable[[str], None],
    force: bool = False,
    lock: Lock | None = None,
) -> BuiltImage:
    """Make an image, unless it is built. Its base is made first, unless that is built.

    Args:
        definition: what to make.
        settings: where images are kept, and how guests run that are needed for it.
        progress: gets lines for people about the progress.
        force: make it even if it is built. Its base is not made again.
        lock: of the project. Files from elsewhere must have the digests in it.

    Raises:
        VMSandboxError: see `builder.build`; or a guest that is needed does not do what it should.
    """

    def fill(build: Build) -> Mapping[str, object]:
        if settings.offline:
            _check_offline(definition)
        if (parent := definition.parent) is not None:
            base = make_image(parent, settings, progress=build.say, lock=lock)
            return derive(build, base, settings)
        if definition.source is None:
            return _adopted(build, _from_recipe(build, settings), settings)
        from pytest_vmsandbox.catalogue.importing.maker import make  # rarely needed

        locked = _locked(definition, lock)
        record = make(build, cache=cache, offline=settings.offline, locked=locked)
        return _adopted(build, record, settings)

    cache = settings.cache or cache_dir()
    return build_image(definition, ImageStore(cache), fill, progress=progress, force=force)


def _from_recipe(build: Build, settings: Settings) -> Mapping[str, object]:
    """Make an image by its recipe, and in a guest what the recipe could not do here."""
    record = run_recipe(build, lambda: find_qemu(build.definition.architecture))
    if second_stage.is_due(build):
        second_stage.complete(build, settings)
    return record


def _adopted(
    build: Build, record: Mapping[str, object], settings: Settings
) -> Mapping[str, object]:
    """Boot what was made for the first time, unless our own recipe has made it for our keys."""
    definition = build.definition
    if definition.source is None and definition.login.method not in ADOPTED:
        return record
    from pytest_vmsandbox.guests.images.adopting import adopt  # imports SSH, which is rarely needed

    return {**record, **adopt(build, settings)}


def _locked(definition: ImageDefinition, lock: Lock | None) -> Mapping[str, str]:
    """The digests that files from elsewhere must have, by the lock file."""
    entry = None if lock is None else lock.images.get(definition.name)
    return {} if entry is None else entry.digests


def _check_offline(definition: ImageDefinition) -> None:
    """Refuse to make what may use the network. Files from elsewhere may be here already.

    Raises:
        ImageError: it may use the network. Nobody knows what a recipe does.
    """
    if definition.recipe or (definition.add is not None and definition.add.network == "nat"):
        raise ImageError(
            f"{definition.name} cannot be built offline, because that may use the network",
            remedy="leave out --offline, or copy the image from the cache of another machine",
        )
