"""The images for people and programs: name, state, size and what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.spec import format_size

OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """One image.

    Attributes:
        name: of the image.
        state: an `ImageState`: ``built``, ``stale`` (only from an older definition) or
            ``missing``; or `OTHER`, for one that is built and of which no definition is here.
        size: bytes on the disk, of everything that is built of that name.
        description: one line.
        architecture: such as ``x86_64``.
    """

    name: str
    state: str
    size: int
    description: str
    architecture: str


def entries(catalogue: Catalogue, store: ImageStore) -> list[ImageEntry]:
    """All images of the catalogue, in its order, then those of which only a build is here.

    Raises:
        ConfigError: a definition is not well-formed.
    """
    sizes: dict[str, int] = {}
    definitions = {}
    for image in store.all():
        name = image.definition.name
        sizes[name] = sizes.get(name, 0) + image.size_on_disk
        definitions[name] = image.definition
    states = {}
    for name in catalogue.names():
        definitions[name] = catalogue.get(name)
        states[name] = store.state(definitions[name]).value
    return [
        ImageEntry(
            name=name,
            state=states.get(name, OTHER),
            size=sizes.get(name, 0),
            description=definitions[name].description,
            architecture=definitions[name].architecture,
        )
        for name in (*states, *(name for name in definitions if name not in states))
    ]


def cells(images: Sequence[ImageEntry]) -> list[tuple[str, str, str, str]]:
    """Name, state, size and description of each image, padded so that they form columns."""
    width = max((len(image.name) for image in images), default=0)
    return [
        (
            f"{image.name:{width}}",
            f"{image.state:7}",
            f"{format_size(image.size) if image.size else '-':>9}",
            image.description,
        )
        for image in images
    ]


def lines(images: Sequence[ImageEntry]) -> list[str]:
    """The images as a table of text."""
    return ["  ".join(row) for row in cells(images)]
