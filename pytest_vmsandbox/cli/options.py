"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from pytest_vmsandbox.core.settings import ACCELERATORS, Accelerator, Settings
from pytest_vmsandbox.core.spec import FIRMWARE, HARDWARE_NAMES, NETWORKS

image_path_option = click.option(
    "--image-path",
    multiple=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    envvar="VMSANDBOX_IMAGE_PATH",
    help="A folder with your own image definitions. Repeatable. VMSANDBOX_IMAGE_PATH sets it, too.",
)

offline_option = click.option("--offline", is_flag=True, help="Never use the network.")


def _hardware_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the hardware of a guest."""

    @click.option("--cpus", metavar="N", help="Number of CPUs (default: 1).")
    @click.option("--memory", metavar="SIZE", help="Memory, such as 1GiB (default: 512MiB).")
    @click.option(
        "--disk", metavar="SIZE", help="Size of the root disk (default: that of the image's disk)."
    )
    @click.option(
        "--network",
        metavar="|".join([*NETWORKS, "HOST:PORT,…"]),
        help="Network: isolated, nat to reach your network, or what the guest may reach (default: isolated).",
    )
    @click.option(
        "--firmware",
        metavar="|".join(FIRMWARE),
        help="What boots the guest: kernel (QEMU itself), uefi or bios (default: what the image says).",
    )
    @click.option(
        "--tpm", is_flag=True, default=None, help="Give the guest a TPM 2.0. It needs swtpm."
    )
    @click.option(
        "--user", metavar="NAME", help="User who runs commands in the guest (default: the image's)."
    )
    @click.option(
        "--kernel",
        metavar="PATH",
        help="Another kernel than the image's: its file, the folder in which you built it, a folder with "
        "boot/vmlinuz-VERSION, or a .deb file.",
    )
    @wraps(function)
    def command(*args: Any, **others: Any) -> None:
        function(*args, **others)

    return command


def guest_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options for a guest.

    The function gets `settings` for the factory, and `hardware` for `GuestFactory.boot`.
    """

    @_hardware_options
    @click.option(
        "--accel",
        type=click.Choice(ACCELERATORS),
        default="auto",
        help="Accelerator (default: auto, the best one that is proven to work here).",
    )
    @click.option(
        "--boot-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=Settings.boot_timeout,
        show_default=True,
        metavar="SECONDS",
        help="Timeout of a boot; ten times as long under emulation.",
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
