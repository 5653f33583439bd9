"""Grows the root file system of a guest to its disk."""

from __future__ import annotations

from pytest_vmsandbox.guests.guest import Guest

_SECONDS = 120.0
# A disk of ours is one file system. Disks of others have partitions, and the last one is the root's.
_GROW = """
fail() { echo "$*" >&2; exit 1; }
set -- $(awk '$2 == "/" && $1 != "rootfs" { found = $1 " " $3 } END { print found }' /proc/mounts)
[ $# -eq 2 ] || fail "the root file system is not on a disk"
device=$(readlink -f "$1") type=$2
block=/sys/class/block/${device##*/}
[ -e "$block" ] || block=/sys/dev/block/$(mountpoint -d /)
[ -e "$block" ] || fail "$1 is no disk"
block=$(readlink -f "$block") device=/dev/${block##*/}
if [ -e "$block/partition" ]; then
    read -r number <"$block/partition"
    read -r start <"$block/start"
    read -r size <"$block/size"
    read -r whole <"${block%/*}/size"
    disk=${block%/*} disk=/dev/${disk##*/}
    if [ $((whole - start - size)) -le 4096 ]; then
        :  # sectors; it ends where the disk ends
    elif command -v growpart >/dev/null; then
        said=$(growpart "$disk" "$number" 2>&1) || case $said in
        *NOCHANGE*) ;;
        *) fail "growpart: $said" ;;
        esac
    elif command -v sfdisk >/dev/null; then
        said=$(echo ', +' | sfdisk --force --no-reread -N "$number" "$disk" 2>&1) || fail "sfdisk: $said"
        said=$(partx --update --nr "$number" "$disk" 2>&1) || fail "partx: $said"
    elif command -v parted >/dev/null; then
        said=$(parted -s "$disk" resizepart "$number" 100% 2>&1) || fail "parted: $said"
    else
        fail "$device is a partition, and there is no growpart, sfdisk or parted"
    fi
fi
case $type in
ext[234]) command -v resize2fs >/dev/null || fail "there is no resize2fs"; resize2fs "$device" ;;
xfs) command -v xfs_growfs >/dev/null || fail "there is no xfs_growfs"; xfs_growfs / ;;
btrfs) btrfs filesystem resize max / ;;
*) fail "file systems of type $type cannot be grown" ;;
esac
"""


def grow(guest: Guest) -> None:
    """Grow the root file system, and its partition, to the whole disk.

    Raises:
        CommandError: the guest does not have the tools, or they failed.
    """
    guest.shell(_GROW, user="root", timeout=_SECONDS)
