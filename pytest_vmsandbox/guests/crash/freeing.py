"""Takes a disk away from all that uses it in a guest, and checks that nothing has it any more.

A program that still had it would keep its old content, and all states would look the same.
"""

from __future__ import annotations

import hashlib
import os
import shlex

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.guests.crash.building import Builder
from pytest_vmsandbox.guests.crash.mounts import Place, escaped, find
from pytest_vmsandbox.guests.crash.states import State
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.root_programs import run_as_root

_BLOCK = 4096  # bytes
_SAMPLES, _SAMPLE = 16, 16  # written places that are compared, and blocks of each

# Kills what uses files below some places. $@: folders and devices.
_LEAVE = r"""
{
    ls -l /proc/[0-9]*/cwd /proc/[0-9]*/root /proc/[0-9]*/exe /proc/[0-9]*/fd/* 2>/dev/null |
        while IFS= read -r line; do
            for place; do
                case $line in
                *" -> $place" | *" -> $place/"* | *" -> $place (deleted)") line=${line#* /proc/}; echo "${line%%/*}" ;;
                esac
            done
        done
    for place; do
        grep -lF " $place/" /proc/[0-9]*/maps
        case $place in /dev/*) grep -l " $place\$" /proc/[0-9]*/maps ;; esac
    done 2>/dev/null | sed 's|^/proc/||; s|/.*||'
} | while read -r number; do
    [ "$number" = $$ ] || [ "$number" = 1 ] || kill -9 "$number" 2>/dev/null
done
"""

# Prints the files with the mounts of all processes that have a disk mounted. $@: devices.
# btrfs has other numbers than its disk.
_MOUNTED = r"""
for device; do
    read -r number <"/sys/class/block/${device##*/}/dev" || continue
    grep -lE " $number | - [^ ]+ $device " /proc/[0-9]*/mountinfo 2>/dev/null
done
"""

# Kills what has a disk mounted in a mount name space of its own. $@: devices, which are not mounted in this one.
_EXPEL = r"""
own=$(readlink /proc/$$/ns/mnt)
mounted "$@" | while IFS=/ read -r _ _ number _; do
    [ "$number" = 1 ] || [ "$(readlink "/proc/$number/ns/mnt")" = "$own" ] || kill -9 "$number" 2>/dev/null
done
"""

# Prints what has a disk. $@: devices.
_HELD = r"""
for device; do
    for file in "/sys/class/block/${device##*/}/holders"/*; do
        [ ! -e "$file" ] || echo "the volume ${file##*/}"
    done
    for file in /sys/block/loop*/loop/backing_file; do
        [ -e "$file" ] || continue
        IFS= read -r place <"$file"
        file=${file%/loop/*}
        [ "$place" != "$device" ] || echo "the loop device ${file##*/}"
    done
    ! grep -q "^$device[[:space:]]" /proc/swaps 2>/dev/null || echo "the swap space $device"
done
mounted "$@" | head -n 3 | while IFS=/ read -r _ _ number _; do
    read -r name <"/proc/$number/comm" && echo "process $number ($name), which has it mounted"
done
"""

# Prints something if a disk cannot be opened exclusively. $1: its device. No shell can do that, but mount does it, and
# of two types of file systems, one is not that of a file system that is mounted.
_PROBE = r"""
folder=$(mktemp -d) || { echo "nobody knows what, because /tmp cannot be written"; return; }
while read -r kind more; do
    [ -z "$more" ] || continue  # it needs no disk
    if said=$(LC_ALL=C mount -r -t "$kind" "$1" "$folder" 2>&1); then
        umount "$folder"
        continue
    fi
    case $said in
    *[Bb]usy* | *"already mounted"*) echo "something that has no name"; break ;;
    esac
done </proc/filesystems
rmdir "$folder"
"""

FUNCTIONS = "".join(
    f"{name}() {{{body}}}\n"
    for name, body in {
        "leave": _LEAVE,
        "mounted": _MOUNTED,
        "expel": _EXPEL,
        "held": _HELD,
        "probe": _PROBE,
    }.items()
)
"""Shell functions: ``leave`` and ``expel`` kill what uses a disk, ``held`` prints what has it."""

