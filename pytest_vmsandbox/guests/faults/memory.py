"""Too little memory."""

from __future__ import annotations

import secrets

from pytest_vmsandbox.core.errors import CommandError, ConfigError
from pytest_vmsandbox.core.spec import MIB, format_size, parse_size
from pytest_vmsandbox.guests.commands import is_number
from pytest_vmsandbox.guests.engine import Engine
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.faults.programs import run_as_root
from pytest_vmsandbox.guests.process import Process

_LEAST = 16 * MIB  # bytes that must be left, so that the fault can be ended
_NO_ROOM, _NO_CGROUPS, _NO_PROCESS = 66, 67, 68
# Fills memory until $2 KiB are available. Each step takes half of what is too much: the kernel's estimate is
# rough, and it needs memory for what it notes about each file.
_FILL = r"""
set -e
available() { while read -r name kib _; do [ "$name" != MemAvailable: ] || echo "$kib"; done </proc/meminfo; }
[ "$(available)" -gt "$2" ] || exit 66
mkdir -p "$1"
mount -t ramfs -o mode=0700 ramfs "$1"
while more=$(($(available) - $2)) && [ "$more" -gt 512 ]; do
    dd if=/dev/zero bs=64k count="$(((more > 2048 ? more / 2 : more) / 64))" >>"$1/fill" 2>/dev/null
done
"""
_EMPTY = r"""
while umount "$1" 2>/dev/null; do :; done
rmdir "$1" 2>/dev/null || [ ! -e "$1" ]
"""
# Moves a process and all its descendants into a new cgroup $1 with a limit of $3 bytes. Prints where the process
# was. Version 2 is mounted where it is not, as long as it is needed.
_CONFINE = r"""
root=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
if [ -z "$root" ]; then
    root=/run/vmsandbox-cgroup
    mkdir -p "$root"
    mount -t cgroup2 cgroup2 "$root" 2>/dev/null || exit 67
fi
grep -qw memory "$root/cgroup.controllers" || exit 67
echo +memory >"$root/cgroup.subtree_control" || exit 67
from=
while IFS=: read -r number _ path; do [ "$number" != 0 ] || from=$path; done <"/proc/$2/cgroup" || exit 68
mkdir "$root/$1" || exit 67
echo "$3" >"$root/$1/memory.max" || exit 67
echo 0 2>/dev/null >"$root/$1/memory.swap.max"
family() {
    echo "$1"
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do family "$child"; done
}
for pid in $(family "$2"); do echo "$pid" >"$root/$1/cgroup.procs"; done 2>/dev/null
grep -qx "$2" "$root/$1/cgroup.procs" || { rmdir "$root/$1"; exit 68; }
echo "$root$from"
"""
# Moves all processes of the cgroup $1 to $2, and removes it. A process may start another one meanwhile.
_FREE = r"""
root=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
[ -n "$root" ] && [ -d "$root/$1" ] || exit 0
to=$2
[ -d "$to" ] || to=$root
echo max >"$root/$1/memory.max"
for try in 1 2 3 4 5 6 7 8 9 10; do
    while read -r pid; do echo "$pid" >"$to/cgroup.procs"; done <"$root/$1/cgroup.procs" 2>/dev/null
    rmdir "$root/$1" 2>/dev/null && break
    sleep 0.1
done
[ ! -d "$root/$1" ] || rmdir "$root/$1" || exit
if [ "$root" = /run/vmsandbox-cgroup ] && ! ls -d "$root"/vmsandbox-fault-* >/dev/null 2>&1; then
    umount "$root" && rmdir "$root"
fi
"""
_SERVICE = r"""
command -v systemctl >/dev/null || exit 67
[ "$(systemctl show -p LoadState --value "$1")" = loaded ] || exit 68
systemctl show -p MemoryMax -p MemorySwapMax "$1"
"""
# Systemd keeps such limits also when it starts the service again.
_LIMIT_SERVICE = 'systemctl set-property --runtime "$@"'


