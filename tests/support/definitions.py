"""Texts of ``image.toml`` from values, and one valid definition of each origin."""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pytest_vmsandbox.catalogue.definition import ImageDefinition

Values = dict[str, Any]

RECIPE: Values = {
    "schema": 1,
    "description": "Made by a recipe",
    "architecture": "x86_64",
    "recipe": "build",
    "uses": ["more"],
    "requires": ["sh"],
    "boot": {"append": "root=/dev/vda rw", "memory_min": "256MiB"},
    "disk": {"size": "8GiB"},
    "system": {"name": "debian", "version": "13", "python": True, "init": "systemd", "user": "me"},
}
DERIVED: Values = {
    "schema": 1,
    "description": "A base, with more in it",
    "from": "recipe",
    "add": {"packages": ["nginx"], "script": "setup.sh", "network": "nat"},
    "disk": {"size": "16GiB"},
    "system": {"user": "root"},
}
DISK: Values = {
    "schema": 1,
    "description": "A disk from elsewhere",
    "architecture": "x86_64",
    "source": {"url": "https://example.org/disk.qcow2", "sha256": "a" * 64, "format": "qcow2"},
    "boot": {"firmware": "uefi", "secure_boot": True, "tpm": True},
    "disk": {"size": "10GiB"},
    "system": {"python": "3.11", "init": "openrc"},
    "login": {"method": "password", "user": "admin", "password": "secret"},
}
KERNEL: Values = {
    "schema": 1,
    "description": "A kernel and an initial RAM disk",
    "architecture": "x86_64",
    "source": {
        "kernel": "files/vmlinuz",
        "kernel_sha256": "b" * 64,
        "initrd": "files/initrd",
        "initrd_sha256": "c" * 64,
    },
    "boot": {"firmware": "kernel", "append": "console=ttyS0"},
    "system": {"python": False, "init": "none"},
    "login": {"method": "none", "ready": "login: $"},
}
ORIGINS = {"recipe": RECIPE, "derived": DERIVED, "disk": DISK, "kernel": KERNEL}


def toml(values: Mapping[str, Any]) -> str:
    """The text of a TOML file."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for key, table in tables.items():
        lines += [f"[{key}]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"


def changed(values: Values, changes: Mapping[str, Any]) -> Values:
    """`values` with other values for some keys, such as ``boot.append``. None removes a key."""
    result = deepcopy(values)
    for dotted, value in changes.items():
        table, _, key = dotted.rpartition(".")
        place = result.setdefault(table, {}) if table else result
        if value is None:
            del place[key]
        else:
            place[key] = value
    return result


def write(folder: Path, text: str) -> Path:
    """Make a folder hold a definition, with each file that the definitions here name."""
    (folder / "more").mkdir(parents=True, exist_ok=True)
    (folder / "build").write_text("#!/bin/sh\n")
    (folder / "build").chmod(0o755)
    (folder / "setup.sh").write_text("true\n")
    (folder / "image.toml").write_text(text)
    return folder


def read(folder: Path, values: Values) -> ImageDefinition:
    """The definition with these values. Its base can be ``recipe``, ``disk`` or ``kernel``."""
    write(folder, toml(values))

    def base(name: str) -> ImageDefinition:
        return read(folder.parent / name, ORIGINS[name])

    return ImageDefinition.read(folder, base)
