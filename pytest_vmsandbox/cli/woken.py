"""Kept guests that one command has woken together. Further commands enter them, too.

Who wakes them listens at an address that the kernel forgets when that command ends, however it ends. Only the
same user is heard. A further command asks there for the way into a guest, and stays connected as long as
somebody is in it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import sleep

from pytest_vmsandbox.core.errors import GuestLost, VMSandboxError
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.kept import Group, KeptGuest

_TRIES, _TRY_SECONDS = 20, 0.1  # somebody may be about to listen
_LONGEST = 1 << 16  # bytes of a message
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_AGAIN = "enter it again: it is kept as it was"


@dataclass(frozen=True)
class Way:
    """The way into a guest that runs, by SSH.

    Attributes:
        ssh: the command line that logs in.
        folder: where a test inside has run, if it is still there; else empty.
        loss: returns why the guest is gone; None if it is there.
    """

    ssh: str
    folder: str
    loss: Callable[[], GuestLost | None]

    @classmethod
    def into(cls, guest: Guest, kept: KeptGuest) -> Way:
        """The way into a guest of this process.

        Raises:
            GuestLost: it does not answer on SSH.
        """
        return cls(guest.ssh_command, folder_in(guest, kept), lambda: guest.engine.loss)


def folder_in(guest: Guest, kept: KeptGuest) -> str:
    """Where a test inside has run, if it is still there; else empty."""
    folder = kept.moment.folder
    if folder and guest.run(["test", "-d", folder], check=False).returncode:
        return ""
    return folder


class Door:
    """Lets further commands into guests of this process. It is closed until `opened`."""

    def __init__(self, listener: socket.socket | None) -> None:
        self._listener = listener
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._visitors: list[socket.socket] = []
        self._guests: Mapping[str, tuple[Guest, KeptGuest]] | None = None
        if listener is not None:
            threading.Thread(target=self._listen, args=(listener,), daemon=True).start()

    @contextmanager
    def opened(self, guests: Sequence[Guest], group: Sequence[KeptGuest]) -> Iterator[None]:
        """Others can enter these guests until the end."""
        with self._changed:
            self._guests = {
                kept.key: (guest, kept) for guest, kept in zip(guests, group, strict=True)
            }
            self._changed.notify_all()
        try:
            yield
        finally:
            self.close()

    def await_others(self, tell: Callable[[int], object]) -> None:
        """Wait until everybody else has left.

        Args:
            tell: called once with the number of others, if there are any.
        """
        with self._changed:
            if self._visitors:
                tell(len(self._visitors))
            self._changed.wait_for(lambda: not self._visitors)

    def close(self) -> None:
        """Show all others out."""
        with self._changed:
            listener, self._listener = self._listener, None
            self._guests = self._guests or {}
            self._changed.notify_all()
            there = list(self._visitors)
        for it in there if listener is None else (listener, *there):
            with suppress(OSError):
                it.shutdown(socket.SHUT_RDWR)
        if listener is not None:
            listener.close()

    def _listen(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it is closed
            while True:
                visitor, _ = listener.accept()
                threading.Thread(target=self._serve, args=(visitor,), daemon=True).start()

    def _serve(self, visitor: socket.socket) -> None:
        with visitor, suppress(OSError, ValueError):
            if not _is_ours(visitor):
                return
            with self._changed:
                self._visitors.append(visitor)
            try:
                while request := _heard(visitor):
                    _say(visitor, self._answer(request))
            finally:
                with self._changed:
                    self._visitors.remove(visitor)
                    self._changed.notify_all()

    def _answer(self, request: Mapping[str, object]) -> Mapping[str, object]:
        with self._changed:
            self._changed.wait_for(lambda: self._guests is not None)
            found = (self._guests or {}).get(str(request.get("guest")))
        if found is None:
            raise ValueError("there is no such guest")
        guest, kept = found
        loss: VMSandboxError | None = guest.engine.loss
        if loss is None and not request.get("loss"):
            try:
                with self._lock:
                    way = Way.into(guest, kept)
            except VMSandboxError as error:
                loss = error
            else:
                return {"ssh": way.ssh, "folder": way.folder}
        return {"lost": None if loss is None else {"brief": loss.brief, "details": loss.details}}


class Visit:
    """A guest that another command has woken."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def way(self, kept: KeptGuest) -> Way:
        """The way into a guest. Waits until it is woken.

        Raises:
            GuestLost: it does not answer, or the other command has ended.
        """
        answer = self._asked({"guest": kept.key})
        if isinstance(loss := answer.get("lost"), dict):
            raise GuestLost(**loss, remedy=_AGAIN)
        if "ssh" not in answer:
            raise self._over(kept)
        return Way(str(answer["ssh"]), str(answer["folder"]), lambda: self._loss(kept))

    def _loss(self, kept: KeptGuest) -> GuestLost | None:
        answer = self._asked({"guest": kept.key, "loss": True})
        if "lost" not in answer:
            return self._over(kept)
        loss = answer["lost"]
        return GuestLost(**loss, remedy=_AGAIN) if isinstance(loss, dict) else None

    def _asked(self, request: Mapping[str, object]) -> Mapping[str, object]:
        """The answer; nothing if the other command has ended."""
        try:
            _say(self._connection, request)
            return _heard(self._connection)
        except (OSError, ValueError):
            return {}

    @staticmethod
    def _over(kept: KeptGuest) -> GuestLost:
        return GuestLost(
            f"{kept.guest} has ended, because the command that woke it has ended", remedy=_AGAIN
        )


@contextmanager
def entrance(root: Path, group: Group | None) -> Iterator[Door | Visit]:
    """What lets others into guests that this command wakes; or the way to who has woken them.

    Args:
        root: of the store.
        group: of the guests; None if they are for this command alone.
    """
    if group is None:
        yield Door(None)
        return
    found = _found(_address(root, group))
    if not isinstance(found, Door):
        with found:
            yield Visit(found)
        return
    try:
        yield found
    finally:
        found.close()


def _address(root: Path, group: Group) -> str:
    text = json.dumps([os.getuid(), os.fspath(root.resolve()), group.id])
    return f"\0vmsandbox-kept-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _found(address: str) -> socket.socket | Door:
    """A connection to who has woken the guests; or a door, if nobody has."""
    for _ in range(_TRIES):
        connection = socket.socket(socket.AF_UNIX)
        with suppress(ConnectionRefusedError):
            connection.connect(address)
            if _is_ours(connection):
                return connection
        connection.close()
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(address)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
            sleep(_TRY_SECONDS)
        else:
            listener.listen()
            return Door(listener)
    return Door(None)  # another user has taken the address


def _is_ours(connection: socket.socket) -> bool:
    """Whether the other side is a process of the same user."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(raw)[1] == os.getuid())


def _say(connection: socket.socket, message: Mapping[str, object]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _heard(connection: socket.socket) -> Mapping[str, object]:
    """The next message; nothing at the end."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST:
        if not (data := connection.recv(_LONGEST)):
            return {}
        line += data
    message = json.loads(line)
    return message if isinstance(message, dict) else {}
