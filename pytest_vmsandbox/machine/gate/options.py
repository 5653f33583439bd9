"""QEMU's options for a gate."""

from __future__ import annotations


def filters(numbers: tuple[int, ...], netdev: str) -> list[str]:
    """Filters that send all frames to us, and go on with those that come back. `rx` is what the guest sends.

    Args:
        numbers: of four sockets, as `gated` gives them; empty without a gate.
    """
    args: list[str] = []
    for number in numbers:
        args += ["-chardev", f"socket,id=gate{number},fd={number}"]
    for name, queue, pair in (("leaving", "rx", numbers[:2]), ("arriving", "tx", numbers[2:])):
        if pair:
            ends = f"outdev=gate{pair[0]},indev=gate{pair[1]}"
            args += ["-object", f"filter-redirector,id={name},netdev={netdev},queue={queue},{ends}"]
    return args
