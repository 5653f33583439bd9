"""Leads the frames of a guest's first network card through its gate.

QEMU's filter-redirector sends each frame to us and goes on with those that we send back. If we are gone, it
drops them: nothing passes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from pytest_vmsandbox.core.allowed import targets
from pytest_vmsandbox.machine.framed import Frames, framed
from pytest_vmsandbox.machine.gate.gate import Gate
from pytest_vmsandbox.machine.gate.lookup import look_up
from pytest_vmsandbox.machine.loop import LoopThread

_MOST_WAITING = 4 << 20  # bytes that QEMU has not taken yet. More are dropped, as in any network
_MOST_ASKING = 64  # questions for one name that wait for its addresses


@contextmanager
def gated(loop: LoopThread, network: str, theirs: ExitStack) -> Iterator[tuple[socket.socket, ...]]:
    """A gate for one QEMU, as long as the block: QEMU's ends of four sockets.

    What leaves the guest goes into the first one, and comes out of the second one if it may. The other two are
    for what arrives.

    Args:
        network: the hosts and ports, as one text.
        theirs: closes QEMU's ends in this process.
    """
    with ExitStack() as stack:

        def pair() -> tuple[socket.socket, socket.socket]:
            ours, its = socket.socketpair()
            stack.enter_context(ours)
            theirs.enter_context(its)
            return ours, its

        (leaving, left, arriving, arrived) = pair(), pair(), pair(), pair()
        out, back = (stack.enter_context(_sending(loop, end)) for end in (left[0], arrived[0]))
        gate = Gate(targets(network), out=out, back=back, resolve=_Names(loop).resolve)
        stack.enter_context(loop.reading(leaving[0], _each(gate.leaves)))
        stack.enter_context(loop.reading(arriving[0], _each(gate.arrives)))
        yield leaving[1], left[1], arriving[1], arrived[1]


@contextmanager
def _sending(loop: LoopThread, end: socket.socket) -> Iterator[Callable[[bytes], None]]:
    """What sends frames to QEMU."""
    with loop.writing(end, most=_MOST_WAITING) as write:
        yield lambda frame: write(framed(frame))


def _each(take: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """What takes a stream from QEMU, and passes on each frame."""
    frames = Frames()

    def feed(data: bytes) -> None:
        for frame in frames.feed(data):
            take(frame)

    return feed


class _Names:
    """Looks names up, each of them once at a time."""

    def __init__(self, loop: LoopThread) -> None:
        self._loop = loop
        self._asking: dict[str, list[Callable[[list[bytes] | None], None]]] = {}

    def resolve(self, name: str, then: Callable[[list[bytes] | None], None]) -> None:
        waiting = self._asking.setdefault(name, [])
        if len(waiting) < _MOST_ASKING:
            waiting.append(then)
        if len(waiting) > 1:
            return

        async def tell(addresses: list[bytes] | None) -> None:
            for one in self._asking.pop(name):
                one(addresses)

        def found(addresses: list[bytes] | None) -> None:
            with suppress(RuntimeError):  # the run is over
                self._loop.submit(tell(addresses))

        look_up(name, found)
