"""A connection to the supervisor as a program, for a host that cannot connect to sockets of the guest."""

import os
import select
import socket

from .wire import CHUNK, NICE, SOCKET


def attach(folder: str) -> None:
    os.nice(NICE)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.path.join(folder, SOCKET))
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(sock, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == 0:
                data = os.read(0, CHUNK)
                sock.sendall(data)
            else:
                data = sock.recv(CHUNK)
                view = memoryview(data)
                while view:
                    view = view[os.write(1, view) :]
            if not data:
                return
