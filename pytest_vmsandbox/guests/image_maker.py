"""Makes images, wherever they come from. Some need a guest for that, so this is above the catalogue."""

from __future__ import annotations

from collections.abc import Callable

from pytest_vmsandbox.catalogue.builder import build, run_recipe
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.making import Maker
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageStore
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings


def make_image(
    definition: ImageDefinition,
    settings: Settings,
    *,
    progress: Callable[[str], None],
    force: bool = False,
) -> BuiltImage:
    """Make an image, unless it is built.

    Args:
        definition: what to make, from a catalogue with the folders of `settings`.
        settings: where images are kept, and how guests run that are needed for it.
        progress: gets lines for people about the progress.
        force: make it even if it is built.

    Raises:
        VMSandboxError: see `build`; or a guest that is needed for it does not do what it should.
    """

    def read_again() -> ImageDefinition:
        return Catalogue(settings.image_path).get(definition.name)

    return build(
        definition,
        ImageStore(settings.cache or cache_dir()),
        _maker(definition),
        progress=progress,
        force=force,
        read_again=read_again,
    )


def _maker(_definition: ImageDefinition) -> Maker:
    """What makes an image of that origin."""
    return run_recipe
