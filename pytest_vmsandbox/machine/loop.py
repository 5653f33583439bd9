"""The thread that reads from QEMU's monitors and serial consoles."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import IO, Any, Self, TypeVar

_T = TypeVar("_T")
_CHUNK = 65_536
_LAST_CHUNKS = 64  # that are read at the end: more than a pipe or a socket holds
_CALL_SECONDS = 10.0


class LoopThread:
    """An asyncio event loop in its own thread, for use from other threads.

    It runs as long as its context. At the end, its tasks are cancelled and the thread ends.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vmsandbox-loop", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.submit(_cancel_all()).result(_CALL_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Start a coroutine on the loop.

        Raises:
            RuntimeError: the loop is closed.
        """
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()  # else Python warns that it was never awaited
            raise

    @contextmanager
    def reading(
        self, source: socket.socket | IO[bytes], feed: Callable[[bytes], None]
    ) -> Iterator[None]:
        """Pass what arrives on a socket or a pipe to `feed`, on the loop's thread."""
        os.set_blocking(source.fileno(), False)

        def on_readable() -> bool:
            try:
                data = os.read(source.fileno(), _CHUNK)
            except BlockingIOError:
                return False
            except OSError:
                data = b""
            if data:
                feed(data)
            else:
                self._loop.remove_reader(source)
            return bool(data)

        async def end() -> None:
            if self._loop.remove_reader(source):
                for _ in range(_LAST_CHUNKS):
                    if not on_readable():
                        break

        self._loop.call_soon_threadsafe(self._loop.add_reader, source, on_readable)
        try:
            yield
        finally:
            self.submit(end()).result(_CALL_SECONDS)

    @contextmanager
    def writing(self, target: socket.socket, *, most: int) -> Iterator[Callable[[bytes], None]]:
        """What writes to a socket without waiting, for use on the loop's thread.

        Args:
            most: bytes that wait to be taken. What is written when there are more is dropped as a whole.
        """
        target.setblocking(False)
        writer = _Writer(self._loop, target, most)

        async def end() -> None:
            writer.close()

        try:
            yield writer.write
        finally:
            self.submit(end()).result(_CALL_SECONDS)


class _Writer:
    """Writes to a socket what it takes, and keeps the rest."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: socket.socket, most: int) -> None:
        self._loop, self._target, self._most = loop, target, most
        self._waiting = bytearray()
        self._is_over = False

    def write(self, data: bytes) -> None:
        if self._is_over or len(self._waiting) > self._most:
            return
        self._waiting += data
        if len(self._waiting) == len(data):
            self._flush()

    def close(self) -> None:
        self._is_over = True
        self._loop.remove_writer(self._target)

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._target.send(self._waiting[:_CHUNK])]
        except BlockingIOError:
            self._loop.add_writer(self._target, self._flush)
        except OSError:  # the other end is gone
            self.close()
        else:
            self._loop.remove_writer(self._target)


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
