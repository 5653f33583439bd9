"""The ports of a guest that QEMU forwards to this host."""

from __future__ import annotations

from typing import NamedTuple

from pytest_vmsandbox.machine import cmdline

SHOW = "info usernet"  # the line of the monitor for people


class Forward(NamedTuple):
    """A port of the guest that is forwarded to this host."""

    protocol: str
    host: str
    here: int
    port: int


def add_line(protocol: str, port: int, here: int = 0) -> str:
    """The line of the monitor for people that forwards a port.

    Args:
        here: the port of this host; 0 for one that the kernel chooses.
    """
    return f"hostfwd_add {cmdline.NETDEV} {protocol}:127.0.0.1:{here}-:{port}"


def listed(text: str) -> list[Forward]:
    """What the answer to `SHOW` lists."""
    found = []
    # TCP[HOST_FORWARD]  12       127.0.0.1 40123       10.0.2.15    22     0     0
    for line in text.splitlines():
        words = line.split()
        if words and words[0].endswith("[HOST_FORWARD]"):
            protocol = words[0].partition("[")[0].lower()
            found.append(Forward(protocol, words[2], int(words[3]), int(words[5])))
    return found
