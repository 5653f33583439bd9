"""A file system that is full."""

from __future__ import annotations

import os
import secrets

from pytest_vmsandbox.core.errors import (
    CommandError,
    CommandResult,
    ConfigError,
    GuestLost,
    VMSandboxError,
)
from pytest_vmsandbox.core.spec import format_size, parse_size
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.reaching.commands import StrPath
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.root_programs import run_as_root

_NO_PATH = 44  # exit status of the script
# Calls `seen` for each mount: its device number as `stat` shows it, its root in the file system, its mount point, its
# type and its source. In the kernel's list, a space is \040, and so on.
_MOUNTS = r"""
mounts() {
    set -f
    while read -r _ _ number root point rest; do
        set -- ${rest##* - }
        number=$((${number%:*} << 8 | ${number#*:} & 255 | (${number#*:} & ~255) << 12))
        seen "$number" "$(plain "$root")" "$(plain "$point")" "$1" "$2"
    done </proc/self/mountinfo
}
plain() {
    case $1 in *\\*) printf "$(printf %s "$1" | sed s/%/%%/g)" ;; *) printf %s "$1" ;; esac
}
boot=$(cat /proc/sys/kernel/random/boot_id)
"""
# Prints where the file system is that has the path $1, a line each: its top folder, its device, the place of that
# folder in it, its type, its device number, the guest's boot, and its size: blocks, those that are free, and bytes of
# one.
_PLACE = (
    _MOUNTS
    + r"""
[ -e "$1" ] || exit 44
if [ -d "$1" ]; then cd -P -- "$1"; else cd -P -- "$(dirname -- "$1")"; fi || exit
number=$(stat -c %d .)
while [ "$(pwd -P)" != / ] && [ "$(stat -c %d ..)" = "$number" ]; do cd -P ..; done
here=$(pwd -P) known=$number longest=0 device='' inner='' kind=''
seen() {
    case $here/ in "${3%/}"/*) ;; *) return ;; esac
    [ "$1" = "$known" ] || [ "$4" = btrfs ] || return
    [ ${#3} -ge "$longest" ] || return
    longest=${#3} device=$5 inner=${2%/}${here#"${3%/}"} kind=$4
}
mounts
printf '%s\n' "$here" "$device" "$inner" "$kind" "$known" "$boot" "$(stat -f -c '%b %f %S' "$here")"
"""
)
# Fills the file system with the top folder $1 and $4 bytes with files whose names begin with $2, until only $3 bytes
# are left in it. `fallocate` writes no data, but does not work everywhere. What is left to a file system after that, `dd` takes.
_FILL = r"""
cd -P -- "$1" || exit
shift
sync
umask 077
: >"$1" || exit
if [ "$2" -gt 0 ]; then
    fallocate -l "$2" "$1.left" || dd if=/dev/zero bs=4096 count=$(($2 / 4096)) >"$1.left"
fi 2>/dev/null
step=$3
while [ "$step" -ge 4096 ]; do
    size=$(stat -c %s "$1")
    fallocate -o "$size" -l "$step" "$1" 2>/dev/null || step=$((step / 2))
done
for block in 65536 4096 512; do dd if=/dev/zero bs=$block 2>/dev/null >>"$1"; done
rm -f "$1.left"
sync
"""
# Removes the files $1 from a file system of which _PLACE has told the rest. If they are not where they were, the device
# is mounted once more. A file system without a device is looked for; one in memory is gone with its last mount.
_EMPTY = (
    _MOUNTS
    + r"""
name=$1 folder=$2 device=$3 inner=${4%/} kind=$5 known=$6 recorded=$8  # disks that must not be flushed
removed() {
    rm -f -- "$1/$name" "$1/$name.left" || return
    [ "$kind" != btrfs ] || [ -n "$recorded" ] || sync  # it gives the room back only then
}
if [ -e "$folder/$name" ]; then removed "$folder"; exit; fi
if [ -b "$device" ]; then
    own=/run/$name options=rw
    [ "$kind" != btrfs ] || options=subvolid=5
    mkdir -p "$own" || exit
    mount -o "$options" "$device" "$own" && { removed "$own$inner"; status=$?; umount "$own"; }
    rmdir "$own" || exit
    exit "${status:-1}"
fi
case $kind in tmpfs | ramfs | rootfs) lasts=; [ "$boot" = "$7" ] || exit 0 ;; *) lasts=1 ;; esac
found=
seen() {
    [ "$1" = "$known" ] || return
    case $inner/ in "${2%/}"/*) ;; *) return ;; esac
    at=${3%/}${inner#"${2%/}"} lasts=1
    [ "$(stat -c %d "$at/" 2>/dev/null)" != "$known" ] || { removed "$at" && found=1; }
}
mounts
if [ -n "$lasts" ] && [ -z "$found" ]; then
    echo "its file system is not mounted, or another one is mounted over it" >&2
    exit 1
fi
"""
)


