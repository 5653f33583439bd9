"""A file system that is full."""

from __future__ import annotations

import os
import secrets

from pytest_vmsandbox.core.errors import CommandError, CommandResult, ConfigError, GuestLost
from pytest_vmsandbox.core.spec import format_size, parse_size
from pytest_vmsandbox.guests.commands import Command, StrPath, text_of
from pytest_vmsandbox.guests.engine import Engine
from pytest_vmsandbox.guests.faults.fault import Fault

_NO_PATH, _NO_LIMIT = 44, 45  # exit statuses of the script
# Prints the top folder of the file system that has the path $1, and its device.
_PLACE = r"""
[ -e "$1" ] || exit 44
if [ -d "$1" ]; then cd -P -- "$1"; else cd -P -- "$(dirname -- "$1")"; fi || exit
while [ "$(pwd -P)" != / ] && [ "$(stat -c %d ..)" = "$(stat -c %d .)" ]; do cd -P ..; done
pwd -P
here=$(pwd -P) device=
while read -r source point _; do [ "$point" != "$here" ] || device=$source; done </proc/mounts
echo "$device"
"""
# Fills the file system with the top folder $1 with files whose names begin with $2, until only $3 bytes are left in
# it. `fallocate` writes no data, but does not work everywhere. What is left to a file system after that, `dd` takes.
_FILL = r"""
cd -P -- "$1" || exit
set -- "$2" "$3" $(stat -f -c '%b %S' .)
[ "$3" -gt 0 ] || exit 45
sync
umask 077
: >"$1" || exit
if [ "$2" -gt 0 ]; then
    fallocate -l "$2" "$1.left" || dd if=/dev/zero bs=4096 count=$(($2 / 4096)) >"$1.left"
fi 2>/dev/null
step=$(($3 * $4))
while [ "$step" -ge 4096 ]; do
    size=$(stat -c %s "$1")
    fallocate -o "$size" -l "$step" "$1" 2>/dev/null || step=$((step / 2))
done
for block in 65536 4096 512; do dd if=/dev/zero bs=$block 2>/dev/null >>"$1"; done
rm -f "$1.left"
sync
"""
# Removes the files $1: from the folder $2, or, if they are not there, from the device $3, unless it is
# mounted elsewhere.
_EMPTY = r"""
[ ! -e "$2/$1" ] || exec rm -f -- "$2/$1" "$2/$1.left"
[ -b "$3" ] || exit 0
while read -r source _; do [ "$source" != "$3" ] || exit 0; done </proc/mounts
folder=$(mktemp -d) || exit
if mount "$3" "$folder" 2>/dev/null; then
    rm -f -- "$folder/$1" "$folder/$1.left"
    umount "$folder"
fi
rmdir "$folder"
"""


class FullFaults:
    """The part of `Faults` that is about full file systems."""

    engine: Engine

    def full(self, path: StrPath = "/", *, left: str | int = 0) -> Fault:
        """Fill a file system in the guest. Programs get ENOSPC when they write, those of root too.

        A hidden file in the top folder of the file system takes the room. At the end it is removed. It stays
        when the guest reboots, or is switched off and on, unless the file system is in
        memory. Room that others give back later is not taken.

        Args:
            path: any file or folder in the file system.
            left: the room that is left: ``"1MiB"``, or a number of bytes. File systems keep some of it to
                themselves or for root, so programs may get less.

        Returns:
            The `Fault`, which is in force.

        Raises:
            ConfigError: there is no such path, or its file system has no size.
            CommandError: the file system cannot be filled, for instance because it is read-only.

        Example::

            with vm.faults.full("/var"):
                assert "No space left" in vm.shell("echo x >/var/file", check=False).stderr
        """
        if left == "0":
            left = 0
        size = left if isinstance(left, int) and left >= 0 else parse_size(left, "left")
        return _Full(self.engine, os.fspath(path), size).begin()


class _Full(Fault):
    """A file system that is filled by a file."""

    def __init__(self, engine: Engine, path: str, left: int) -> None:
        room = f"{format_size(left)} left" if left else "full"
        super().__init__(engine, f"file system with {path}: {room}")
        self._path, self._left = path, left
        self._name = f".vmsandbox-full-{secrets.token_hex(4)}"
        self._folder = self._device = ""

    def _start(self) -> None:
        result = self._run(_PLACE, self._path)
        if result.returncode == 0:
            self._folder, self._device = result.stdout.splitlines()
            result = self._run(_FILL, self._folder, self._name, str(self._left))
        if result.returncode == _NO_PATH:
            raise ConfigError(
                f"there is no {self._path} in {self._engine.name}, so its file system cannot be filled",
                remedy="use a path that is there, such as '/'",
            )
        if result.returncode == _NO_LIMIT:
            raise ConfigError(
                f"the file system with {self._path} in {self._engine.name} has no size, so it cannot be full",
                remedy="use a path on a disk, or in a tmpfs",
            )
        if result.returncode != 0:
            raise CommandError(
                f"the file system with {self._path} in {self._engine.name} cannot be filled",
                result=result,
                remedy="it may be read-only, or may not take a file of root in its top folder",
            )

    def _stop(self) -> None:
        try:
            self._restore()
        except GuestLost:
            self._engine.machines.faults.owes(self._restore)

    def _restore(self) -> None:
        if not self._folder:  # Ctrl-C came before anything was filled
            return
        result = self._run(_EMPTY, self._name, self._folder, self._device)
        if result.returncode != 0:
            raise CommandError(
                f"{self._folder}/{self._name} in {self._engine.name} cannot be removed",
                result=result,
                remedy="remove it in the guest to get the room back",
            )

    def _run(self, script: str, *arguments: str) -> CommandResult[str]:
        argv = ("/bin/sh", "-c", script, "sh", *arguments)
        return text_of(self._engine.run(Command(argv=argv, user="root")))
