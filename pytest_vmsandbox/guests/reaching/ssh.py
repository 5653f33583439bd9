"""SSH into a guest. Only this module uses paramiko.

paramiko takes 0.2 s to import, so this module is imported only for a connection.
"""

from __future__ import annotations

import io
import logging
import os
import secrets
import select
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NoReturn

import paramiko

from pytest_vmsandbox.core.deadline import Deadline, within
from pytest_vmsandbox.core.errors import CommandError, GuestLost
from pytest_vmsandbox.guests.reaching import commands
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.reaching.process import STDERR, STDOUT, UNKNOWN_SIGNAL, RemoteProcess

_KILL_SECONDS = 15.0
_KEEPALIVE_SECONDS = 15
_LINGER_SECONDS = 5.0
_LOOK_SECONDS = 0.25  # how often we check the guest while we wait
_CHUNK = 1 << 18
_MAX_GROUP = 20  # digits of a process number
_MAX_NOISE = 1 << 16  # bytes that a login shell may write before the program starts
_MAX_LINE = 8_000  # bytes of a command that every server accepts; dropbear's limit is 9,000
_UNKNOWN_SHELL, _POSIX_SHELL, _OTHER_SHELL = "", "posix", "other"  # the user's login shell
_LOG = "pytest_vmsandbox.ssh"  # paramiko logs what it raises, and tests should see it only once
logging.getLogger(_LOG).addHandler(logging.NullHandler())
logging.getLogger(_LOG).propagate = False


class _Session(paramiko.Transport):
    """A connection that also notes the signal that ended a program. paramiko alone drops it."""

    def _note_signal(channel: Any, message: Any) -> None:  # noqa: N805  # called without self
        if message.get_text() == "exit-signal":
            message.get_boolean()
            name = f"SIG{message.get_text()}"  # its number is the same here and in the guest
            channel.ended_by = signal.Signals.__members__.get(name, UNKNOWN_SIGNAL)
            channel.status_event.set()
        else:
            message.rewind()
            message.get_int()  # the channel's number
            channel._handle_request(message)

    _channel_handler_table = {  # noqa: RUF012
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]  # noqa: SLF001
        paramiko.common.MSG_CHANNEL_REQUEST: _note_signal,
    }


