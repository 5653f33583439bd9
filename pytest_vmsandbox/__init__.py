"""A pytest plugin that hands every test a fresh virtual machine.

The names here are the public ones, for annotations and ``except``. They are loaded when they are
first used: the plugin costs a run that needs no guest next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_vmsandbox.core.errors import (
        BootError,
        CacheError,
        CommandError,
        CommandTimeout,
        ConfigError,
        GuestLost,
        ImageError,
        InterpreterLost,
        LaunchError,
        MonitorError,
        TeardownError,
        TransferError,
        VMSandboxError,
    )
    from pytest_vmsandbox.core.spec import Hardware
    from pytest_vmsandbox.core.transport import CommandResult
    from pytest_vmsandbox.guests.access import SSHAccess
    from pytest_vmsandbox.guests.factory import GuestFactory
    from pytest_vmsandbox.guests.guest import Guest, Process
    from pytest_vmsandbox.guests.provision import PreparedImage, PreparedLayer, Provision

_HOME_OF = {
    "BootError": "core.errors",
    "CacheError": "core.errors",
    "CommandError": "core.errors",
    "CommandResult": "core.transport",
    "CommandTimeout": "core.errors",
    "ConfigError": "core.errors",
    "Guest": "guests.guest",
    "GuestFactory": "guests.factory",
    "GuestLost": "core.errors",
    "Hardware": "core.spec",
    "ImageError": "core.errors",
    "InterpreterLost": "core.errors",
    "LaunchError": "core.errors",
    "MonitorError": "core.errors",
    "PreparedImage": "guests.provision",
    "PreparedLayer": "guests.provision",
    "Process": "guests.guest",
    "Provision": "guests.provision",
    "SSHAccess": "guests.access",
    "TeardownError": "core.errors",
    "TransferError": "core.errors",
    "VMSandboxError": "core.errors",
}

__all__ = [
    "BootError",
    "CacheError",
    "CommandError",
    "CommandResult",
    "CommandTimeout",
    "ConfigError",
    "Guest",
    "GuestFactory",
    "GuestLost",
    "Hardware",
    "ImageError",
    "InterpreterLost",
    "LaunchError",
    "MonitorError",
    "PreparedImage",
    "PreparedLayer",
    "Process",
    "Provision",
    "SSHAccess",
    "TeardownError",
    "TransferError",
    "VMSandboxError",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
