"""Finds the addresses of names on this machine, in threads: that may take long."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

_ANY_PORT = 9  # nothing is sent there
_ASKED_AGAIN = (socket.EAI_AGAIN, socket.EAI_FAIL)


def look_up(name: str, found: Callable[[list[bytes] | None], None]) -> None:
    """Find the addresses of a name in a thread, and pass them on there: 4 or 16 bytes each; None if that failed.

    Only those count that lead out of this machine: a name must not open it.
    """

    def run() -> None:
        try:
            answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            found(None if error.errno in _ASKED_AGAIN else [])
        except (OSError, UnicodeError):
            found(None)
        else:
            texts = dict.fromkeys(str(address[0]) for *_, address in answers)
            found([ip_address(text).packed for text in texts if leads_out(text)])

    threading.Thread(target=run, name="vmsandbox-names", daemon=True).start()


def leads_out(text: str) -> bool:
    """Whether an address is that of another machine, and there is a route to it."""
    try:
        address = ip_address(text)
    except ValueError:  # it belongs to one interface: fe80::1%eth0
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return False
    if (
        address.is_loopback
        or address.is_link_local
        or address.is_unspecified
        or address.is_multicast
    ):
        return False
    family = socket.AF_INET6 if isinstance(address, IPv6Address) else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((text, _ANY_PORT))  # sends nothing
            return ip_address(probe.getsockname()[0]) != address
    except OSError:
        return False
