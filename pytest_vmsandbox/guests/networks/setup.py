"""Sets a guest up for its networks: addresses of its cards, and names of others in ``/etc/hosts``."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.reaching.commands import Command, text_of
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.machine.cards import Card

# Arguments: what belongs into /etc/hosts, then for each card its MAC address, its IPv4 address and its IPv6 address, each
# with the length of the prefix, or - for none. It prints a line for each card: MAC address, and name of the interface.
# Bridges and the like have the MAC address of one of their ports, so only devices count.
_SCRIPT = r"""
find_card() {
    device=
    for file in /sys/class/net/*/address; do
        [ -e "${file%address}device" ] && read -r found <"$file" && [ "$found" = "$1" ] || continue
        device=${file%/address} device=${device##*/}
    done
    [ -n "$device" ]
}
await_card() {
    tries=0
    until find_card "$1"; do
        tries=$((tries + 1))
        [ $tries -lt 150 ] || { echo "there is no network card with the address $1" >&2; exit 3; }
        sleep 0.1
    done
    # udev may be about to rename it.
    if command -v udevadm >/dev/null; then udevadm settle --timeout=10; find_card "$1"; fi
}
# A network manager would ask for an address on a card that it does not know, and remove ours. It may start later.
keep_managers_away() {
    if command -v networkctl >/dev/null; then
        mkdir -p /run/systemd/network
        printf '[Match]\nMACAddress=%s\n[Link]\nUnmanaged=yes\n' "$1" >"/run/systemd/network/00-vmsandbox-$device.network"
        if [ -e /run/systemd/netif/state ]; then networkctl reload >&2; fi
    fi
    if command -v nmcli >/dev/null; then nmcli device set "$device" managed no >&2; fi
}
hosts=$1
shift
while [ $# -gt 0 ]; do
    await_card "$1"
    if [ "$2" != - ]; then
        keep_managers_away "$1"
        conf=/proc/sys/net/ipv6/conf/$device
        # Nobody else has these addresses, so nobody waits until that is known.
        if [ -d "$conf" ]; then echo 0 >"$conf/accept_dad"; fi
        ip link set "$device" up || exit 4
        ip addr replace "$2" brd + dev "$device" || exit 4
        if [ -d "$conf" ]; then ip -6 addr replace "$3" dev "$device" || exit 4; fi
    fi
    echo "$1 $device"
    shift 3
done
former=$(cat /etc/hosts 2>/dev/null)
rest=$(echo "$former" | sed '/^# vmsandbox: networks$/,/^# vmsandbox: end$/d')
new=$(printf '%s\n%s' "$hosts" "$rest")
[ "$new" = "$former" ] || printf '%s\n' "$new" >/etc/hosts || exit 5
"""
_CAUSES = {
    3: (
        "did not find a network card that was plugged in",
        "its kernel needs hot-plug of PCI devices and the driver virtio_net. Use an image such as debian-13",
    ),
    4: (
        "could not set an address on a network card",
        "its system needs the program ip. For a system that asks for its address, use addresses='dhcp'",
    ),
    5: ("could not write /etc/hosts", "make that file writable for root"),
}


def set_up(
    engine: Engine, cards: Sequence[Card], hosts: str, *, dhcp: Collection[str] = ()
) -> dict[str, str]:
    """Set a guest up. It finds its cards, and has all names. This can be done again at any time.

    Args:
        cards: those that the guest is to find.
        hosts: for ``/etc/hosts``.
        dhcp: the MAC addresses of cards that get no address from us.

    Returns:
        MAC address → name of the interface.

    Raises:
        ConfigError: the guest has not found a card, or lacks what this needs.
        GuestLost, CommandTimeout: it does not answer.
    """
    words: list[str] = []
    for card in cards:
        words += [card.mac, *(("-", "-") if card.mac in dhcp else (card.ipv4, card.ipv6))]
    argv = ("/bin/sh", "-c", _SCRIPT, "sh", hosts, *words)
    done = text_of(engine.run(Command(argv=argv, user="root")))
    if done.returncode:
        what, remedy = _CAUSES.get(done.returncode, ("could not be set up for its networks", ""))
        raise ConfigError(f"{engine.name} {what}", details=done.stderr, remedy=remedy)
    lines = (line.split() for line in done.stdout.splitlines())
    return dict(lines)


def hosts_text(lines: Sequence[str]) -> str:
    """What belongs into ``/etc/hosts``, between marks by which it is found again."""
    return "\n".join(["# vmsandbox: networks", *lines, "# vmsandbox: end"])
