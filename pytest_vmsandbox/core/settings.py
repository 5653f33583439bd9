"""What a run was asked for, whoever asked: pytest's options or the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pytest_vmsandbox.core.spec import Hardware

ACCELERATORS = ("auto", "kvm", "hvf", "tcg")
DEFAULT_IMAGE = "debian-13"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run.

    Attributes:
        image_path: folders with image definitions besides our own.
        accelerator: one of `ACCELERATORS`.
        boot_timeout: seconds for a boot under KVM; scaled where there is only emulation.
        command_timeout: seconds for a command in a guest that names no time-out of its own.
        hardware: of a guest that names nothing of its own.
        cache: folder for images and verdicts; None for the user's cache folder.
        runtime: folder for what lives as long as a run; None for the user's own.
    """

    image_path: tuple[Path, ...] = ()
    accelerator: str = "auto"
    boot_timeout: float = 60.0
    command_timeout: float = 60.0
    hardware: Hardware = field(default_factory=Hardware)
    cache: Path | None = None
    runtime: Path | None = None
