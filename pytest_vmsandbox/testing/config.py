"""Options and ini keys: the only reader of `pytest.Config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.settings import ACCELERATORS, DEFAULT_IMAGE, Settings
from pytest_vmsandbox.core.spec import Hardware

MISSING = ("error", "skip")
_HARDWARE_KEYS = ("cpus", "memory", "disk", "network", "user")


def add_options(parser: pytest.Parser) -> None:
    """Register everything. Defaults are None, so that an ini key counts where no option is given."""
    group = parser.getgroup("vmsandbox", "virtual machines (pytest-vmsandbox)")
    group.addoption(
        "--vm",
        action="append",
        metavar="NAME",
        help="image to run on; repeatable; globs, '!' negates, 'all'. Ini key: vm_images",
    )
    group.addoption(
        "--vm-list", action="store_true", help="list the images, their state and size, and exit"
    )
    group.addoption(
        "--vm-accel",
        choices=ACCELERATORS,
        help="accelerator; auto (the default) is the best one proven to run a kernel here",
    )
    group.addoption(
        "--vm-missing", choices=MISSING, help="what a missing QEMU or image does (default: error)"
    )
    group.addoption("--vm-artifacts", metavar="DIR", help="where the artifacts of failed tests go")
    group.addoption(
        "--vm-boot-timeout",
        metavar="SECONDS",
        help="for a boot under KVM (default: 60); scaled by itself where there is only emulation",
    )
    parser.addini("vm_images", "images to run on, like --vm", type="args", default=None)
    parser.addini("vm_accel", "accelerator, like --vm-accel", default=None)
    parser.addini("vm_missing", "like --vm-missing", default=None)
    parser.addini("vm_artifacts_dir", "like --vm-artifacts", default=None)
    parser.addini("vm_boot_timeout", "like --vm-boot-timeout", default=None)
    parser.addini("vm_image_path", "folders with image definitions", type="paths", default=None)
    parser.addini("vm_command_timeout", "seconds for a command in a guest (60)", default=None)
    for name in _HARDWARE_KEYS:
        parser.addini(f"vm_{name}", f"default {name} of a guest", default=None)


def settings(config: pytest.Config) -> Settings:
    """The settings of this run.

    Raises:
        pytest.UsageError: a value cannot be meant; the text names the key and what is allowed.
    """
    boot_timeout = config.getoption("--vm-boot-timeout") or _ini(config, "vm_boot_timeout")
    values: dict[str, Any] = {
        "image_path": image_path(config),
        "accelerator": _choice(config, "--vm-accel", "vm_accel", ACCELERATORS),
        "boot_timeout": _seconds(boot_timeout, "vm_boot_timeout"),
        "command_timeout": _seconds(_ini(config, "vm_command_timeout"), "vm_command_timeout"),
    }
    wishes = {name: _ini(config, f"vm_{name}") for name in _HARDWARE_KEYS}
    try:
        hardware = Hardware().changed(wishes)
    except ConfigError as error:
        raise pytest.UsageError(f"in the ini file: vm_{error}") from error
    given = {name: value for name, value in values.items() if value is not None}
    return Settings(hardware=hardware, **given)


def check(config: pytest.Config) -> None:
    """Read all that is read later on, so that what cannot be meant is found before the tests.

    Raises:
        pytest.UsageError: a value cannot be meant.
    """
    settings(config)
    skip_missing(config)


def image_path(config: pytest.Config) -> tuple[Path, ...]:
    """Folders with image definitions: the ini key's, and the hook's."""
    folders = list(_ini(config, "vm_image_path") or ())
    for more in config.hook.pytest_vmsandbox_images(config=config):
        folders.extend(more)
    return tuple(Path(folder) for folder in folders)


def selected_patterns(config: pytest.Config) -> tuple[list[str], bool]:
    """Which images were asked for, and whether the command line did."""
    if patterns := config.getoption("--vm"):
        return list(patterns), True
    return list(_ini(config, "vm_images") or [DEFAULT_IMAGE]), False


def skip_missing(config: pytest.Config) -> bool:
    """Whether a missing QEMU or image skips a test instead of being an error."""
    return _choice(config, "--vm-missing", "vm_missing", MISSING) == "skip"


def artifacts_dir(config: pytest.Config) -> Path | None:
    """The folder for artifacts of failed tests, if one was named."""
    if option := config.getoption("--vm-artifacts"):
        return Path(config.invocation_params.dir, option)
    if ini := _ini(config, "vm_artifacts_dir"):
        return Path(config.rootpath, ini)
    return None


def _ini(config: pytest.Config, key: str) -> Any:
    return config.getini(key) or None


def _choice(config: pytest.Config, option: str, key: str, allowed: tuple[str, ...]) -> str | None:
    value: str | None = config.getoption(option) or _ini(config, key)
    if value is not None and value not in allowed:
        raise pytest.UsageError(f"{key} = {value!r}: use one of {', '.join(allowed)}")
    return value


def _seconds(value: str | None, key: str) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise pytest.UsageError(f"{key} = {value!r}: use a positive number of seconds")
    return seconds
