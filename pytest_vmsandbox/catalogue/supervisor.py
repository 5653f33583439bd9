"""Supervises a program, and ends only after everything that the program started.

This file stands alone. It is executed and never imported::

    python -I -S supervisor.py PARENT LOCK PROGRAM ARGUMENT...

It adopts the program's orphaned descendants. It kills all of them when the program ends, when the
process PARENT ends, or at SIGTERM. It ends when they are gone. So if the supervisor has ended, nothing
is left. Until then it holds the descriptor LOCK (an inherited flock), even if PARENT is dead. Its exit
status is the program's; 128 + N for signal N.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
WATCHED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def main(parent: int, lock: int, argv: list[str]) -> int:
    """Run `argv` until it ends or we are told to end. Returns the exit status."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    os.set_inheritable(lock, False)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before prctl
        return 128 + signal.SIGTERM
    program = os.fork()
    if program == 0:
        try:
            os.setsid()  # so that a recipe's `kill 0` does not reach us
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
            os.execvp(argv[0], argv)
        except OSError as error:
            os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(126)
    ended: dict[int, int] = {}
    while program not in ended:
        received = signal.sigwait(WATCHED)
        if received == signal.SIGCHLD:
            reap(ended)
        else:
            ended[program] = 128 + received
    end_all()
    return ended[program]


def reap(ended: dict[int, int]) -> bool:
    """Add the exit statuses of ended children to `ended`. Returns whether children are left."""
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if child == 0:
            return True
        code = os.waitstatus_to_exitcode(status)
        ended[child] = code if code >= 0 else 128 - code


def end_all() -> None:
    """Kill our children until there are none. Their children become ours."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    while reap({}):
        children = [int(child) for child in listing.read_text(encoding="utf-8").split()]
        if children and not sum(kill(child) for child in children):
            return  # the rest runs as another user, for instance by sudo
        signal.sigtimedwait({signal.SIGCHLD}, 0.02)


def kill(child: int) -> bool:
    """Kill a child. Returns False if we are not allowed to."""
    try:
        os.kill(child, signal.SIGKILL)
    except PermissionError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