@dataclass(kw_only=True, eq=False)
class SSHTransport:
    """Runs programs in a guest over one SSH connection, which is made on demand.

    Attributes:
        address: called for each connection; returns host and port.
        user: who logs in.
        key: our key.
        host_key: the server's key, ``ssh-ed25519 AAAA…``. Any other key is refused.
        check: called often while we wait; raises `GuestLost` if the guest is gone.
        connect_timeout: seconds for a connection.
        quiet_seconds: see `Channel`.
    """

    address: Callable[[], tuple[str, int]]
    user: str
    key: KeyPair
    host_key: str
    check: Callable[[], None]
    connect_timeout: float
    quiet_seconds: float
    _shell: str = _UNKNOWN_SHELL
    _session: _Session | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, command: Command) -> RemoteProcess:
        """Start a program."""
        try:
            process = self._start(command)
        except CommandError:
            if self._shell != _UNKNOWN_SHELL:
                raise
            self._shell = _OTHER_SHELL
            try:
                return self._start(command)
            except CommandError:  # so the shell is not the cause
                self._shell = _UNKNOWN_SHELL
            raise
        if self._shell == _UNKNOWN_SHELL:
            self._shell = _POSIX_SHELL
        return process

    def _start(self, command: Command) -> RemoteProcess:
        token = secrets.token_hex(8)
        line, ahead = self._line(commands.command_line(command, token)), b""
        if len(os.fsencode(line)) > _MAX_LINE:
            line, ahead = commands.shipped(command, token)
            line = self._line(line)
        channel = SSHChannel(self, self._channel(line, ahead))
        process = RemoteProcess(channel, command, check=self.check)
        try:
            self._await_start(channel, process, token)
        except BaseException:
            channel.close()
            raise
        return process

    def _line(self, line: str) -> str:
        return commands.for_any_shell(line) if self._shell == _OTHER_SHELL else line

    def signal(self, group: int, name: str) -> None:
        """Send a signal to a process group in the guest, which may be gone already."""
        with closing(self._channel(commands.kill_line(group, name))) as channel:
            channel.status_event.wait(_KILL_SECONDS)

    def close(self) -> None:
        """Close the connection, if there is one."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            _close(session)

    def uses(self, session: paramiko.Transport) -> bool:
        """Whether a connection is the current one, which this side has not closed."""
        return session is self._session

    def _await_start(self, channel: SSHChannel, process: RemoteProcess, token: str) -> None:
        """Read up to the line that says that the program starts. It has the process group."""
        mark, seen = f"{commands.STARTED} {token} ".encode(), b""
        deadline = Deadline(self.connect_timeout)
        while True:
            before, _, rest = seen.partition(mark)
            group, ended, early = rest.partition(b"\n")
            if ended and group.isdigit():
                channel.group, channel.early = int(group), early
                return
            if len(before) > _MAX_NOISE or len(group) > _MAX_GROUP:
                raise GuestLost(
                    f"the login shell in the guest writes more than {_MAX_NOISE} bytes before the program "
                    "starts",
                    stage="ssh",
                    details=seen[:500].decode(errors="replace"),
                    remedy="let the shell's start files, such as ~/.profile, write nothing",
                )
            try:
                data = process.read(STDOUT, _CHUNK, deadline.remaining())
            except TimeoutError:
                raise GuestLost(
                    f"the guest did not start a program within {deadline.seconds:g} s",
                    stage="ssh",
                    remedy="check whether the guest is overloaded, or the shell's start files take long",
                ) from None
            if not data:
                self._not_started(channel, process.command, seen)
            seen += data

    def _not_started(self, channel: SSHChannel, command: Command, noise: bytes) -> NoReturn:
        channel.wait_for_end(_LINGER_SECONDS)
        if channel.status is None or channel.status < 0:
            self.check()
            raise GuestLost(
                "the connection to the guest broke while a program was started", stage="ssh"
            )
        stderr = b""
        while data := channel.receive(STDERR, _CHUNK):
            stderr += data
        said = stderr.decode(errors="replace"), noise.decode(errors="replace")
        raise commands.could_not_start(command, channel.status, *said)

    def _channel(self, line: str, ahead: bytes = b"") -> Any:
        for attempt in (1, 2):
            session = self._connected()
            try:
                return self._execute(session, os.fsencode(line), ahead)
            except paramiko.ChannelException as error:  # the connection itself works
                raise _lost("the SSH server refuses another channel", error) from error
            except (paramiko.SSHException, OSError, EOFError) as error:
                _close(session)
                self.check()
                if attempt == 2:
                    raise _lost("no command can be started by SSH", error) from error
        raise AssertionError

    def _execute(self, session: _Session, line: bytes, ahead: bytes) -> Any:
        channel: Any = session.open_session(timeout=self.connect_timeout)
        channel.ended_by = None

        def ask() -> None:
            channel.exec_command(line)
            channel.sendall(ahead)

        # paramiko alone would wait for ever.
        if not within(self.connect_timeout, ask, check=self.check):
            raise paramiko.SSHException("no answer to the request to start a program")
        return channel

    def _connected(self) -> _Session:
        with self._lock:
            if self._session is not None and self._session.is_active():
                return self._session
            if self._session is not None:
                _close(self._session)
            self._session = None
            self.check()
            try:
                self._session = self._connect()
            except paramiko.AuthenticationException as error:
                raise commands.cannot_log_in(self.user) from error
            except (paramiko.SSHException, OSError, EOFError) as error:
                self.check()
                raise _lost("the SSH connection failed", error) from error
            return self._session

    def _connect(self) -> _Session:
        timeout = self.connect_timeout
        sock = socket.create_connection(self.address(), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        session = _Session(sock)
        session.set_log_channel(_LOG)
        try:
            session.banner_timeout = session.handshake_timeout = session.auth_timeout = timeout
            self._enter(session)
            session.set_keepalive(_KEEPALIVE_SECONDS)
        except BaseException:
            _close(session)
            raise
        return session

    def _enter(self, session: _Session) -> None:
        """Check the server's key, and log in."""
        session.get_security_options().key_types = ("ssh-ed25519",)
        session.start_client(timeout=self.connect_timeout)
        if _host_key(session) != self.host_key:
            raise paramiko.SSHException(
                "the server has another host key than the image, so another program answers there"
            )
        key = paramiko.Ed25519Key.from_private_key(io.StringIO(self.key.private))
        session.auth_publickey(self.user, key)


