"""Definitions of images, for tests of what is made from them."""

from pathlib import Path

from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageStore, files_of
from pytest_vmsandbox.core.spec import GIB, MIB

DEFINITION = ImageDefinition(
    name="some_image",
    folder=Path("/nowhere"),
    description="An image",
    architecture="x86_64",
    recipe="build",
    uses=(),
    requires=(),
    append="root=/dev/vda rw",
    memory_min=64 * MIB,
    disk_size=GIB,
    python=True,
    init="systemd",
    user="root",
)


def toml(
    *,
    description="An image",
    architecture="x86_64",
    requires="[]",
    disk=False,
    memory_min="128MiB",
    user="root",
) -> str:
    """The text of a definition."""
    return f"""\
schema = 1
description = "{description}"
architecture = "{architecture}"
recipe = "build"
uses = []
requires = {requires}
{"[disk]" if disk else ""}
{'size = "1GiB"' if disk else ""}
[boot]
append = ""
memory_min = "{memory_min}"
[system]
python = false
init = "busybox"
user = "{user}"
"""


def define(folder: Path, definition: str, recipe: str = "#!/bin/sh\n") -> None:
    """Make a folder hold an image that can be built."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "image.toml").write_text(definition)
    (folder / "build").write_text(recipe)
    (folder / "build").chmod(0o755)


def keep(
    cache: Path,
    definition: ImageDefinition,
    *,
    packages: str | None = None,
    archive: str | None = None,
    **record: object,
) -> BuiltImage:
    """Put an image into a cache, as if it had been made. Its files are small, and boot nothing.

    Args:
        cache: the folder.
        definition: what it was made from.
        packages: the content of its list of packages; None for no list.
        archive: likewise, of the archive that they came from.
        record: further values of its record.
    """
    store = ImageStore(cache)

    def fill(out: Path, _lock: int) -> dict[str, object]:
        for name in files_of(definition):
            (out / name).write_text(f"{name} of {definition.name}\n")
        for name, content in (("packages.txt", packages), ("archive.txt", archive)):
            if content is not None:
                (out / name).write_text(content)
        kept = {"name": definition.name, "digest": definition.digest, "built": 0.0}
        return {**kept, "definition": definition.record(), **record}

    return store.make(store.key(definition), fill, on_busy=lambda: None, replace=True)
