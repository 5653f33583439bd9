"""Waits for a request on a disk, relays it to the supervisor, and its answers to a serial port.

QEMU records what a disk gives and what a serial port takes, but not what comes from the host otherwise.
"""

from __future__ import annotations

import fcntl
import glob
import json
import mmap
import os
import select
import socket
import struct
import termios
import time

from .wire import CHUNK, SOCKET, Lines

DISK = "request"  # the serial number of the disk
REPORT = "/dev/ttyS1"
BLOCK = 4096  # bytes; a disk that is read past the cache wants whole blocks
LOOK_SECONDS = 0.1
PING_SECONDS = 2.0  # of the supervisor's silence, after which it is asked for a sign of life
GONE = b'{"gone": true}\n'
PING = b'{"do": "ping", "n": 0}\n'
ADD_ENTROPY, RESEED = 0x40085203, 0x5207  # Linux's RNDADDENTROPY and RNDRESEEDCRNG


def wait(folder: str) -> None:
    """Go on as a process of its own, until a request has come and was carried out."""
    disk = os.open(find_disk(), os.O_RDONLY | os.O_DIRECT)
    report = open_port()
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    first = read(disk, 0, BLOCK)
    while not any(first[:8]):
        time.sleep(LOOK_SECONDS)
        first = read(disk, 0, BLOCK)
    (size,) = struct.unpack_from("<Q", first)
    whole = b"".join(read(disk, at, BLOCK) for at in range(0, 8 + size, BLOCK))[8 : 8 + size]
    head, _, rest = whole.partition(b"\n")
    begin(json.loads(head))
    relay(folder, rest, report)


def find_disk() -> str:
    for path in glob.glob("/sys/block/vd*/serial"):
        with open(path, encoding="ascii") as file:
            if file.read().strip() == DISK:
                return "/dev/" + path.split("/")[3]
    raise SystemExit("this guest has no disk for requests")


def open_port() -> int:
    """The serial port. It passes on every byte as it is."""
    port = os.open(REPORT, os.O_WRONLY | os.O_NOCTTY)
    mode = termios.tcgetattr(port)
    mode[1] &= ~termios.OPOST
    termios.tcsetattr(port, termios.TCSANOW, mode)
    return port


def read(disk: int, start: int, size: int) -> bytes:
    with mmap.mmap(-1, size) as buffer:
        os.preadv(disk, [buffer], start)
        return buffer[:]


def begin(head: dict[str, object]) -> None:
    """Make this guest differ from others: its clock, its name and its random numbers."""
    time.clock_settime(time.CLOCK_REALTIME, float(str(head["now"])))
    socket.sethostname(str(head["hostname"]))
    seed = bytes.fromhex(str(head["seed"]))
    with open("/dev/urandom", "wb", buffering=0) as random:
        fcntl.ioctl(random, ADD_ENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(random, RESEED)


def relay(folder: str, request: bytes, report: int) -> None:
    """Send a request to the supervisor, and write all of its messages until the session has ended.

    The host cannot ask whether the supervisor lives. So this does, and writes the answer, or that it is
    gone.
    """
    supervisor = socket.socket(socket.AF_UNIX)
    supervisor.connect(os.path.join(folder, SOCKET))
    supervisor.sendall(request)
    lines = Lines()
    is_over = False
    while not is_over:
        try:
            if not select.select([supervisor], [], [], PING_SECONDS)[0]:
                supervisor.sendall(PING)
            data = supervisor.recv(CHUNK)
        except OSError:
            data = b""
        for line in lines.feed(data) if data else [GONE.rstrip()]:
            rest = memoryview(line + b"\n")
            while rest:
                rest = rest[os.write(report, rest) :]
            is_over = not data or line.startswith(b'{"exit"')
    termios.tcdrain(report)
