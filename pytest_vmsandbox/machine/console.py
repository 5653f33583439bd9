"""A guest's serial console: everything that it wrote, within limits."""

from __future__ import annotations

import codecs
import re
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from typing import IO

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.text import printable

HEAD, TAIL = 1 << 20, 1 << 20  # characters that we keep of the beginning and the end
_END = 2048  # characters that are the end of the text
_LOG_LIMIT = 64 << 20  # bytes in the log file
_BEFORE = 256 << 10  # characters of what a guest had written before it was saved: half of each end


class Console:
    """What a guest has written to its serial console.

    It keeps the first and the last MiB, without control sequences and carriage returns.

    Args:
        log: a file for the raw bytes, or None. It gets the first 64 MiB, or less if the disk is full.
        before: what the guest had written before it was saved, if it goes on from a saved state. Such as
            the boot of a clone, which is that of its template. It is part of `text`, and of nothing else.

    Attributes:
        line: what carries the bytes that are typed to the guest; None if nobody can type.
        gate: while it is held, nothing is typed.
    """

    def __init__(self, log: IO[bytes] | None, before: str = "") -> None:
        self._log = log
        self.line: socket.socket | None = None
        self.gate = threading.Lock()
        self._followers: list[Callable[[bytes], object]] = []
        self._logged = 0
        self._before = before
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._head = StringIO()
        self._tail = StringIO()
        self._dropped = 0
        self._this_boot = StringIO()
        self._grew = threading.Condition()

    def feed(self, data: bytes) -> None:
        """Take what the guest wrote."""
        if self._log is not None and self._logged < _LOG_LIMIT:
            try:
                self._log.write(data)
                self._log.flush()
                self._logged += len(data)
            except OSError:
                self._log = None  # we still have the text
        text = self._decoder.decode(data).replace("\r", "")
        with self._grew:
            self._this_boot.write(text[: HEAD - self._this_boot.tell()])
            room = HEAD - self._head.tell()
            self._head.write(text[:room])
            self._tail.write(text[room:])
            if self._tail.tell() > 2 * TAIL:  # cut rarely, so much output costs little
                self._dropped += self._tail.tell() - TAIL
                kept = self._tail.getvalue()[-TAIL:]
                self._tail = StringIO()
                self._tail.write(kept)
            for follower in self._followers:
                follower(data)
            self._grew.notify_all()

    @contextmanager
    def following(self, follower: Callable[[bytes], object]) -> Iterator[str]:
        """Pass on the raw bytes that the guest writes from now on, and yield the text before them.

        Args:
            follower: is called on the thread that reads the console, so it must not wait.
        """
        with self._grew:
            text = self.text
            self._followers.append(follower)
        try:
            yield text
        finally:
            with self._grew:
                self._followers.remove(follower)

    def type(self, data: bytes, timeout: float) -> None:
        """Type on the serial console.

        Args:
            timeout: seconds until the guest has taken all of it.

        Raises:
            TimeoutError: the guest did not take it in time.
            OSError: nobody can type there.
        """
        if self.line is None:
            raise OSError("this console takes no input")
        deadline, poller = Deadline(timeout), select.poll()
        poller.register(self.line, select.POLLOUT)
        view = memoryview(data)
        while view:
            if not poller.poll(deadline.remaining() * 1000):
                raise TimeoutError(f"the guest took no input on its console for {timeout:g} s")
            with suppress(BlockingIOError), self.gate:
                view = view[self.line.send(view) :]

    def begin_boot(self) -> None:
        """Begin another boot of the same machine."""
        with self._grew:
            self._this_boot = StringIO()

    @property
    def this_boot(self) -> str:
        """The first MiB that the guest wrote since it was last reset."""
        with self._grew:
            raw = self._this_boot.getvalue()
        return printable(raw)

    @property
    def text(self) -> str:
        """All of the text since the guest was switched on. If a part is left out, a line says how much.

        A clone was switched on when its template was. What it wrote then comes first.
        """
        return printable(self._before + self._raw)

    @property
    def own(self) -> str:
        """The text since this machine runs, without what a clone's template has written."""
        return printable(self._raw)

    @property
    def saved(self) -> str:
        """What to keep with a saved state, for `before` of those that go on from it. At most 256 Ki characters."""
        raw = self._before + self._raw
        dropped = len(raw) - _BEFORE
        if dropped <= 0:
            return raw
        half = _BEFORE // 2
        return f"{raw[:half]}{_gap(dropped)}{raw[-half:]}"

    @property
    def _raw(self) -> str:
        with self._grew:
            return self._head.getvalue() + _gap(self._dropped) + self._tail.getvalue()

    def tail(self, n: int = 20) -> str:
        """The last ``n`` lines of `text`."""
        return last_lines(self.text, n)

    def ends_with(self, text: str) -> bool:
        """Whether the last few lines contain a text. It is quick enough to be called often."""
        with self._grew:
            part = self._tail if self._tail.tell() else self._head
            end = part.tell()
            part.seek(max(0, end - _END))
            last = part.read()
            part.seek(end)
        return text in last

    def wait_for(self, pattern: str, timeout: float, *, this_boot: bool = False) -> re.Match[str]:
        """Wait until a regular expression is found in what the guest has written.

        What a clone's template wrote does not count: it was there before the test.

        Args:
            pattern: a regular expression, with ``re.MULTILINE``.
            timeout: seconds.
            this_boot: search only in what was written since the last reset.

        Raises:
            TimeoutError: it was not found in time. The error has the last lines.
        """
        deadline = Deadline(timeout)
        compiled = re.compile(pattern, re.MULTILINE)
        while True:
            with self._grew:
                size = self.size
            if match := compiled.search(self.this_boot if this_boot else self.own):
                return match
            if deadline.expired:
                raise TimeoutError(
                    f"{pattern!r} did not appear on the console in {timeout:g} s; "
                    f"its last lines:\n{self.tail()}"
                )
            with self._grew:
                if self.size == size:
                    self._grew.wait(deadline.remaining())

    @property
    def size(self) -> int:
        """The number of characters that the guest has written since this machine runs."""
        return self._dropped + self._head.tell() + self._tail.tell()


def last_lines(text: str, n: int = 20) -> str:
    """The last ``n`` lines of a text."""
    return "\n".join(text.rstrip("\n").split("\n")[-n:]) if n > 0 else ""


def _gap(dropped: int) -> str:
    """Stands for characters that are left out."""
    return f"\n[{dropped} characters left out]\n" if dropped else ""
