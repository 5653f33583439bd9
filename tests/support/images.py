"""Definitions of images, for tests of what is made from them."""

from pathlib import Path

from pytest_vmsandbox.catalogue.definition import ImageDefinition
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
