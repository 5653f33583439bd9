"""Too little memory."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pytest_vmsandbox.core.errors import CommandError, ConfigError, VMSandboxError
from pytest_vmsandbox.core.spec import MIB, format_size, parse_size
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.reaching.commands import is_number
from pytest_vmsandbox.guests.reaching.process import Process
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.root_programs import run_as_root

_LEAST = 16 * MIB  # bytes that must be left, so that the fault can be ended
_NO_ROOM, _NO_CGROUPS, _NO_PROCESS, _TWICE = 66, 67, 68, 69
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
# Prints the root of the cgroups (version 2), which are mounted as long as they are needed, and the cgroup of process $1.
_WHERE = r"""
root=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
if [ -z "$root" ]; then
    root=/run/vmsandbox-cgroup
    mkdir -p "$root"
    mount -t cgroup2 cgroup2 "$root" 2>/dev/null || { rmdir "$root"; exit 67; }
fi
from=
while IFS=: read -r number _ path; do [ "$number" != 0 ] || from=$path; done <"/proc/$1/cgroup" || exit 68
echo "$root"
echo "$root$from"
"""
# Moves process $2 and all its descendants into a new cgroup $3 below $1, with a limit of $4 bytes. What they hold already
# stays with their former cgroups, so it is taken off the limit.
_CONFINE = r"""
root=$1 group=$1/$3
grep -qw memory "$root/cgroup.controllers" || exit 67
echo +memory >"$root/cgroup.subtree_control" || exit 67
mkdir "$group" || exit 67
echo 0 2>/dev/null >"$group/memory.swap.max"
family() {
    echo "$1"
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do family "$child"; done
}
moved=1
while [ -n "$moved" ]; do  # until nobody has started another one meanwhile
    moved=
    for pid in $(family "$2"); do
        where=$(cat "/proc/$pid/cgroup" 2>/dev/null) || continue
        case $where in *"/$3") continue ;; */vmsandbox-fault-*) exit 69 ;; esac
        echo "$pid" 2>/dev/null >"$group/cgroup.procs" && moved=1
    done
done
grep -qx "$2" "$group/cgroup.procs" || exit 68
own=$(awk '$1 == "anon" || $1 == "shmem" { sum += $2 } END { printf "%.0f", sum }' "$group/memory.stat")
all=$(for pid in $(cat "$group/cgroup.procs"); do cat "/proc/$pid/smaps_rollup"; done 2>/dev/null |
    awk '/^(Pss_Anon|Pss_Shmem|SwapPss):/ { sum += $2 } END { printf "%.0f", sum * 1024 }')
[ "$all" -gt 0 ] || exit 67
left=$(($4 - all + own))
if [ "$left" -le 0 ]; then echo "$all" >&2; exit 66; fi
echo "$left" >"$group/memory.max" || exit 67
"""
# Moves all processes of the cgroup $2 below $1 to $3, and removes it. A process may start another one meanwhile.
_FREE = r"""
root=$1 group=$1/$2 to=$3
[ -d "$to" ] || to=$root
if [ -d "$group" ]; then
    echo max >"$group/memory.max"
    for try in 1 2 3 4 5 6 7 8 9 10; do
        while read -r pid; do echo "$pid" >"$to/cgroup.procs"; done <"$group/cgroup.procs" 2>/dev/null
        rmdir "$group" 2>/dev/null && break
        sleep 0.1
    done
    [ ! -d "$group" ] || rmdir "$group" || exit
