"""What comes with the package: the folder of its images, and the source of the helper."""

from __future__ import annotations

from pathlib import Path

HELPER_VARIABLE = "VMSANDBOX_HELPER"  # tells a recipe where the helper for its guests is


def own_folders() -> list[Path]:
    """The folder of our own images, if it is there: inside the package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [path for path in (package / "images", package.parent / "images") if path.is_dir()][:1]


def helper_file() -> Path | None:
    """The source of the helper; None if it is missing."""
    files = (folder / "helper" / "helper.c" for folder in own_folders())
    return next(filter(Path.is_file, files), None)
