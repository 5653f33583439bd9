"""Makes images for a command, and compares them with the project's lock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.lock import Difference, Lock, LockedImage, lock_command, shown
from pytest_vmsandbox.catalogue.store import ImageState, ImageStore
from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core.deadline import monotonic
from pytest_vmsandbox.core.errors import ImageError, VMSandboxError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.guests.images.maker import make_image

_SHOWN = 20  # lines of differences


def build_each(
    names: Iterable[str],
    catalogue: Catalogue,
    settings: Settings,
    *,
    force: bool,
    lock: Lock | None,
) -> None:
    """Build images, and show the progress. If one cannot be built, the others are still tried.

    Args:
        names: of the images.
        catalogue: has their definitions.
        settings, force, lock: see `build_one`.

    Raises:
        ExceptionGroup: some cannot be built.
    """
    errors: list[Exception] = []
    for name in names:
        try:
            build_one(catalogue.get(name), settings, force=force, lock=lock)
        except VMSandboxError as error:
            errors.append(error)
    if errors:
        raise ExceptionGroup("images", errors)


def build_one(
    definition: ImageDefinition,
    settings: Settings,
    *,
    force: bool = False,
    lock: Lock | None = None,
) -> None:
    """Build one image and show the progress.

    Args:
        definition: what to build.
        settings: where images are kept. If they say offline, nothing is built that may use the network.
        force: build it even if it is built.
        lock: of the project. A source must have its digests. Other differences are shown.

    Raises:
        VMSandboxError: the image cannot be built or kept.
    """
    screen, store, name = Screen(), ImageStore(cache_dir()), definition.name
    if not force and store.state(definition) is ImageState.BUILT:
        screen.say(f"{name} is built")
    else:
        screen.say(f"building {name}: {definition.description}", "bold")
        began = monotonic()
        with _naming(lock, name), screen.stages() as stage:
            image = make_image(definition, settings, progress=stage, force=force, lock=lock)
        took = f"{monotonic() - began:.0f} s"
        screen.say(f"{name} is built: {format_size(image.size_on_disk)}, {took}")
        for note in image.notes:
            screen.say(f"{name}: {note}", "yellow")
    if lock is not None:
        _compare(screen, lock, LockedImage.of(store.require(definition)))


@contextmanager
def _naming(lock: Lock | None, name: str) -> Iterator[None]:
    """Let an error say that the lock file has the digests of the files."""
    try:
        yield
    except ImageError as error:
        if lock is not None and name in lock.images and lock.images[name].digests:
            error.add_note(
                f"The digests are those in {lock.file}. 'vmsandbox images update {name}' shows what is "
                "there now, and takes it into the lock."
            )
        raise


def _compare(screen: Screen, lock: Lock, found: LockedImage) -> None:
    """Show how an image differs from the lock, which stays as it is."""
    name, file = found.name, lock.file.name
    if name not in lock.images:
        screen.say(f"{name} is not in {file}. To add it, run '{lock_command(name)}'", "yellow")
        return
    locked = lock.images[name]
    differences, breaches = locked.differences(found), locked.breaches(found)
    if not differences:
        return
    screen.say(f"{name} differs from {file}, which stays as it is:", "yellow" if breaches else "")
    for line in shown(_important_first(differences, breaches), _SHOWN):
        screen.say(line)
    if breaches:
        screen.say(
            f"Tests do not start on it. To take it into {file}, run 'vmsandbox images update {name}'"
        )
    else:
        screen.say("The lock allows that.")


def _important_first(differences: list[Difference], breaches: list[Difference]) -> list[Difference]:
    return [*breaches, *(one for one in differences if one not in breaches)]
