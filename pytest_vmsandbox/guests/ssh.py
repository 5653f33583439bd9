"""SSH into a guest: the only module that knows paramiko.

paramiko takes a fifth of a second to import, so this module is imported by those who connect.
"""

from __future__ import annotations

import io
import logging
import os
import secrets
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paramiko

from pytest_vmsandbox.core.deadline import Deadline, monotonic, within
from pytest_vmsandbox.core.errors import CommandError, GuestLost
from pytest_vmsandbox.core.transport import Command
from pytest_vmsandbox.guests import script
from pytest_vmsandbox.guests.keys import KeyPair
from pytest_vmsandbox.guests.process import (
    STDERR,
    STDOUT,
    UNKNOWN_SIGNAL,
    RemoteProcess,
    cannot_log_in,
    could_not_start,
)

_QUIET_SECONDS = 0.5  # a stream that something else holds open is done when it was quiet so long
_KILL_SECONDS = 15.0
_KEEPALIVE_SECONDS = 15
_LINGER_SECONDS = 5.0
_LOOK_SECONDS = 0.25  # how often the guest is looked at while something is awaited
_CHUNK = 1 << 18
_MAX_GROUP = 20  # digits of a process number
_MAX_NOISE = 1 << 16  # bytes that a login shell may write before the program starts
_SIGNALS = {
    "HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "TRAP": 5, "ABRT": 6, "BUS": 7, "FPE": 8, "KILL": 9,
    "USR1": 10, "SEGV": 11, "USR2": 12, "PIPE": 13, "ALRM": 14, "TERM": 15, "XCPU": 24, "SYS": 31,
}  # fmt: skip  # the names are the protocol's, the numbers Linux's
_MAX_LINE = 8_000  # bytes of a command that every server takes; dropbear's limit is 9,000
_LOG = "pytest_vmsandbox.ssh"  # paramiko also logs what it raises; tests need not see it twice
logging.getLogger(_LOG).addHandler(logging.NullHandler())
logging.getLogger(_LOG).propagate = False


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """How a guest's SSH server is reached and known.

    Attributes:
        address: host and port.
        user: who logs in.
        key: our key.
        host_key: the server's, ``ssh-ed25519 AAAA…``; any other is refused.
    """

    address: tuple[str, int]
    user: str
    key: KeyPair
    host_key: str


class _Session(paramiko.Transport):
    """A connection that also notes which signal ended a program; paramiko itself drops it."""

    def _note_signal(channel: Any, message: Any) -> None:  # noqa: N805  # called without self
        if message.get_text() == "exit-signal":
            message.get_boolean()
            channel.ended_by = _SIGNALS.get(message.get_text(), UNKNOWN_SIGNAL)
            channel.status_event.set()
        else:
            message.rewind()
            message.get_int()  # the channel's number
            channel._handle_request(message)

    _channel_handler_table = {  # noqa: RUF012
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]  # noqa: SLF001
        paramiko.common.MSG_CHANNEL_REQUEST: _note_signal,
    }


