"""The settings of a run. They come from pytest's options or from the command line."""

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
    """How fresh guests are made, from the variable ``VMSANDBOX_CLONES``.

    Raises:
        ConfigError: its value is invalid.
    """
    return one_of(CLONES, os.environ.get(CLONES_VARIABLE) or "armed", CLONES_VARIABLE)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run.

    Attributes:
        image_path: folders with further image definitions.
        accelerator: what runs guests; ``auto`` is the best one that is proven to work here.
        boot_timeout: seconds for a boot under KVM; ten times as long under emulation.
        command_timeout: seconds for a command in a guest without a timeout of its own.
        hardware: the default hardware of guests.
        offline: whether the network is off limits for guests, too.
        clones: how fresh guests are made: ``armed`` clones ahead of demand, ``demand`` clones on
            demand, ``never`` boots each guest. ``VMSANDBOX_CLONES`` sets it.
        captures: whether the network of each guest is captured, where guests have logs.
        lock: the lock file that images must agree with; None for none.
        cache: folder for images, templates and verdicts; None for the user's cache folder.
        runtime: folder for files of the current runs; None for the user's own.
    """

    image_path: tuple[Path, ...] = ()
    accelerator: Accelerator = "auto"
    boot_timeout: float = 60.0
    command_timeout: float = 60.0
    hardware: Hardware = field(default_factory=Hardware)
    offline: bool = False
    clones: Clones = field(default_factory=clones_wanted)
    captures: bool = False
    lock: Path | None = None
    cache: Path | None = None
    runtime: Path | None = None
