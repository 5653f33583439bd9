"""The hooks that other plugins and conftest files can implement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.guests.provision import Provision
    from pytest_vmsandbox.machine.cmdline import MachineSpec


def pytest_vmsandbox_images(config: pytest.Config) -> Sequence[Path]:  # type: ignore[empty-body]
    """Return folders with further image definitions, as the ini key `vm_image_path` names them."""


def pytest_vmsandbox_provision(config: pytest.Config, image: str) -> Provision | None:
    """Return what is done to guests of an image before they become a template, or None; once for each image.

    The layers of several plugins lie one on the other, in the order in which they registered, and
    below those of `vm_factory.prepare` and of tests that run inside.
    """


def pytest_vmsandbox_qemu_args(  # type: ignore[empty-body]
    config: pytest.Config, spec: MachineSpec
) -> Sequence[str]:
    """Return arguments to add to the end of QEMU's command line for a guest."""


def pytest_vmsandbox_guest_ready(config: pytest.Config, guest: Guest) -> None:
    """Called when a guest answers, clone or not, before a test gets it.

    Guests that only become a template, and clones that nobody has asked for yet, are not told of.
    """


def pytest_vmsandbox_guest_stopping(config: pytest.Config, guest: Guest, failed: bool) -> None:
    """Called before a guest is ended; `failed` tells whether a test that used it has failed."""