class MemoryFaults:
    """The part of `Faults` that is about its memory."""

    engine: Engine

    def memory(self, limit: str | int, *, of: Process | int | str | None = None) -> Fault:
        """Leave too little memory: to the whole guest, or to some programs in it.

        Without ``of``, memory is filled until only ``limit`` bytes are available, by the kernel's own
        estimate (``MemAvailable``). It cannot be swapped out. A program that wants more meets the guest's
        OOM killer. The guest's helper is not killed by that, but other programs may be.

        With ``of``, the limit is that of a cgroup. If the programs want more, the OOM killer ends one of
        *them*, and the rest of the guest has all its memory. They cannot use swap. At the end, a process
        and its descendants go back to their cgroup, and a service has its former limit.

        The balloon is not used: a guest gives memory back too slowly. After a reboot or a power cut, nothing
        is left of the fault. After the end of a snapshot that was taken before, it is over.

        Args:
            limit: bytes, or a size such as ``"64MiB"``. For the whole guest, at least 16 MiB.
            of: a `Process` of `Guest.popen`, a process id in the guest, or a service of systemd, such as
                ``"postgresql.service"``. A process that is started later is limited, too, if its parent
                is.

        Raises:
            ConfigError: an argument is invalid, the guest has less memory than that, there is no such
                process or service, or its kernel has no cgroups (version 2).
            GuestLost: the guest is off or gone.

        Example::

            with vm.popen(["my-server"]) as server, vm.faults.memory("64MiB", of=server):
                ...
        """
        size = limit if is_number(limit, int) else parse_size(limit, "limit")
        assert isinstance(size, int)
        if size < (_LEAST if of is None else 1):
            raise ConfigError(
                f"limit={limit!r} is too small",
                remedy=f"leave at least {format_size(_LEAST)} to the guest, or limit some programs with of=",
            )
        if of is None:
            return _Full(self.engine, size).begin()
        if isinstance(of, str):
            if not of.endswith(".service"):
                raise ConfigError(
                    f"of={of!r} is not the name of a service",
                    remedy="use a name that ends in .service, a process of vm.popen(), or a process id",
                )
            return _Service(self.engine, size, of).begin()
        pid = of.pid if isinstance(of, Process) else of
        if not isinstance(pid, int) or not is_number(pid, int) or pid <= 0:
            raise ConfigError(
                f"of={of!r} is no process", remedy="use a process of vm.popen() or a process id"
            )
        return _Programs(self.engine, size, pid).begin()


class _Full(Fault):
    """Memory of the whole guest that is taken."""

    def __init__(self, engine: Engine, size: int) -> None:
        super().__init__(engine, f"only {format_size(size)} of memory available")
        self._size = size
        self._folder = f"/run/vmsandbox-fault-{secrets.token_hex(4)}"

    def _start(self) -> None:
        try:
            run_as_root(self._engine, _FILL, self._folder, self._size // 1024)
        except CommandError as error:
            run_as_root(self._engine, _EMPTY, self._folder)
            if error.result.returncode != _NO_ROOM:
                raise
            raise ConfigError(
                f"{self._engine.name} has less than {format_size(self._size)} available already",
                remedy="use a smaller limit, or a guest with more memory",
            ) from error

    def _stop(self) -> None:
        if self._engine.loss is None:
            run_as_root(self._engine, _EMPTY, self._folder)


class _Programs(Fault):
    """Processes that get little memory."""

    def __init__(self, engine: Engine, size: int, pid: int) -> None:
        super().__init__(engine, f"process {pid} limited to {format_size(size)} of memory")
        self._size, self._pid = size, pid
        self._group = f"vmsandbox-fault-{secrets.token_hex(4)}"
        self._from = ""

    def _start(self) -> None:
        try:
            said = run_as_root(self._engine, _CONFINE, self._group, self._pid, self._size)
        except CommandError as error:
            raise _explained(error, self._engine, f"process {self._pid}") from error
        self._from = said.strip()

    def _stop(self) -> None:
        if self._engine.loss is None:
            run_as_root(self._engine, _FREE, self._group, self._from)


class _Service(Fault):
    """A service that gets little memory."""

    def __init__(self, engine: Engine, size: int, name: str) -> None:
        super().__init__(engine, f"{name} limited to {format_size(size)} of memory")
        self._size, self._name = size, name
        self._former: list[str] = []

    def _start(self) -> None:
        try:
            self._former = run_as_root(self._engine, _SERVICE, self._name).split()
        except CommandError as error:
            raise _explained(error, self._engine, self._name) from error
        self._limit(f"MemoryMax={self._size}", "MemorySwapMax=0")

    def _stop(self) -> None:
        if self._former and self._engine.loss is None:
            self._limit(*self._former)

    def _limit(self, *limits: str) -> None:
        run_as_root(self._engine, _LIMIT_SERVICE, self._name, *limits)


def _explained(error: CommandError, engine: Engine, what: str) -> ConfigError | CommandError:
    """Why programs could not be limited."""
    status = error.result.returncode
    if status == _NO_PROCESS:
        return ConfigError(
            f"there is no {what} in {engine.name}, or it has ended",
            remedy="start it before it is limited",
        )
    if status == _NO_CGROUPS:
        return ConfigError(
            f"{engine.name} cannot limit the memory of {what}",
            details=error.details,
            remedy="this needs cgroups of version 2 with the memory controller, and systemd for a service: "
            "use another image, such as debian-13, or leave out of=",
        )
    return error
