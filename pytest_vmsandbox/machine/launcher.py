"""The launcher: a process that starts all guests of one run, and ends them when the run is gone.

It is a separate program (``python -I -S launcher.py CONTROL-FD OWNER-PID FOLDER``). It uses only the
standard library, has one thread, and is never imported. It knows in two ways that its owner is gone: the
control socket ends, or the owner's pidfd says so. (A process that the owner forked may still hold the
socket.) Then it kills all guests, waits for them, removes the run's folder and the targets of links in
it, and ends. A guest also dies with the launcher, by PR_SET_PDEATHSIG. The launcher has one thread, so
this signal cannot come early.

The control socket carries one JSON message per packet, host to launcher only:

* ``{"spawn": ID, "argv": […], "fds": [N, …], "env": {NAME: VALUE}, "identity": {"uid": N, "gid": N,
  "groups": […]}|null, "small_pages": BOOL}`` with the descriptors attached: first the status pipe,
  then one for each number in ``fds``. The status pipe gets a line ``{"pid": N}`` or
  ``{"error": "…"}``, later ``{"exit": STATUS}``, then its end.
* ``{"more": true}`` carries the first descriptors of the following ``spawn``: Linux allows 253 in a
  message.
* ``{"signal": NUMBER, "id": ID}`` sends a signal to a guest that has not been reaped yet, so a
  process that merely got the same pid is never hit.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import sys

TYPE_CHECKING = False  # type checkers know it; importing typing would take too long
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Guests = dict[int, dict[str, int]]

PR_SET_PDEATHSIG = 1
PR_SET_THP_DISABLE = 41
MAX_MESSAGE = 1 << 20
MAX_DESCRIPTORS = 253  # of one message
FIRST_FREE_FD = 200


def main(control_fd: int, owner_pid: int, folder: str) -> None:
    """Own the guests until the owner is gone."""
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGPIPE"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(wake_read, select.POLLIN)
    try:
        owner = os.pidfd_open(owner_pid)
        poller.register(owner, select.POLLIN)
    except OSError:
        owner = -1
        if os.getppid() != owner_pid:  # the owner is already gone
            control.close()
            return
    guests: Guests = {}
    early: list[int] = []
    try:
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if wake_read in ready:
                os.read(wake_read, 4096)
                reap(guests)
            if owner in ready:
                break
            if control.fileno() in ready and not obey(control, guests, early):
                break
    finally:
        end_all(guests)
        remove(folder)


def obey(control: socket.socket, guests: Guests, early: list[int]) -> bool:
    """Execute one message. Returns False at the end of the control socket.

    `early` has descriptors that came before their message.
    """
    try:
        message, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, MAX_DESCRIPTORS)
    except (BlockingIOError, InterruptedError):
        return True
    except OSError:
        return False
    if not message:
        return False
    request = json.loads(message)
    early += fds
    if "more" in request:
        return True
    if "spawn" in request:
        spawn(request, early[:], guests)
        early.clear()
    else:
        guest = guests.get(request["id"])
        if guest is not None:
            os.kill(guest["pid"], request["signal"])
    return True


def spawn(request: dict[str, Any], fds: list[int], guests: Guests) -> None:
    """Start a guest. If the host has no room for it, report that to its status pipe."""
    moved: list[int] = []
    first = max(FIRST_FREE_FD, *(number + 1 for number in request["fds"]))  # above all its numbers
    launcher_pid = os.getpid()
    # Block signals until the child has reset its handlers, so none gets lost.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for fd in fds:
            moved.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first))  # noqa: PERF401  # those before an error are closed
        if len(moved) != 1 + len(request["fds"]):  # we had no descriptors left to receive them
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        pid = os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if fds:
            report(fds[0], {"error": str(error)})
        close(moved + fds)
        return
    close(fds)  # in both processes
    status, *given = moved
    if pid == 0:
        try:
            become(request, given, launcher_pid)
        except BaseException as error:  # noqa: BLE001  # the owner gets it
            report(status, {"error": str(error)})
        finally:
            os._exit(127)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    close(given)
    report(status, {"pid": pid})
    guests[request["spawn"]] = {"pid": pid, "status": status}


def become(request: dict[str, Any], given: list[int], launcher_pid: int) -> NoReturn:
    """In the child: set up descriptors, user and death signal, then run the program."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    targets = dict(zip(request["fds"], given, strict=True))
    for number in (1, 2):
        if number not in targets:
            os.dup2(null, number)
    for number, fd in targets.items():
        os.dup2(fd, number)  # dup2 makes it inheritable
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write("500")  # the host's OOM killer should take a guest before a test run
    except OSError:
        pass
    if identity := request["identity"]:
        os.setgroups(identity["groups"])
        os.setresgid(identity["gid"], identity["gid"], identity["gid"])
        os.setresuid(identity["uid"], identity["uid"], identity["uid"])
    library = ctypes.CDLL(None, use_errno=True)
    if request["small_pages"]:
        library.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # if it fails, the guest uses more memory
    # After the change of user, because that clears the death signal.
    if library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != launcher_pid:
        os._exit(127)
    os.execve(request["argv"][0], request["argv"], request["env"])


def reap(guests: Guests) -> None:
    for name, guest in list(guests.items()):
        pid, status = os.waitpid(guest["pid"], os.WNOHANG)
        if pid:
            report(guest["status"], {"exit": os.waitstatus_to_exitcode(status)})
            os.close(guest["status"])
            del guests[name]


def end_all(guests: Guests) -> None:
    for guest in guests.values():
        os.kill(guest["pid"], signal.SIGKILL)
    for guest in guests.values():
        os.waitpid(guest["pid"], 0)


def remove(folder: str) -> None:
    """Remove the run's folder, and its folders elsewhere, to which it has links."""
    try:
        with os.scandir(folder) as entries:
            owned = [os.readlink(entry.path) for entry in entries if entry.is_symlink()]
    except OSError:
        owned = []
    for path in (*owned, folder):
        shutil.rmtree(path, ignore_errors=True)


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def report(status: int, message: dict[str, object]) -> None:
    try:
        os.write(status, json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # the owner is gone; the control socket says so too


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