fi
if [ "$root" = /run/vmsandbox-cgroup ] && [ -d "$root" ] && ! ls -d "$root"/vmsandbox-fault-* >/dev/null 2>&1; then
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

        What a process has already counts, too: with 30 MiB and a limit of 64 MiB, it gets 34 MiB more. It
        does not get more for what it gives back of those 30 MiB: Linux leaves them to its former cgroup.

        The balloon is not used: a guest gives memory back too slowly. After a reboot or a power cut, nothing
        is left of the fault. After the end of a snapshot that was taken before, it is over.

        Args:
            limit: bytes, or a size such as ``"64MiB"``. For the whole guest, at least 16 MiB.
            of: a `Process` of `Guest.popen`, a process id in the guest, or a service of systemd, such as
                ``"postgresql.service"``. A process that is started later is limited, too, if its parent
                is.

        Raises:
            ConfigError: an argument is invalid, the guest has less memory than that, there is no such
                process or service, or its kernel has no cgroups (version 2). A process has as much as that
                already, or another fault limits it, or a descendant.
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
        with _nothing_left(self._stop):
            try:
                run_as_root(self._engine, _FILL, self._folder, self._size // 1024)
            except CommandError as error:
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
        self._root = self._from = ""  # folders of cgroups

    def _start(self) -> None:
        engine, pid = self._engine, self._pid
        with _nothing_left(self._stop):
            try:
                self._root, self._from = run_as_root(engine, _WHERE, pid).stdout[:-1].split("\n")
                run_as_root(engine, _CONFINE, self._root, pid, self._group, self._size)
            except CommandError as error:
                raise _explained(error, engine, f"process {pid}") from error

    def _stop(self) -> None:
        if self._root and self._engine.loss is None:
            run_as_root(self._engine, _FREE, self._root, self._group, self._from)


class _Service(Fault):
    """A service that gets little memory."""

    def __init__(self, engine: Engine, size: int, name: str) -> None:
        super().__init__(engine, f"{name} limited to {format_size(size)} of memory")
        self.size, self.name = size, name
        self.former: list[str] = []

    def _start(self) -> None:
        with _nothing_left(self._stop):
            try:
                former = run_as_root(self._engine, _SERVICE, self.name).stdout.split()
            except CommandError as error:
                raise _explained(error, self._engine, self.name) from error
            self.former = next((it.former for it in self._others()), former)
            self._apply(self.size)

    def _stop(self) -> None:
        if self.former and self._engine.loss is None:
            self._apply()

    def _others(self) -> list[_Service]:
        """The faults in force that limit the same service."""
        faults = (entry.fault for entry in self._engine.machines.faults.in_force)
        same = [it for it in faults if isinstance(it, _Service) and it.name == self.name]
        return [it for it in same if it is not self and it.former]

    def _apply(self, *own: int) -> None:
        """Let the service have the smallest of the limits in force, or its former one."""
        sizes = [*own, *(it.size for it in self._others())]
        self._limit(*([f"MemoryMax={min(sizes)}", "MemorySwapMax=0"] if sizes else self.former))

    def _limit(self, *limits: str) -> None:
        run_as_root(self._engine, _LIMIT_SERVICE, self.name, *limits)


@contextmanager
def _nothing_left(restore: Callable[[], None]) -> Iterator[None]:
    """Restore the guest if a fault cannot begin."""
    try:
        yield
    except VMSandboxError:
        restore()
        raise


def _explained(error: CommandError, engine: Engine, what: str) -> ConfigError | CommandError:
    """Why programs could not be limited."""
    status = error.result.returncode
    if status == _NO_PROCESS:
        return ConfigError(
            f"there is no {what} in {engine.name}, or it has ended",
            remedy="start it before it is limited",
        )
    if status == _NO_ROOM:
        has = format_size(int(error.result.stderr.split()[-1]))
        return ConfigError(
            f"{what} in {engine.name} has {has} already, so it cannot be limited to less",
            remedy="use a larger limit, limit it before it takes so much, or limit a service of systemd",
        )
    if status == _TWICE:
        return ConfigError(
            f"another fault limits the memory of {what} in {engine.name}, or of a descendant",
            remedy="end that fault before",
        )
    if status == _NO_CGROUPS:
        return ConfigError(
            f"{engine.name} cannot limit the memory of {what}",
            details=error.details,
            remedy="this needs cgroups of version 2 with the memory controller, and systemd for a service: "
            "use another image, such as debian-13, or leave out of=",
        )
    return error
