"""An image's definition, for tests of what is made from one."""

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
