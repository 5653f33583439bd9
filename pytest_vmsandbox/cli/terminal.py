"""The serial console of a guest, at our own terminal."""

from __future__ import annotations

import os
import select
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from pytest_vmsandbox.core.errors import GuestLost
from pytest_vmsandbox.machine.console import Console

LEAVE = b"\x1d"  # Ctrl-]
_LOOK_MS = 250  # how often we check that the guest is still there
_TYPE_SECONDS = 5.0
_CHUNK = 4096


def converse(
    console: Console, has_ended: Callable[[], bool], *, keys: int = 0, screen: int = 1
) -> None:
    """Show what a guest has written to its serial console, then pass on what both sides write.

    It ends at Ctrl-], or at the end of the input.

    Args:
        keys: the descriptor that what is typed comes from.
        screen: the descriptor for what the guest writes.

    Raises:
        GuestLost: the guest's QEMU has ended.
        TimeoutError: the guest does not take what is typed.
    """
    news: SimpleQueue[bytes] = SimpleQueue()
    bell = os.eventfd(0)

    def hear(data: bytes) -> None:
        news.put(data)
        os.eventfd_write(bell, 1)

    try:
        with console.following(hear) as before:
            _write(screen, before.encode())
            with _raw(keys):
                for data in _typed(keys, bell, has_ended):
                    if data:
                        console.type(data, _TYPE_SECONDS)
                    while not news.empty():
                        _write(screen, news.get())
    finally:
        os.close(bell)


def _typed(keys: int, bell: int, has_ended: Callable[[], bool]) -> Iterator[bytes]:
    """What is typed, until it ends; nothing when the guest has written something."""
    poller = select.poll()
    for descriptor in (keys, bell):
        poller.register(descriptor, select.POLLIN)
    while True:
        ready = dict(poller.poll(_LOOK_MS))
        if bell in ready:
            os.eventfd_read(bell)
            yield b""
        if keys in ready:
            data, left, _ = os.read(keys, _CHUNK).partition(LEAVE)
            if data:
                yield data
            if left or not data:
                return
        if not ready and has_ended():
            raise GuestLost("the guest has ended", remedy="enter it again: it is kept as it was")


def _write(screen: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(screen, view) :]


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Have a terminal pass on each key as it is pressed. Other descriptors stay as they are."""
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSADRAIN)  # what was typed before stays
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
