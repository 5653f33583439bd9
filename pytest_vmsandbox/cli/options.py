"""The options that several commands share, and what they amount to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from pytest_vmsandbox.core.settings import ACCELERATORS, Accelerator, Settings
from pytest_vmsandbox.core.spec import NETWORKS

_Function = TypeVar("_Function", bound=Callable[..., Any])

image_path_option = click.option(
    "--image-path",
    multiple=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    envvar="VMSANDBOX_IMAGE_PATH",
    help="A folder with further image definitions; repeatable. Also VMSANDBOX_IMAGE_PATH.",
)

_GUEST_OPTIONS = (
    click.option("--cpus", metavar="N", help="Processors (default: 1)."),
    click.option("--memory", metavar="SIZE", help="Such as 1GiB (default: 512MiB)."),
    click.option("--disk", metavar="SIZE", help="Of the root disk (default: the image's)."),
    click.option(
        "--network",
        metavar="|".join(NETWORKS),
        help="Whether the guest reaches the world (default: isolated).",
    ),
    click.option("--user", metavar="NAME", help="Who it is in the guest (default: the image's)."),
    click.option(
        "--accel",
        type=click.Choice(ACCELERATORS),
        default="auto",
        help="The accelerator (default: auto, the best that is proven to work here).",
    ),
    click.option(
        "--boot-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=Settings.boot_timeout,
        show_default=True,
        metavar="SECONDS",
        help="For KVM; longer by itself where there is only emulation.",
    ),
    image_path_option,
)


@dataclass(frozen=True, kw_only=True)
class GuestOptions:
    """What the shared options ask for.

    Attributes:
        settings: for the factory.
        hardware: for `GuestFactory.boot`.
    """

    settings: Settings
    hardware: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        *,
        accel: Accelerator,
        boot_timeout: float,
        image_path: tuple[Path, ...],
        **hardware: str | None,
    ) -> GuestOptions:
        """From the values of the options that `guest_options` adds."""
        settings = Settings(accelerator=accel, image_path=image_path, boot_timeout=boot_timeout)
        given = {name: value for name, value in hardware.items() if value is not None}
        return cls(settings=settings, hardware=given)


def guest_options(function: _Function) -> _Function:
    """Add the options that say what a guest is to be."""
    for option in reversed(_GUEST_OPTIONS):
        function = option(function)
    return function
