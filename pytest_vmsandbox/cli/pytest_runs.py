"""A pytest of its own, with our plugin, where nothing of anybody else's configuration is found."""

from __future__ import annotations

import os

PLUGIN = "vmsandbox"  # the name of our entry point


def environment() -> dict[str, str]:
    """Variables that keep other plugins and options out."""
    return {**without_options(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def without_options() -> dict[str, str]:
    """Our own variables, without those that give options to any pytest."""
    options = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
    return {name: value for name, value in os.environ.items() if name not in options}
