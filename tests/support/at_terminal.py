"""A program at a terminal, and what a person types there."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time
from pathlib import Path

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A program that has a terminal of its own.

    Args:
        seconds: how long to wait for a text.
    """

    def __init__(
        self, argv: list[str], *, cwd: Path, env: dict[str, str], seconds: float = 60
    ) -> None:
        self.seconds = seconds
        self.seen = ""  # without colours
        self._read = 0  # characters of it that were waited for
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            try:
                os.chdir(cwd)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.execve(argv[0], argv, {**env, "TERM": "xterm"})
            finally:
                os._exit(127)

    def dialogue(self, *lines: tuple[str, str]) -> None:
        """Wait for each text, and type a line then, or Ctrl-C; nothing for an empty line."""
        for text, line in lines:
            self.wait_for(text)
            if line:
                os.write(self._terminal, line.encode() + (b"" if line == "\x03" else b"\r"))

    def wait_for(self, text: str) -> None:
        """Wait for a text after the last one."""
        deadline = time.monotonic() + self.seconds
        while (place := self.seen.find(text, self._read)) < 0:
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.seen}"
            assert self._receive(), f"the program has ended before {text!r}:\n{self.seen}"
        self._read = place + len(text)

    def end(self) -> tuple[int, str]:
        """Wait until the program ends. Returns its exit status, and all that it wrote."""
        deadline = time.monotonic() + self.seconds
        while self._receive():
            assert time.monotonic() < deadline, f"the program does not end:\n{self.seen}"
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        self.close()
        return os.waitstatus_to_exitcode(status), self.seen

    def close(self) -> None:
        """Kill the program if it still runs."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        if self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1

    def _receive(self) -> bool:
        if not select.select([self._terminal], [], [], 1)[0]:
            return True
        try:
            data = os.read(self._terminal, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self.seen = _COLOUR.sub("", self.seen + data.decode(errors="replace").replace("\r\n", "\n"))
        return bool(data)
