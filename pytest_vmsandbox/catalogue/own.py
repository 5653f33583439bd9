"""Where what we bring is: the folder of our own images, and the source of the helper in it."""

from __future__ import annotations

from pathlib import Path

HELPER_VARIABLE = "VMSANDBOX_HELPER"  # tells a recipe where the helper is


def own_folders() -> list[Path]:
    """The folder of our own images, if it is there: inside the package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [path for path in (package / "images", package.parent / "images") if path.is_dir()][:1]


def helper_source() -> Path | None:
    """The source of the helper, if it is there."""
    sources = (folder / "helper" / "helper.c" for folder in own_folders())
    return next((source for source in sources if source.is_file()), None)
