"""Images whose guests have no helper of ours, as those of vendors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from pytest_vmsandbox.catalogue.builder import build
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.making import Build
from pytest_vmsandbox.catalogue.own import own_folders
from pytest_vmsandbox.catalogue.store import HOST_KEY, INITRD, KERNEL, BuiltImage, ImageStore
from pytest_vmsandbox.guests.kernels import newc

_STARTS_HELPER = ': "$(assist &)"\n'
_PADDING = 512  # of an archive that another one follows


def bare(folder: Path, store: ImageStore, tiny: BuiltImage, **files: str) -> BuiltImage:
    """An image like `tiny` whose init does not start a helper, and where there is none.

    Args:
        folder: for its definition.
        store: keeps the image.
        files: more programs in /usr/bin, or others instead of those of `tiny`: name → content.
    """
    folder.mkdir(parents=True)
    text = (tiny.definition.folder / "image.toml").read_text()

    (folder / "image.toml").write_text(
        "\n".join(
            line for line in text.splitlines() if not line.startswith(("uses =", "requires ="))
        )
    )
    (folder / "build").touch(mode=0o755)
    init = next(folder / "tiny" / "init" for folder in own_folders()).read_text()
    assert _STARTS_HELPER in init
    entries = [
        ("init", 0o100755, init.replace(_STARTS_HELPER, "").encode()),
        ("usr/lib/vmsandbox/helper", 0o100644, b""),
        *((f"usr/bin/{name}", 0o100755, content.encode()) for name, content in files.items()),
    ]

    def make(work: Build) -> Mapping[str, object]:
        assert tiny.kernel is not None
        assert tiny.initrd is not None
        shutil.copy(tiny.kernel, work.out / KERNEL)
        shutil.copy(tiny.folder / HOST_KEY, work.out / HOST_KEY)
        archive = tiny.initrd.read_bytes()
        archive += bytes(-len(archive) % _PADDING) + newc(entries)
        (work.out / INITRD).write_bytes(archive)
        return {}

    return build(ImageDefinition.read(folder), store, make, progress=lambda _: None)
