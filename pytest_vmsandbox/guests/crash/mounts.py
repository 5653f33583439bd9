"""Where a disk is mounted in a guest."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.plugging import FIND_DISK
from pytest_vmsandbox.guests.running.root_programs import run_as_root

# Prints the device files of a disk and of its partitions, an empty line, and what is mounted. $1: its serial number.
_LOOK = (
    FIND_DISK
    + r"""
for file in "/sys/block/$name/$name"*/partition; do
    [ -e "$file" ] || continue
    file=${file%/partition}
    echo "/dev/${file##*/}"
done
echo
cat /proc/self/mountinfo
"""
)

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """A file system that is mounted.

    Attributes:
        source: its device file.
        folder: where it is mounted.
        kind: its type, such as ``ext4``.
        options: how it was mounted.
    """

    source: str
    folder: str
    kind: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A disk in a guest.

    Attributes:
        devices: its device file, and those of its partitions.
        mounts: its file systems, in the order in which they were mounted.
        folders: all folders that must be unmounted to have it free, the last one first.
        folder: what a check gets: where it is mounted, or the device file.
    """

    devices: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    folders: tuple[str, ...] = ()
    folder: str = "/"

    @property
    def is_root(self) -> bool:
        """Whether the guest runs from it."""
        return any(mount.folder == "/" for mount in self.mounts)


def find(engine: Engine, disk: str) -> Place:
    """Where a disk is in a running guest.

    Raises:
        ConfigError: the guest does not see it.
    """
    text = run_as_root(engine, _LOOK, disk, check=False).stdout
    head, _, table = text.partition("\n\n")
    devices = tuple(head.split())
    if not devices or not all(re.fullmatch(r"/dev/[\w!-]+", device) for device in devices):
        raise ConfigError(
            f"{engine.name} does not see the disk {disk!r}",
            remedy="it must have the driver virtio_blk, and /sys must be mounted",
        )
    return _place(devices, table)


def _place(devices: tuple[str, ...], table: str) -> Place:
    mounts: list[Mount] = []
    folders: list[str] = []
    for line in table.splitlines():
        words = line.split(" ")
        if "-" not in words[6:]:
            continue
        rest = words[words.index("-", 6) + 1 :]
        folder, kind, source = _plain(words[4]), rest[0], _plain(rest[1])
        is_below = any(folder.startswith(f"{mount.folder.rstrip('/')}/") for mount in mounts)
        if source in devices:
            options = [*words[5].split(","), *_plain(rest[2]).split(",")]
            known = {mount.source for mount in mounts}
            if source not in known:  # others are bind mounts
                mounts.append(Mount(source, folder, kind, tuple(dict.fromkeys(options))))
        elif not is_below:
            continue
        folders.insert(0, folder)
    first = mounts[0].folder if mounts else devices[0]
    return Place(devices, tuple(mounts), tuple(folders), first)


def _plain(word: str) -> str:
    """A word of the table of mounts, which has spaces as octal numbers."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), word)


def escaped(folder: str) -> str:
    """A folder as the table of mounts has it."""
    return re.sub(r"[ \t\n\\]", lambda match: f"\\{ord(match[0]):03o}", folder)
