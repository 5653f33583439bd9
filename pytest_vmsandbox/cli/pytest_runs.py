"""A pytest of its own, with our plugin, where nothing of anybody else's configuration is found."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path

import pytest_vmsandbox

_PLUGIN = "vmsandbox"  # the name of our entry point


def is_installed() -> bool:
    """Whether pytest finds our plugin by itself; a checkout may not be installed."""
    return bool(entry_points(group="pytest11", name=_PLUGIN))


def environment() -> tuple[dict[str, str], str]:
    """Variables that keep other plugins and options out, and the name of our plugin."""
    variables = without_options()
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if is_installed():
        return variables, _PLUGIN
    root = str(Path(pytest_vmsandbox.__file__).resolve().parent.parent)
    path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(path)
    return variables, f"{pytest_vmsandbox.__name__}.plugin"


def without_options() -> dict[str, str]:
    """Our own variables, without those that give options to any pytest."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
    }
