"""A pytest plugin that hands every test a fresh virtual machine.

The names here are public: use them in annotations and in ``except``. Each is loaded on first use, so
the plugin costs almost nothing in a run without guests.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_vmsandbox.core.errors import (
        BootError,
        CacheError,
        CommandError,
        CommandResult,
        CommandTimeout,
        ConfigError,
        GuestLost,
        ImageError,
        InterpreterLost,
        LaunchError,
        LockError,
        MonitorError,
        TeardownError,
        TransferError,
        VMSandboxError,
    )
    from pytest_vmsandbox.core.spec import Hardware
    from pytest_vmsandbox.guests.clusters.cluster import Cluster
    from pytest_vmsandbox.guests.clusters.sealed import SealedCluster
    from pytest_vmsandbox.guests.crash.crash_points import CrashPoints
    from pytest_vmsandbox.guests.crash.report import CrashFailure, CrashPointError, CrashReport
    from pytest_vmsandbox.guests.factory import GuestFactory
    from pytest_vmsandbox.guests.faults.fault import Fault
    from pytest_vmsandbox.guests.faults.faults import Faults
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.guests.networks.network import Network
    from pytest_vmsandbox.guests.provision import PreparedImage, PreparedLayer, Provision
    from pytest_vmsandbox.guests.reaching.access import SSHAccess
    from pytest_vmsandbox.guests.reaching.process import Process
    from pytest_vmsandbox.guests.running.plugging import AttachedDisk

_MODULES = (  # the modules that define them, the cheapest to import first
    "core.errors",
    "core.spec",
    "guests.reaching.process",
    "guests.reaching.access",
    "guests.provision",
    "guests.running.plugging",
    "guests.crash.report",
    "guests.crash.crash_points",
    "guests.faults.fault",
    "guests.faults.faults",
    "guests.guest",
    "guests.networks.network",
    "guests.clusters.sealed",
    "guests.clusters.cluster",
    "guests.factory",
)

__all__ = [
    "AttachedDisk",
    "BootError",
    "CacheError",
    "Cluster",
    "CommandError",
    "CommandResult",
    "CommandTimeout",
    "ConfigError",
    "CrashFailure",
    "CrashPointError",
    "CrashPoints",
    "CrashReport",
    "Fault",
    "Faults",
    "Guest",
    "GuestFactory",
    "GuestLost",
    "Hardware",
    "ImageError",
    "InterpreterLost",
    "LaunchError",
    "LockError",
    "MonitorError",
    "Network",
    "PreparedImage",
    "PreparedLayer",
    "Process",
    "Provision",
    "SSHAccess",
    "SealedCluster",
    "TeardownError",
    "TransferError",
    "VMSandboxError",
]


def __getattr__(name: str) -> object:
    for module in _MODULES if name in __all__ else ():
        found = import_module(f"{__name__}.{module}")
        value: object = getattr(found, name, None)
        # A type of the same name may have another meaning there.
        if getattr(value, "__name__", "") == name:
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