# Frees a disk, or prints what has it. $@: devices.
_FREE = r"""
leave_all "$@"
for try in 1 2 3 4 5 6 7 8 9 10; do
    busy=$(unmount_all)
    if [ -z "$busy" ]; then
        expel "$@"
        busy=$(held "$@")
        [ -n "$busy" ] || busy=$(probe "$1")
        [ -n "$busy" ] || exit 0
    else
        leave_all "$@"
    fi
    sleep 0.2
done
echo "$busy"
exit 1
"""


def release(engine: Engine, disk: str, place: Place) -> None:
    """Kill what uses a disk, and unmount it. Afterwards nothing has it.

    Args:
        disk: its name.
        place: where it was when the recording ended.

    Raises:
        ConfigError: something has it nevertheless, or it is not there any more.
    """
    if disk not in engine.machines.disk_names():
        raise ConfigError(
            f"the disk {disk!r} is gone: it was detached, or attached in a snapshot() block that has ended",
            remedy="check before that. write_state() works without the disk",
        )
    now = find(engine, disk)
    if now.devices != place.devices:
        raise ConfigError(
            f"the disk {disk!r} was {' '.join(place.devices)} when the recording ended, and is "
            f"{' '.join(now.devices)} now",
            remedy="check before the guest reboots, and before the disk is partitioned",
        )
    done = run_as_root(engine, _script(now), *now.devices, check=False)
    if done.returncode:
        busy = printable(done.stdout).split("\n")
        raise ConfigError(
            f"{engine.name} cannot free the disk {disk!r}: it is used by {', '.join(filter(None, busy))}",
            details=printable(done.stderr),
            remedy="stop that before check(): swapoff, losetup -d, dmsetup remove, vgchange -an, mdadm --stop, or "
            "umount. Use the disk itself, without a volume or a loop device on it",
        )


def _script(place: Place) -> str:
    folders = shlex.join(place.folders)
    unmounts = [
        f"umount {shlex.quote(it)} 2>/dev/null || ! grep -qF {shlex.quote(f' {escaped(it)} ')} "
        f"/proc/self/mountinfo || echo {shlex.quote(f'a file in {it}')}"
        for it in place.folders
    ]
    lines = "\n".join([*unmounts, ":"])
    return f'{FUNCTIONS}leave_all() {{ leave {folders} "$@"; }}\nunmount_all() {{\n{lines}\n}}\n{_FREE}'


def compare(engine: Engine, place: Place, drop: str, builder: Builder, state: State) -> None:
    """Check that the guest sees the state that was built, where the disk was written to.

    Args:
        drop: a shell script. It lets the guest forget what it knows of the disk.

    Raises:
        ConfigError: the guest sees something else.
    """
    ranges = _samples(builder)
    wanted = hashlib.sha256()
    for first, count in ranges:
        wanted.update(os.pread(builder.file.fileno(), count * _BLOCK, first * _BLOCK))
    reads = "\n".join(f"dd bs={_BLOCK} skip={first} count={count}" for first, count in ranges)
    reads = reads.replace("dd ", f"dd 2>/dev/null if={place.devices[0]} ")
    script = f"{drop}\n{{\n{reads}\n}} | sha256sum"
    done = run_as_root(engine, script, check=False)
    found = done.stdout.split(" ")[0]
    if found != wanted.hexdigest():
        raise ConfigError(
            f"{engine.name} does not see the state {state.name} on {place.devices[0]}, so no verdict would be right",
            details=printable(done.stderr),
            remedy="something in the guest keeps the old content of the disk, or its programs dd, sha256sum or "
            "blockdev are missing",
        )


def _samples(builder: Builder) -> list[tuple[int, int]]:
    """The first blocks of a disk and some that were written, as number and count."""
    entries = [it for it in builder.history.entries if it.kind != "flush" and it.length]
    step = max(1, -(-len(entries) // _SAMPLES))
    chosen = [*entries[::step], *entries[-1:]]
    found = {it.offset // _BLOCK: min(_SAMPLE, -(-it.length // _BLOCK)) for it in chosen}
    return sorted({**found, 0: _SAMPLE}.items())
