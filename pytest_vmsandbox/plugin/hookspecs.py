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
    """Return folders with more image definitions, like the ini key ``vm_image_path``.

    Relative paths start at the rootdir. The hook is called once, before tests are collected, in each
    process of pytest-xdist, too. So implement it in a plugin, or in the conftest.py of the rootdir or of
    a folder that the command line names.
    """


def pytest_vmsandbox_provision(config: pytest.Config, image: str) -> Provision | None:
    """Return a layer for all guests of an image, or None. It is called once for each image.

    The layer is done to a guest before it becomes a template. It is the way to prepare guests for tests
    that run inside. Layers of several plugins are done in the order in which the plugins registered.
    Those of ``vm_factory.prepare``, and what tests inside need, come after them.
    """


def pytest_vmsandbox_qemu_args(  # type: ignore[empty-body]
    config: pytest.Config, spec: MachineSpec
) -> Sequence[str]:
    """Return arguments to add at the end of QEMU's command line for a guest.

    ``spec`` describes the guest: ``spec.name``, ``spec.hardware``, ``spec.accelerator`` and so on.
    """


def pytest_vmsandbox_guest_ready(config: pytest.Config, guest: Guest) -> None:
    """Called when a guest answers, cloned or booted, before a test gets it.

    It is not called for guests that only become a template, nor for clones that no test has asked for.
    """


def pytest_vmsandbox_guest_stopping(config: pytest.Config, guest: Guest, failed: bool) -> None:
    """Called before a guest is ended. ``failed`` says whether a test that used it has failed."""
