"""On which machine it was measured."""

from __future__ import annotations

import os
import platform

from pytest_vmsandbox.machine import host


def describe() -> dict[str, object]:
    """This machine, and how much it had to do before we began."""
    return {
        "system": system_name(),
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "memory_bytes": host.total_memory(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def system_name() -> str:
    """The operating system and its architecture, for people."""
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.machine()}"
    except (OSError, KeyError):
        return platform.platform(terse=True)


def processor_name() -> str:
    """The processor's model, for people."""
    for line in host.processor().splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