@dataclass(kw_only=True, eq=False)
class FirstTransport(SSHTransport):
    """Logs in to a guest whose host key nobody knows yet, and which may know another key than ours.

    The guest is on a network inside QEMU, so nobody else can answer.

    Attributes:
        private_keys: tried one after the other, in a format that OpenSSH reads; `key` is tried last.
        password: tried instead of keys, unless it is empty.
    """

    private_keys: tuple[str, ...] = ()
    password: str = ""

    def _enter(self, session: _Session) -> None:
        session.start_client(timeout=self.connect_timeout)
        if self.password:
            session.auth_password(self.user, self.password)
            return
        refused: paramiko.AuthenticationException | None = None
        for text in (*self.private_keys, self.key.private):
            try:
                session.auth_publickey(self.user, _private_key(text))
            except paramiko.AuthenticationException as error:
                refused = error
            else:
                return
        assert refused is not None
        raise refused


def host_key_at(address: tuple[str, int], timeout: float) -> str:
    """The ed25519 key of the SSH server at `address`, as in ``known_hosts``: type and key.

    Raises:
        GuestLost: there is no such server, or it has no such key.
    """
    session: _Session | None = None
    try:
        session = _Session(socket.create_connection(address, timeout))
        session.set_log_channel(_LOG)
        session.banner_timeout = session.handshake_timeout = timeout
        session.get_security_options().key_types = ("ssh-ed25519",)
        session.start_client(timeout=timeout)
        return _host_key(session)
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise _lost("the SSH server does not show an ed25519 key", error) from error
    finally:
        if session is not None:
            _close(session)


def _host_key(session: _Session) -> str:
    key = session.get_remote_server_key()
    return f"{key.get_name()} {key.get_base64()}"


def _private_key(text: str) -> paramiko.PKey:
    kind = paramiko.RSAKey if "RSA PRIVATE KEY" in text else paramiko.Ed25519Key
    return kind.from_private_key(io.StringIO(text))


class SSHChannel:
    """The streams of a program that was started by SSH: a `Channel` around one of paramiko's.

    Attributes:
        group: the program's process group, once it is known.
        early: output that came together with the process group.
    """

    def __init__(self, transport: SSHTransport, channel: Any) -> None:
        self.quiet_seconds = transport.quiet_seconds
        self.group = 0
        self._transport = transport
        self._channel = channel
        self.early = b""
        self._receive = {STDOUT: channel.recv, STDERR: channel.recv_stderr}
        self._is_ready = {STDOUT: channel.recv_ready, STDERR: channel.recv_stderr_ready}
        channel.settimeout(_LOOK_SECONDS)

    pid = None  # the protocol does not tell it

    @property
    def output_ended(self) -> bool:
        """Whether no more output will come."""
        return bool(self._channel.eof_received or self._channel.closed)

    @property
    def ended(self) -> bool:
        """Whether the program's end is known, or will never be known."""
        return bool(self._channel.status_event.is_set())

    @property
    def status(self) -> int | None:
        """Its exit status (−N: signal N); None if it is unknown."""
        if self._channel.ended_by is not None:
            return -int(self._channel.ended_by)
        return None if self._channel.exit_status == -1 else int(self._channel.exit_status)

    @property
    def is_connected(self) -> bool:
        """Whether its connection is the current one, and works."""
        return not self.was_left and bool(self._channel.get_transport().is_active())

    @property
    def was_left(self) -> bool:
        """Whether this side has closed its connection."""
        return not self._transport.uses(self._channel.get_transport())

    def has_output(self, stream: int) -> bool:
        """Whether `receive` has something of a stream now."""
        return bool((stream == STDOUT and self.early) or self._is_ready[stream]())

    def receive(self, stream: int, size: int) -> bytes:
        """At least a byte of a stream; nothing at its end."""
        if stream == STDOUT and self.early:
            data, self.early = self.early[:size], self.early[size:]
            return data
        return bytes(self._receive[stream](size))

    def send(self, data: memoryview) -> int:
        """Send a part of `data`. Returns the number of bytes."""
        return int(self._channel.send(data))

    def end_input(self) -> None:
        """Close the program's input."""
        self._channel.shutdown_write()

    def wait(self, seconds: float) -> None:
        """Wait for output, or for the program's end."""
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
        """Close the channel. If the guest does not react, close the connection."""
        if not within(_LINGER_SECONDS, self._channel.close):
            _close(self._channel.get_transport())


def _close(session: _Session) -> None:
    session.close()
    session.join(_LINGER_SECONDS)


def _lost(what: str, error: Exception) -> GuestLost:
    return GuestLost(
        f"{what}: {str(error) or type(error).__name__}",
        stage="ssh",
        remedy="look at the last lines of the console. The user must exist in the guest, and its SSH server "
        "must run",
    )
