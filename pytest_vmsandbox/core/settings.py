"""What a run was asked for, whoever asked: pytest's options or the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from pytest_vmsandbox.core.spec import Hardware, one_of

Accelerator = Literal["auto", "kvm", "hvf", "tcg"]
Isolation = Literal["test", "module", "session"]
Clones = Literal["armed", "demand", "never"]
ACCELERATORS: tuple[Accelerator, ...] = get_args(Accelerator)
ISOLATIONS: tuple[Isolation, ...] = get_args(Isolation)
CLONES: tuple[Clones, ...] = get_args(Clones)
DEFAULT_IMAGE = "debian-13"
CLONES_VARIABLE = "VMSANDBOX_CLONES"


def clones_wanted() -> Clones:
    """Where fresh guests come from, as the environment says.

    Raises:
        ConfigError: its value is invalid.
    """
    return one_of(CLONES, os.environ.get(CLONES_VARIABLE) or "armed", CLONES_VARIABLE)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run.

    Attributes:
        image_path: folders with image definitions besides our own.
        accelerator: what runs guests; ``auto`` is the best that is proven to work here.
        boot_timeout: seconds for a boot under KVM; scaled where there is only emulation.
        command_timeout: seconds for a command in a guest that names no time-out of its own.
        hardware: of a guest that names nothing of its own.
        offline: no guest may reach the network.
        clones: where fresh guests come from: clones that are armed ahead of demand, clones that are
            made on demand, or a boot for each. ``VMSANDBOX_CLONES`` sets it.
        cache: folder for images and verdicts; None for the user's cache folder.
        runtime: folder for what lives as long as a run; None for the user's own.
    """

    image_path: tuple[Path, ...] = ()
    accelerator: Accelerator = "auto"
    boot_timeout: float = 60.0
    command_timeout: float = 60.0
    hardware: Hardware = field(default_factory=Hardware)
    offline: bool = False
    clones: Clones = field(default_factory=clones_wanted)
    cache: Path | None = None
    runtime: Path | None = None
