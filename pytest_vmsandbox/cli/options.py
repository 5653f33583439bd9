"""The options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from pytest_vmsandbox.core.settings import ACCELERATORS, Accelerator, Settings
from pytest_vmsandbox.core.spec import HARDWARE_NAMES, NETWORKS

image_path_option = click.option(
    "--image-path",
    multiple=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    envvar="VMSANDBOX_IMAGE_PATH",
    help="A folder with further image definitions; repeatable. Also VMSANDBOX_IMAGE_PATH.",
)


def guest_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what a guest is to be.

    The function gets `settings` for the factory, and `hardware` for `GuestFactory.boot`.
    """

    @click.option("--cpus", metavar="N", help="Processors (default: 1).")
    @click.option("--memory", metavar="SIZE", help="Such as 1GiB (default: 512MiB).")
    @click.option("--disk", metavar="SIZE", help="Of the root disk (default: the image's).")
    @click.option(
        "--network",
        metavar="|".join(NETWORKS),
        help="Whether the guest reaches the world (default: isolated).",
    )
    @click.option("--user", metavar="NAME", help="Who it is in the guest (default: the image's).")
    @click.option(
        "--accel",
        type=click.Choice(ACCELERATORS),
        default="auto",
        help="The accelerator (default: auto, the best that is proven to work here).",
    )
    @click.option(
        "--boot-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=Settings.boot_timeout,
        show_default=True,
        metavar="SECONDS",
        help="For KVM; longer by itself where there is only emulation.",
    )
    @image_path_option
    @wraps(function)
    def command(
        *args: Any,
        accel: Accelerator,
        boot_timeout: float,
        image_path: tuple[Path, ...],
        **others: Any,
    ) -> None:
        settings = Settings(accelerator=accel, image_path=image_path, boot_timeout=boot_timeout)
        asked = {name: others.pop(name, None) for name in HARDWARE_NAMES}
        hardware = {name: value for name, value in asked.items() if value is not None}
        function(*args, settings=settings, hardware=hardware, **others)

    return command
