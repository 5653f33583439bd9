"""Attached disks in a folder of the cache, with the guest that has them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from pytest_vmsandbox.cache.copying import copy_to
from pytest_vmsandbox.machine.disk import PluggedDisk


def write(disks: Sequence[PluggedDisk], folder: Path, prefix: str = "") -> list[dict[str, object]]:
    """Copy the files of attached disks. Returns what `read` needs, as JSON values.

    Args:
        prefix: what the names of the files begin with.
    """
    records: list[dict[str, object]] = []
    for number, disk in enumerate(disks):
        name = f"{prefix}plugged{number}"
        layers = [f"{name}.{depth}.qcow2" for depth in range(len(disk.layers))]
        for file, layer in zip(disk.layers, layers, strict=True):
            copy_to(file, folder / layer)
        base = None
        if disk.base is not None:  # its owner may change the file later
            base = f"{name}.raw"
            copy_to(disk.base, folder / base)
        records.append(
            {
                "name": disk.name,
                "port": disk.port,
                "size": disk.size,
                "read_only": disk.read_only,
                "base": base,
                "layers": layers,
            }
        )
    return records


def read(record: dict[str, Any], folder: Path, stack: ExitStack) -> PluggedDisk:
    """An attached disk. Nobody must write to its files.

    Args:
        stack: closes them.
    """

    def opened(name: str) -> IO[bytes]:
        return stack.enter_context((folder / name).open("rb"))

    return PluggedDisk(
        name=record["name"],
        port=record["port"],
        size=record["size"],
        read_only=record["read_only"],
        base=None if record["base"] is None else opened(record["base"]),
        layers=tuple(map(opened, record["layers"])),
        kept=True,
    )
