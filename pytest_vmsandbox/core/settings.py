"""What a run was asked for, whoever asked: pytest's options or the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Hardware

ACCELERATORS = ("auto", "kvm", "hvf", "tcg")
DEFAULT_IMAGE = "debian-13"
CLONES = ("armed", "demand", "never")
CLONES_VARIABLE = "VMSANDBOX_CLONES"


def clones_wanted() -> str:
    """One of `CLONES`, as the environment says.

    Raises:
        ConfigError: it says something else.
    """
    value = os.environ.get(CLONES_VARIABLE) or CLONES[0]
    if value not in CLONES:
        raise ConfigError(
            f"{CLONES_VARIABLE}={value!r} is unknown", remedy=f"use {', '.join(CLONES)}"
        )
    return value


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run.

    Attributes:
        image_path: folders with image definitions besides our own.
        accelerator: one of `ACCELERATORS`.
        boot_timeout: seconds for a boot under KVM; scaled where there is only emulation.
        command_timeout: seconds for a command in a guest that names no time-out of its own.
        hardware: of a guest that names nothing of its own.
        offline: no guest may reach the network.
        clones: where fresh guests come from, one of `CLONES`: clones that are armed ahead of demand,
            clones that are made when they are asked for, or a boot for each. ``VMSANDBOX_CLONES``
            says so.
        cache: folder for images and verdicts; None for the user's cache folder.
        runtime: folder for what lives as long as a run; None for the user's own.
    """

    image_path: tuple[Path, ...] = ()
    accelerator: str = "auto"
    boot_timeout: float = 60.0
    command_timeout: float = 60.0
    hardware: Hardware = field(default_factory=Hardware)
    offline: bool = False
    clones: str = field(default_factory=clones_wanted)
    cache: Path | None = None
    runtime: Path | None = None