class FullFaults:
    """The part of `Faults` that is about full file systems."""

    engine: Engine

    def full(self, path: StrPath = "/", *, left: str | int = 0) -> Fault:
        """Fill a file system in the guest. Programs get ENOSPC when they write, those of root too.

        A hidden file in the top folder of the file system takes the room. At the end it is removed, also if
        the file system was unmounted meanwhile. It stays when the guest reboots, or is switched off and on,
        unless the file system is in memory. Room that others give back later is not taken.

        Args:
            path: any file or folder in the file system.
            left: the room that is left: ``"1MiB"``, or a number of bytes. File systems keep some of it to
                themselves or for root, so programs may get less.

        Returns:
            The `Fault`, which is in force.

        Raises:
            ConfigError: there is no such path, or its file system has no size, or less room than is to be
                left. Or a disk is recorded for crash points.
            CommandError: the file system cannot be filled, for instance because it is read-only. At the end:
                the file cannot be removed.

        Example::

            with vm.faults.full("/var"):
                assert "No space left" in vm.shell("echo x >/var/file", check=False).stderr
        """
        if left == "0":
            left = 0
        if not isinstance(left, int) or isinstance(left, bool) or left < 0:
            left = parse_size(left, "left")
        self.engine.machines.faults.refuse_recorded(  # the guest would flush all disks
            f"no file system of {self.engine.name} can be filled",
            "begin the fault before the block of crash_points",
        )
        return _Full(self.engine, _path(path), left).begin()


def _path(path: object) -> str:
    """A path as users write it.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(path, str | os.PathLike) and (text := os.fspath(path)):
        return str(text)
    raise ConfigError(
        f"path={path!r} is not a path", remedy="use one in the guest, such as '/' or '/var'"
    )


class _Full(Fault):
    """A file system that is filled by a file."""

    def __init__(self, engine: Engine, path: str, left: int) -> None:
        room = f"{format_size(left)} left" if left else "full"
        super().__init__(engine, f"file system with {path}: {room}")
        self._path, self._left = path, left
        self._name = f".vmsandbox-full-{secrets.token_hex(4)}"
        self._folder = ""
        self._place: list[str] = []  # what else there is to know to find it again

    def _start(self) -> None:
        result = self._run(_PLACE, self._path)
        if result.returncode == 0:
            size = self._found(result.stdout[:-1].split("\n"))
            try:
                result = self._run(_FILL, self._folder, self._name, str(self._left), str(size))
            except VMSandboxError:
                self._stop()
                raise
        if result.returncode == _NO_PATH:
            raise ConfigError(
                f"there is no {self._path} in {self._engine.name}, so its file system cannot be filled",
                remedy="use a path that is there, such as '/'",
            )
        if result.returncode != 0:
            raise CommandError(
                f"the file system with {self._path} in {self._engine.name} cannot be filled",
                result=result,
                remedy="it may be read-only, or may not take a file of root in its top folder",
            )

    def _found(self, lines: list[str]) -> int:
        """Note where the file system is. Returns its size in bytes.

        Raises:
            ConfigError: it has none, or less room than is to be left.
        """
        words = lines.pop().split()
        total, free, block = map(int, words if len(words) == 3 else "000")
        what = f"the file system with {self._path} in {self._engine.name}"
        if not total:
            raise ConfigError(
                f"{what} has no size, so it cannot be full",
                remedy="use a path on a disk, or in a tmpfs",
            )
        if self._left > 0 and free * block <= self._left:
            raise ConfigError(
                f"{what} has only {format_size(free * block)} of room, so left={format_size(self._left)} would "
                "fill nothing",
                remedy="use a smaller left=, or leave it out",
            )
        self._folder, *self._place = lines
        return total * block

    def _stop(self) -> None:
        try:
            self._restore()
        except GuestLost:
            self._engine.machines.faults.owes(self._restore)

    def _restore(self) -> None:
        if not self._folder:  # Ctrl-C came before anything was filled
            return
        recorded = " ".join(self._engine.machines.faults.recorded)
        result = self._run(_EMPTY, self._name, self._folder, *self._place, recorded)
        if result.returncode != 0:
            raise CommandError(
                f"{self._folder}/{self._name} in {self._engine.name} cannot be removed",
                result=result,
                remedy="end the fault while its file system is mounted, or at least its disk is there. To get the "
                "room back, remove the file in the guest",
            )

    def _run(self, script: str, *arguments: str) -> CommandResult[str]:
        return run_as_root(self._engine, script, *arguments, check=False)
