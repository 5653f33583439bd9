"""Makes the environment for a pytest that a command starts."""

from __future__ import annotations

import os

PLUGIN = "vmsandbox"  # the name of our entry point


def pytest_variables() -> dict[str, str]:
    """An environment for pytest without other plugins and options."""
    return {**without_options(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def without_options() -> dict[str, str]:
    """Our environment without variables that give options to pytest or its Python."""
    options = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in options}
