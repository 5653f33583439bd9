"""Makes images, wherever they come from. Some need a guest for that, so this is above the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pytest_vmsandbox.catalogue.builder import build as build_image, run_recipe
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.making import Build
from pytest_vmsandbox.catalogue.origin import ADOPTED
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageStore
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.deriving import derive


def make_image(
    definition: ImageDefinition,
    settings: Settings,
    *,
    progress: Callable[[str], None],
    force: bool = False,
) -> BuiltImage:
    """Make an image, unless it is built. Its base is made first, unless that is built.

    Args:
        definition: what to make.
        settings: where images are kept, and how guests run that are needed for it.
        progress: gets lines for people about the progress.
        force: make it even if it is built. Its base is not made again.

    Raises:
        VMSandboxError: see `builder.build`; or a guest that is needed does not do what it should.
    """

    def fill(build: Build) -> Mapping[str, object]:
        if (parent := definition.parent) is not None:
            base = make_image(parent, settings, progress=build.say)
            return derive(build, base, settings)
        if definition.source is None:
            return _adopted(build, run_recipe(build), settings)
        from pytest_vmsandbox.catalogue.importing.maker import make  # rarely needed

        return _adopted(build, make(build, cache=cache, offline=settings.offline), settings)

    cache = settings.cache or cache_dir()
    store = ImageStore(cache)
    return build_image(definition, store, fill, progress=progress, force=force)


def _adopted(
    build: Build, record: Mapping[str, object], settings: Settings
) -> Mapping[str, object]:
    """Boot what was made for the first time, if it did not take our key from us."""
    definition = build.definition
    if definition.source is None and definition.login.method not in ADOPTED:
        return record
    from pytest_vmsandbox.guests.adopting import adopt  # imports SSH, which is rarely needed

    return {**record, **adopt(build, settings)}