class SSHTransport:
    """Runs programs in a guest over one SSH connection, made when it is first needed.

    Args:
        endpoint: called for each connection; gives where and how.
        check: called often while something is awaited; raises `GuestLost` when the guest is gone.
        connect_timeout: seconds for a connection.
        time_scale: by how much the guest is slower than one on real hardware.
    """

    def __init__(
        self,
        endpoint: Callable[[], Endpoint],
        *,
        check: Callable[[], None],
        connect_timeout: float,
        time_scale: float = 1.0,
    ) -> None:
        self.quiet_seconds = max(_QUIET_SECONDS, _QUIET_SECONDS * time_scale / 4)
        self._endpoint = endpoint
        self._check = check
        self._connect_timeout = connect_timeout
        self._session: _Session | None = None
        self._lock = threading.Lock()

    def start(self, command: Command) -> RemoteProcess:
        """Start a program."""
        token = secrets.token_hex(8)
        started = monotonic()
        line, ahead = script.command_line(command, token), b""
        if len(os.fsencode(line)) > _MAX_LINE:
            line, ahead = script.shipped(command, token)
        channel = SSHChannel(self, self._channel(line, ahead))
        try:
            self._await_start(channel, command, token, started)
        except BaseException:
            channel.close()
            raise
        return RemoteProcess(channel, command, check=self._check)

    def signal(self, group: int, name: str) -> None:
        """Send a signal to a process group of the guest; it may be gone already."""
        channel = self._channel(script.kill_line(group, name))
        try:
            channel.status_event.wait(_KILL_SECONDS)
        finally:
            channel.close()

    def close(self) -> None:
        """Close the connection, if there is one."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            _close(session)

    def uses(self, session: paramiko.Transport) -> bool:
        """Whether a connection is the one in use now; it is not once that was closed from here."""
        return session is self._session

    def _await_start(
        self, channel: SSHChannel, command: Command, token: str, started: float
    ) -> None:
        """Read up to the line that says that the program starts, with its process group."""
        mark, seen = f"{script.STARTED} {token} ".encode(), b""
        deadline = Deadline(self._connect_timeout)
        while True:
            before, _, rest = seen.partition(mark)
            group, ended, early = rest.partition(b"\n")
            if ended and group.isdigit():
                channel.begin(int(group), early)
                return
            if len(before) > _MAX_NOISE or len(group) > _MAX_GROUP:
                raise GuestLost(
                    "the guest's login shell does not stop talking",
                    stage="ssh",
                    details=seen[:500].decode(errors="replace"),
                )
            try:
                data = channel.receive(STDOUT, _CHUNK)
            except TimeoutError:
                self._check()
                if deadline.expired:
                    raise GuestLost(
                        f"the guest did not start a program in {deadline.seconds:g} s", stage="ssh"
                    ) from None
                continue
            if not data:
                raise self._not_started(channel, command, seen, started)
            seen += data

    def _not_started(
        self, channel: SSHChannel, command: Command, noise: bytes, started: float
    ) -> CommandError | GuestLost:
        channel.wait_for_end(_LINGER_SECONDS)
        if channel.status is None or channel.status < 0:
            self._check()
            return GuestLost("the connection broke while a program was started", stage="ssh")
        stderr = b""
        while data := channel.receive(STDERR, _CHUNK):
            stderr += data
        return could_not_start(command, channel.status, noise, stderr, started)

    def _channel(self, line: str, ahead: bytes = b"") -> Any:
        for attempt in (1, 2):
            session = self._connected()
            try:
                return self._execute(session, os.fsencode(line), ahead)
            except paramiko.ChannelException as error:  # the connection itself is all right
                raise _lost("the guest opens no further channel", error) from error
            except (paramiko.SSHException, OSError, EOFError) as error:
                with self._lock:
                    if self._session is session:
                        self._session = None
                _close(session)
                self._check()
                if attempt == 2:
                    raise _lost("no command can be started", error) from error
        raise AssertionError

    def _execute(self, session: _Session, line: bytes, ahead: bytes) -> Any:
        channel: Any = session.open_session(timeout=self._connect_timeout)
        channel.ended_by = None

        def ask() -> None:
            channel.exec_command(line)
            channel.sendall(ahead)

        # paramiko itself would wait for the answer for ever.
        if not within(self._connect_timeout, ask, check=self._check):
            raise paramiko.SSHException("no answer to the request to start a program")
        return channel

    def _connected(self) -> _Session:
        with self._lock:
            if self._session is not None and self._session.is_active():
                return self._session
            if self._session is not None:
                _close(self._session)
            self._session = None
            self._check()
            endpoint = self._endpoint()
            try:
                self._session = _connect(endpoint, self._connect_timeout)
            except paramiko.AuthenticationException as error:
                raise cannot_log_in(endpoint.user) from error
            except (paramiko.SSHException, OSError, EOFError) as error:
                self._check()
                raise _lost("no SSH connection", error) from error
            return self._session


class SSHChannel:
    """The streams of a program that was started by SSH: a `Channel`, of one of paramiko's.

    Attributes:
        group: the program's process group, once that is known.
    """

    def __init__(self, transport: SSHTransport, channel: Any) -> None:
        self.quiet_seconds = transport.quiet_seconds
        self.group = 0
        self._transport = transport
        self._channel = channel
        self._early = b""
        self._receive = {STDOUT: channel.recv, STDERR: channel.recv_stderr}
        self._is_ready = {STDOUT: channel.recv_ready, STDERR: channel.recv_stderr_ready}
        channel.settimeout(_LOOK_SECONDS)

    def begin(self, group: int, early: bytes) -> None:
        """The program has started, and of its output this has come already."""
        self.group, self._early = group, early

    @property
    def output_ended(self) -> bool:
        """Whether no more output will come."""
        return bool(self._channel.eof_received or self._channel.closed)

    @property
    def closed(self) -> bool:
        """Whether nothing will go either way."""
        return bool(self._channel.closed)

    @property
    def ended(self) -> bool:
        """Whether it is known how the program ended, or that nobody will know."""
        return bool(self._channel.status_event.is_set())

    @property
    def status(self) -> int | None:
        """How it ended (−N: signal N); None where nobody knows."""
        if self._channel.ended_by is not None:
            return -int(self._channel.ended_by)
        return None if self._channel.exit_status == -1 else int(self._channel.exit_status)

    @property
    def is_connected(self) -> bool:
        """Whether its connection is in use, and well."""
        session = self._channel.get_transport()
        return self._transport.uses(session) and bool(session.is_active())

    @property
    def was_left(self) -> bool:
        """Whether its connection was closed from here."""
        return not self._transport.uses(self._channel.get_transport())

    def has_output(self, stream: int) -> bool:
        """Whether `receive` has something of a stream now."""
        return bool((stream == STDOUT and self._early) or self._is_ready[stream]())

    def receive(self, stream: int, size: int) -> bytes:
        """At least a byte of a stream; nothing at its end."""
        if stream == STDOUT and self._early:
            data, self._early = self._early[:size], self._early[size:]
            return data
        return bytes(self._receive[stream](size))

    def send(self, data: memoryview) -> int:
        """Send a part of `data`, and tell how much."""
        return int(self._channel.send(data))

    def end_input(self) -> None:
        """Let the program find the end of its input."""
        self._channel.shutdown_write()

    def wait(self, seconds: float) -> None:
        """Wait until something has come, or the program has ended."""
        if self.output_ended:  # then a poller does not wait
            self.wait_for_end(seconds)
        else:
            poller = select.poll()
            poller.register(self._channel.fileno(), select.POLLIN)
            poller.poll(seconds * 1000)

    def wait_for_end(self, seconds: float) -> None:
        """Wait until the program has ended."""
        self._channel.status_event.wait(seconds)

    def signal(self, name: str) -> None:
        """Send a signal to the program's process group."""
        self._transport.signal(self.group, name)

    def close(self) -> None:
        """Let go of the program; if the guest does not even take that, of its connection."""
        if not within(_LINGER_SECONDS, self._channel.close):
            _close(self._channel.get_transport())


def _close(session: _Session) -> None:
    session.close()
    session.join(_LINGER_SECONDS)


def _connect(endpoint: Endpoint, timeout: float) -> _Session:
    sock = socket.create_connection(endpoint.address, timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    session = _Session(sock)
    session.set_log_channel(_LOG)
    try:
        session.banner_timeout = session.handshake_timeout = session.auth_timeout = timeout
        session.get_security_options().key_types = ("ssh-ed25519",)
        session.start_client(timeout=timeout)
        theirs = session.get_remote_server_key()
        if f"{theirs.get_name()} {theirs.get_base64()}" != endpoint.host_key:
            raise paramiko.SSHException(
                "the server's key is not the one of this image; something else answers there"
            )
        key = paramiko.Ed25519Key.from_private_key(io.StringIO(endpoint.key.private))
        session.auth_publickey(endpoint.user, key)
        session.set_keepalive(_KEEPALIVE_SECONDS)
    except BaseException:
        _close(session)
        raise
    return session


def _lost(what: str, error: Exception) -> GuestLost:
    return GuestLost(
        f"{what}: {str(error) or type(error).__name__}",
        stage="ssh",
        remedy="the console's last lines may tell why; the user must exist in the guest",
    )
