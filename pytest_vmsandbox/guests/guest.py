"""A running guest, as tests hold it."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import shlex
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self, cast, overload

from pytest_vmsandbox.core.deadline import Deadline, monotonic
from pytest_vmsandbox.core.errors import (
    BootError,
    CommandError,
    CommandTimeout,
    ConfigError,
    GuestLost,
    MonitorError,
    TransferError,
    VMSandboxError,
    add_hints,
)
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.core.transport import Command, CommandResult, RemoteProcess, Transport
from pytest_vmsandbox.guests import listening, script, transfer
from pytest_vmsandbox.guests.access import SSHAccess
from pytest_vmsandbox.guests.process import TextWriter
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.console import Console
from pytest_vmsandbox.machine.machine import Machine

Streams = bytes | str | None
GuestPath = str | os.PathLike[str]  # a PurePosixPath, for instance
_INSTEAD = {  # of what `popen` lacks
    "check": "compare what .wait(timeout) or .poll() returns",
    "timeout": "call .wait(timeout)",
    "input": "write it to .stdin, and close that",
}
_LOG = logging.getLogger("pytest_vmsandbox")
_NOT_FOUND = 127
_POLL_SECONDS = 0.25
_SSH_TRY_SECONDS = 2.0
_LISTENERS_SECONDS = 5.0


class Platform(Protocol):
    """What a guest needs of those who made it."""

    def machine(self) -> Any:
        """A context manager: the guest's machine, switched on."""

    def transport(self, machine: Machine, user: str) -> Transport:
        """A way to run programs in it as a user."""

    def connect(self, path: str) -> RemoteProcess | None:
        """A connection to a Unix socket in the guest; None where there is no way to make one.

        Raises:
            CommandError: nothing listens there.
        """

    def answers(self, machine: Machine, timeout: float) -> bool:
        """Whether the guest can be talked to; waits at most `timeout` seconds."""

    def save(self, machine: Machine) -> Any:
        """The state of the guest now, its memory and its disks; it goes on afterwards.

        Raises:
            MonitorError: QEMU cannot.
            ConfigError: there is no helper in the guest.
        """

    def roll_back(self, saved: Any) -> None:
        """Let the machine go on from a saved state when it is switched on next."""

    def ping(self) -> None:
        """Have the guest's helper answer.

        Raises:
            ConfigError: there is no helper in the guest.
        """

    def close(self) -> None:
        """The guest is over."""

    def pause(self, machine: Machine) -> None:
        """Pause a machine for a while.

        Raises:
            GuestLost: it does not answer.
        """

    def resume(self, machine: Machine) -> None:
        """Let a paused machine go on, with the right time, or the one that was set there."""

    def going_down(self) -> None:
        """The guest restarts, or is switched off: what was known of its programs is void."""

    def ssh_access(self, machine: Machine, user: str) -> SSHAccess:
        """What an SSH client needs to get in as a user.

        Raises:
            GuestLost: the guest does not answer on SSH.
        """


class Guest:
    """A running virtual machine. Made by `GuestFactory.boot`, which ends it.

    Every method that talks to the guest raises `GuestLost` when it is gone. A guest that nobody talks
    to may be paused where many run (see `rest`); whatever is asked of it lets it go on, with the
    right time.

    Attributes:
        name: unique among the guests of this process; also the guest's hostname.
        image: the name of its image.
        spec: its hardware; sizes in bytes.
        origin: how it came to be: ``armed`` (cloned ahead of demand), ``cloned`` (on demand) or
            ``booted``.
        facts: what the last layer of its preparation has told, as values that JSON keeps; empty for
            layers that users have made.
    """

    def __init__(
        self,
        platform: Platform,
        *,
        name: str,
        image: str,
        spec: Hardware,
        boot_timeout: float,
        command_timeout: float,
        hints: Callable[[], Sequence[str]],
        origin: str = "booted",
        on_wake: Callable[[], None] = lambda: None,
        stretch: Callable[[float], float] = float,
    ) -> None:
        self.name = name
        self.image = image
        self.spec = spec
        self.origin = origin
        self.facts: Mapping[str, object] = {}
        self._on_wake = on_wake
        self._resting = False
        self._attended = False  # somebody counts on it that it goes on by itself
        self._busy = 0  # calls that wait for something in it
        self._last_call = monotonic()
        self._rest_lock = threading.RLock()
        self._platform = platform
        self._boot_timeout = boot_timeout
        self._command_timeout = command_timeout
        self._stretch = stretch
        self._hints = hints
        self._machine: Machine | None = None
        self._power = ExitStack()  # what exists while the guest is switched on
        self._transports: dict[str, Transport] = {}
        self._transports_lock = threading.Lock()
        self._processes: list[Process] = []

    def __repr__(self) -> str:
        state = "on" if self._machine is not None else "off"
        return f"<Guest {self.name} image={self.image} {state}>"

    # -- commands -------------------------------------------------------------------------------

    @overload
    def run(self, argv: Sequence[str | os.PathLike[str]], *, check: bool = ...,
            timeout: float | None = ..., input: Streams = ..., cwd: GuestPath | None = ...,
            env: Mapping[str, GuestPath] | None = ..., user: str | None = ...,
            text: Literal[True] = ...) -> CommandResult[str]: ...  # fmt: skip

    @overload
    def run(self, argv: Sequence[str | os.PathLike[str]], *, check: bool = ...,
            timeout: float | None = ..., input: Streams = ..., cwd: GuestPath | None = ...,
            env: Mapping[str, GuestPath] | None = ..., user: str | None = ...,
            text: Literal[False]) -> CommandResult[bytes]: ...  # fmt: skip

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        check: bool = True,
        timeout: float | None = None,
        input: Streams = None,  # noqa: A002  # subprocess.run's name
        cwd: GuestPath | None = None,
        env: Mapping[str, GuestPath] | None = None,
        user: str | None = None,
        text: bool = True,
    ) -> CommandResult[str] | CommandResult[bytes]:
        r"""Run one program to its end; no shell reads its arguments.

        Args:
            argv: the program and its arguments.
            check: raise `CommandError` when it returns non-zero.
            timeout: seconds; None for the setting ``vm_command_timeout``.
            input: for its standard input, which is empty otherwise.
            cwd: the folder it starts in; None for the user's home.
            env: variables added to the user's environment.
            user: who runs it; None for the guest's own.
            text: streams as `str` (UTF-8; what cannot be decoded is replaced), else `bytes`.

        Raises:
            CommandError: it returned non-zero, or the folder or user does not exist.
            CommandTimeout: it was not over in time; its process group was killed.
            OSError: a word has 128 KiB or more, there are more than 65,535 words, or all together
                take about 2 MiB («Argument list too long», as of `subprocess`).
            TypeError: a word, the folder or a variable is neither a `str` nor a path.

        A program that leaves something in the background which holds its streams open is over
        when it is itself over, and nothing more has come for half a second.

        Example::

            >>> vm.run(["uname", "-s"]).stdout
            'Linux\n'
        """
        command = self._command(argv, cwd=cwd, env=env, user=user)
        data = input.encode() if isinstance(input, str) else input
        stdout, stderr = bytearray(), bytearray()
        started = monotonic()
        with self._explained():
            try:
                status = self.stream(
                    command,
                    stdin=None if data is None else io.BytesIO(data),
                    stdout=stdout.extend,
                    stderr=stderr.extend,
                    timeout=timeout,
                )
            except CommandTimeout as late:
                raise CommandTimeout(
                    late.brief,
                    seconds=late.seconds,
                    stdout=bytes(stdout),
                    stderr=bytes(stderr),
                    remedy="give it more with timeout=…, or vm_command_timeout for all",
                ) from late
            result: CommandResult[str] | CommandResult[bytes]
            values: dict[str, Any] = {
                "argv": command.argv,
                "returncode": status,
                "duration": monotonic() - started,
            }
            if text:
                result = CommandResult(
                    stdout=stdout.decode(errors="replace"),
                    stderr=stderr.decode(errors="replace"),
                    **values,
                )
            else:
                result = CommandResult(stdout=bytes(stdout), stderr=bytes(stderr), **values)
            if check and status != 0:
                raise _command_error(result)
            return result

    @overload
    def shell(self, script: str, *, check: bool = ..., timeout: float | None = ...,
              input: Streams = ..., cwd: GuestPath | None = ..., env: Mapping[str, GuestPath] | None = ...,
              user: str | None = ..., text: Literal[True] = ...,
              ) -> CommandResult[str]: ...  # fmt: skip

    @overload
    def shell(self, script: str, *, check: bool = ..., timeout: float | None = ...,
              input: Streams = ..., cwd: GuestPath | None = ..., env: Mapping[str, GuestPath] | None = ...,
              user: str | None = ..., text: Literal[False]) -> CommandResult[bytes]: ...  # fmt: skip

    def shell(self, script: str, **same: Any) -> CommandResult[str] | CommandResult[bytes]:
        r"""Run a script with the guest's ``/bin/sh``; the arguments are those of `run`.

        Example::

            >>> vm.shell("echo $((6 * 7)) | tr 4 '>'").stdout
            '>2\n'
        """
        if not isinstance(script, str):
            raise TypeError(f"a script is a str, not {type(script).__name__}; vm.run() takes lists")
        return self.run(["/bin/sh", "-c", script], **same)

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        check: None = None,
        timeout: None = None,
        input: None = None,  # noqa: A002  # subprocess.run's name
        cwd: GuestPath | None = None,
        env: Mapping[str, GuestPath] | None = None,
        user: str | None = None,
        text: bool = True,
    ) -> Process:
        """Start a program and leave it running; the arguments are those of `run`.

        It ends with the guest at the latest. Whoever starts a program that writes much has to
        read its streams, or it stops when two MiB wait to be read.

        Args:
            check, timeout, input: only `run`, which waits for the program's end, has these.

        Raises:
            CommandError: the folder or the user does not exist.
            ConfigError: it was given one of those.
        """
        for name, value in (("check", check), ("timeout", timeout), ("input", input)):
            if value is not None:
                raise ConfigError(
                    f"popen does not wait for the program's end, so it has no {name}=",
                    remedy=_INSTEAD[name],
                )
        with self._explained():
            command = self._command(argv, cwd=cwd, env=env, user=user)
            process = Process(self.start(command), command.argv, text=text)
            self._processes.append(process)  # it goes on also if the caller forgets it
            return process

    def stream(
        self,
        command: Command,
        *,
        stdin: IO[bytes] | None = None,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        timeout: float | None = None,
        idle: float = math.inf,
    ) -> int:
        """Run a program with its streams passed on as they come; its exit status is returned."""
        with self._in_use():
            process = self._start(command)
            try:
                return process.communicate(
                    stdin,  # type: ignore[arg-type]
                    stdout,
                    stderr,
                    self._command_seconds if timeout is None else _seconds(timeout),
                    idle,
                )
            finally:
                process.close()

    def start(self, command: Command) -> RemoteProcess:
        """Start a program, on streams that its starter reads and closes.

        It runs as its user: root becomes another one, anybody else logs in as them.

        Raises:
            CommandError: the folder or the user does not exist.
        """
        self._attended = True
        return self._start(command)

    def _start(self, command: Command) -> RemoteProcess:
        machine = self._on()
        machine.check()
        login = self.spec.user
        if command.user is not None and login != "root":
            login, command = command.user, replace(command, user=None)
        with self._transports_lock:
            if login not in self._transports:
                self._transports[login] = self._platform.transport(machine, login)
            transport = self._transports[login]
        return transport.start(command)

    def connect(self, path: str) -> RemoteProcess | None:
        """A connection to a Unix socket in the guest, as the streams of a program.

        Returns:
            None where there is no way but a program that relays them.

        Raises:
            CommandError: nothing listens there.
        """
        self._attended = True
        self._on().check()
        return self._platform.connect(path)

    def wait_until(self, argv: Sequence[str | os.PathLike[str]], *, timeout: float) -> None:
        """Run a program again and again until it returns 0.

        Args:
            argv: the program and its arguments.
            timeout: seconds for all the tries together.

        Raises:
            CommandTimeout: it did not; the text has the last try's streams.
        """
        deadline = Deadline(_seconds(timeout))
        last: CommandResult[bytes] | None = None
        while True:
            try:
                last = self.run(
                    argv, check=False, text=False, timeout=max(deadline.remaining(), 1.0)
                )
            except CommandTimeout as late:
                raise CommandTimeout(
                    f"{argv[0]} did not return in {timeout:g} s of wait_until",
                    seconds=timeout,
                    stdout=late.stdout,
                    stderr=late.stderr,
                ) from late
            if last.returncode == 0:
                return
            if deadline.expired:
                raise CommandTimeout(
                    f"{shlex.join(os.fspath(it) for it in argv)} did not return 0 within {timeout:g} s; "
                    f"the last try returned {last.returncode}",
                    seconds=timeout,
                    stdout=last.stdout,
                    stderr=last.stderr,
                )
            deadline.pause(_POLL_SECONDS)

    # -- files ----------------------------------------------------------------------------------

    def push(self, source: str | os.PathLike[str], dest: GuestPath) -> None:
        """Copy a file or a tree into the guest.

        `dest` names the copy. A file goes into `dest` if that is a folder; a tree is merged into
        `dest` if that is there. A `dest` that ends in ``/`` is a folder to put the copy into.
        Missing folders are made. If `source` is a link, what it points to is copied.

        Modes (with setuid bits), times, holes, and the links in a tree stay; the owner is the
        guest's user. A file takes its place at once, whole. It is written in place where no file
        can be made beside it (`/proc`, `/sys`, a read-only folder), and to a device; then only the
        content is copied. If `dest` is a link, the file that it points to is written.

        A tree may change meanwhile: it is copied as it was read. Pipes, sockets and devices in it
        are left out, with one warning.

        Raises:
            TransferError: `source` does not exist, or the guest cannot take it.
        """
        with self._explained():
            left_out = transfer.push(self._stream_script, Path(source), transfer.guest_path(dest))
        _warn_of("pushed", source, left_out)

    def pull(self, source: GuestPath, dest: str | os.PathLike[str]) -> None:
        """Copy a file or a tree out of the guest; `dest` is understood as in `push`.

        Symbolic links are copied as links, never followed. Modes and times stay, and long runs of
        zeros become holes. A setuid bit stays if no other user of this machine can enter the folder
        of `dest`.

        A file is read to its end, also one that grows, or one of `/proc`. A tree may change
        meanwhile: it is copied as it was read. Pipes, sockets and devices in it, and setuid bits
        that do not stay, are left out, with one warning.

        Raises:
            TransferError: `source` does not exist, or `dest` cannot be written.
        """
        with self._explained():
            left_out = transfer.pull(self._stream_script, transfer.guest_path(source), dest)
        _warn_of("pulled", source, left_out)

    def stream_script(
        self,
        script: str,
        *,
        stdin: IO[bytes] | None = None,
        stdout: Callable[[bytes], object] | None = None,
    ) -> None:
        """Run a script with the guest's ``/bin/sh``, its streams passed on as they come.

        It has all the time it needs as long as something moves: `CommandTimeout` comes when
        nothing went either way for the seconds of ``vm_command_timeout``.

        Raises:
            CommandError: it returned non-zero.
        """
        with self._explained():
            self._stream_script(script, stdin=stdin, stdout=stdout)

    def read_text(self, path: GuestPath) -> str:
        """The content of a file in the guest, as UTF-8.

        Raises:
            TransferError: it cannot be read.
        """
        with self._explained():
            name = transfer.guest_path(path)
            try:
                return self.run(["cat", transfer.anchored(name)], text=False).stdout.decode()
            except CommandError as error:
                raise transfer.refused(f"{name} cannot be read", error) from error
            except UnicodeDecodeError as error:
                raise TransferError(
                    f"{name} is not UTF-8: {error}", remedy="vm.pull() copies any file"
                ) from error

    def write_text(self, path: GuestPath, text: str) -> None:
        """Write a file in the guest, as UTF-8; missing folders are made.

        A file that is there keeps its mode and its owner; a new one has mode 0644. A file takes its
        place at once, whole. It is written in place where no file can be made beside it (`/proc`,
        `/sys`, a read-only folder), and to a device. If `path` is a link, the file that it points
        to is written.

        Raises:
            TransferError: it cannot be written.
            TypeError: `text` is no `str`.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"a text is a str, not {type(text).__name__}; vm.push() copies any file"
            )
        with self._explained():
            name = transfer.guest_path(path)
            try:
                transfer.push_text(self._stream_script, text, name)
            except CommandError as error:
                raise transfer.refused(f"{name} cannot be written", error) from error

    # -- power ----------------------------------------------------------------------------------

    def reboot(self, *, timeout: float | None = None) -> None:
        """Restart in an orderly way, and wait until the guest answers again.

        Args:
            timeout: seconds for going down and coming up; None for twice the boot time-out.

        Raises:
            BootError: it did not come back.
        """
        deadline = Deadline(2 * self._boot_seconds if timeout is None else _seconds(timeout))
        with self._explained():
            machine = self._on()
            since = len(machine.monitor.events())
            lost = self._ask("reboot")
            while machine.monitor.wait_event("RESET", since=since, timeout=_POLL_SECONDS) is None:
                self._check()
                if deadline.expired:
                    raise BootError(
                        f"{self.name} did not go down to reboot",
                        stage="init",
                        seconds=deadline.elapsed,
                        details=machine.console.tail(),
                    ) from lost
            machine.console.begin_boot()
            self._hang_up()
            self._await_answer(machine, deadline)

    def power_off(self) -> None:
        """Switch off in an orderly way. A guest that is not off after the boot time-out is ended.

        Raises:
            CommandError: it refuses to go down.
        """
        with self._explained():
            machine = self._on()
            self._ask("poweroff")
            machine.end(self._boot_seconds)
            self._switch_off()

    def power_cut(self) -> None:
        """Pull the plug: what the guest had not yet written to its disk is lost."""
        with self._explained():
            self._on().kill()
            self._switch_off()

    def power_on(self) -> None:
        """Switch on again, with the disks as they were, and wait until the guest answers.

        Raises:
            ConfigError: it is on.
            BootError: it did not come up.
        """
        if self._machine is not None and self._machine.ended() is None:
            raise ConfigError(f"{self.name} is on", remedy="vm.power_off() or vm.power_cut() first")
        self._switch_off()
        with self._explained():
            self._switch_on()

    def snapshot(self) -> AbstractContextManager[None]:
        """Roll memory and disks back at the end of the context to what they are now.

        That is done however the context ends, also for a guest that was lost or switched off in it.
        Contexts may lie in each other. What runs in the guest then is what runs now, with the right
        time and random numbers of its own. A clock that was set to another time, by two seconds or more,
        stays as far from this host's. Connections are made anew: a process of `popen` goes on in
        the guest, but is no longer heard of, and a port that was forwarded has to be forwarded again.

        Raises:
            ConfigError: there is no helper in the guest, so its time could not be set right.
            MonitorError: the state of the guest cannot be saved.
            LaunchError: at the end; this host has no room for all of the guest's memory.

        Example::

            with vm.snapshot():
                vm.run(["rm", "-rf", "/etc"])
            vm.run(["ls", "/etc"])
        """
        return _Snapshot(self._save, self._roll_back)

    def _save(self) -> tuple[Any, bool]:
        with self._explained():
            return self._platform.save(self._on()), self._attended

    def _roll_back(self, saved: tuple[Any, bool]) -> None:
        with self._explained():
            self._switch_off()
            self._platform.roll_back(saved[0])
            self._switch_on()
            self._attended = saved[1]  # what was started before goes on

    # -- from outside ---------------------------------------------------------------------------

    def forward(
        self,
        port: int,
        *,
        protocol: listening.Protocol = "tcp",
        timeout: float | None = None,
    ) -> tuple[str, int]:
        """A loopback address of this host that reaches a port of the guest.

        It works for an isolated guest too, but for UDP. The guest's service has to listen on its
        network address (``0.0.0.0``), not only on its own loopback. It ends with the guest's power, and with a
        snapshot that is rolled back.

        QEMU takes every connection at once, also for a port where nothing listens. Such a
        connection ends without a byte, so it is better not made: see `timeout`. Without it, such a
        port is told in the log (a failed test shows it), and may be used later.

        Args:
            port: of the guest.
            protocol: ``tcp`` or ``udp``.
            timeout: seconds to wait until a service of the guest listens; 0 to look once.

        Returns:
            Address and port, as `socket.create_connection` takes them; the same ones if asked again.

        Raises:
            ConnectionRefusedError: nothing listens there within `timeout` seconds.
            ConfigError: `port` or `protocol` is none, or UDP is wanted of an isolated guest.
            MonitorError: QEMU cannot.
        """
        if protocol not in ("tcp", "udp"):
            raise ConfigError(f"protocol={protocol!r} is unknown", remedy="use 'tcp' or 'udp'")
        if not _is_number(port, int) or not 1 <= port <= 65535:
            raise ConfigError(f"{port!r} is not a {protocol.upper()} port", remedy="use 1 to 65535")
        if protocol == "udp" and self.spec.network == "isolated":
            raise ConfigError(
                f"UDP does not reach {self.name}: QEMU drops what an isolated guest answers",
                remedy="give it network='nat', or use TCP",
            )
        deadline = Deadline(0 if timeout is None else _seconds(timeout))
        self._attended = True
        with self._explained():
            here = self._on().forward(port, protocol)
            while refusal := self._refusal(port, protocol):
                if timeout is None:
                    _LOG.warning("%s: a connection to %s:%d ends at once", refusal, *here)
                    break
                if deadline.expired:
                    raise ConnectionRefusedError(errno.ECONNREFUSED, refusal)
                deadline.pause(_POLL_SECONDS)
            return here

    def _refusal(self, port: int, protocol: listening.Protocol) -> str:
        """Why a connection to a port would be refused; empty if it would not, or who knows."""
        try:
            seconds = self._stretch(_LISTENERS_SECONDS)
            table = self.run(
                ["cat", *listening.files(protocol)], check=False, timeout=seconds
            ).stdout
        except (CommandError, CommandTimeout):
            return ""
        found = listening.addresses(table, port, protocol)
        if not table or any(map(listening.is_reached, found)):
            return ""
        text = f"nothing listens on {protocol.upper()} port {port} of {self.name}"
        if found:
            text += f" but on {found[0]}, which no network reaches; have it listen on 0.0.0.0"
        return text

    @property
    def alive(self) -> bool:
        """Whether it is switched on and has neither ended nor panicked."""
        return self.loss is None

    @property
    def loss(self) -> GuestLost | None:
        """Why it is gone; None if it is alive."""
        try:
            self._check()
        except GuestLost as lost:
            return lost
        return None

    @property
    def console(self) -> Console:
        """The serial console since the guest was last switched on."""
        return self._on().console

    def screenshot(self, path: str | os.PathLike[str]) -> None:
        """Save the display to a file, as PNG.

        Raises:
            MonitorError: QEMU cannot (before 7.1, or built without PNG). Nothing is written then.
            OSError: `path` cannot be written.
        """
        with self._explained(), tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:
            picture = Path(folder, "picture")
            with picture.open("wb") as file:
                self._on().screenshot(file)
            data = picture.read_bytes()
            if not data:
                raise MonitorError("QEMU has written no picture")
        Path(path).write_bytes(data)

    def qmp(self, command: str, **arguments: object) -> Any:
        """Execute a command of the QEMU machine protocol, and return its answer.

        Raises:
            MonitorError: QEMU refused it; `error_class` has the protocol's class.

        Example::

            >>> vm.qmp("query-status")["status"]
            'running'
        """
        with self._explained():
            return self._on().execute(command, arguments)

    @property
    def ssh(self) -> SSHAccess:
        """What other tools need to get in: address, port, user, and the files with the keys.

        It is true as long as the guest is switched on, and until a snapshot is rolled back.

        Raises:
            GuestLost: it does not answer on SSH.
        """
        self._attended = True
        with self._explained():
            return self._platform.ssh_access(self._on(), self.spec.user)

    @property
    def ssh_command(self) -> str:
        """The line that a person types to get in, likewise.

        Raises:
            GuestLost: it does not answer on SSH.
        """
        return self.ssh.command

    def ssh_config(self, path: str | os.PathLike[str]) -> None:
        """Write a configuration of OpenSSH for other tools, in which the guest is called by its name.

        Raises:
            GuestLost: it does not answer on SSH.
            OSError: `path` cannot be written.

        Example::

            vm.ssh_config("ssh_config")
            subprocess.run(["scp", "-F", "ssh_config", f"{vm.name}:/etc/hostname", "."], check=True)
        """
        Path(path).write_text(self.ssh.config(self.name), encoding="utf-8")

    # -- for those who made it ------------------------------------------------------------------

    @property
    def idle_seconds(self) -> float:
        """How long nobody has asked it for anything; 0 where it must not be paused.

        That is so while a call waits, and once something was started in it that goes on, or a port
        of it is open.
        """
        if self._machine is None or self._resting or self._attended or self._busy:
            return 0.0
        return monotonic() - self._last_call

    def rest(self) -> None:
        """Pause it until somebody asks it for something, if nobody minds; see `idle_seconds`."""
        with self._rest_lock:
            if self.idle_seconds and self._machine is not None:
                self._platform.pause(self._machine)
                self._resting = True

    @property
    def resting(self) -> bool:
        """Whether it is paused until somebody asks it for something."""
        return self._resting

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._rest_lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._rest_lock:
                self._busy -= 1
                self._last_call = monotonic()

    @property
    def processor_seconds(self) -> float:
        """Processor time, in seconds, that it has taken of this host since it was switched on."""
        return host.processor_seconds(self.pid)

    @property
    def pid(self) -> int:
        """The process number of its QEMU; it may go on resting."""
        return (self._machine or self._on()).process.pid

    def ping(self) -> None:
        """Have its helper answer, which does nothing else.

        Raises:
            ConfigError: there is no helper in the guest.
        """
        with self._explained(), self._in_use():
            self._on().check()
            self._platform.ping()

    def seal(self, state: IO[bytes]) -> None:
        """Write the state of its devices to an open file, and end it; its memory is a file.

        Nobody is connected to it then.

        Raises:
            MonitorError: QEMU cannot.
        """
        machine = self._on()
        self._hang_up()
        machine.save(state, with_memory=False)
        machine.end(0)

    @property
    def _boot_seconds(self) -> float:
        """The limit on a boot, as far as it is known how slow this host is."""
        return self._stretch(self._boot_timeout)

    @property
    def _command_seconds(self) -> float:
        """The limit on a command that names none, likewise."""
        return self._stretch(self._command_timeout)

    def __enter__(self) -> Self:
        with self._explained():
            self._switch_on()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._switch_off()
        finally:
            self._platform.close()

    def _switch_on(self) -> None:
        with ExitStack() as stack:
            machine = stack.enter_context(self._platform.machine())
            deadline = Deadline(self._boot_seconds)  # QEMU's start has shown how slow this host is
            stack.callback(self._hang_up)
            self._machine = machine
            try:
                self._await_answer(machine, deadline)
            except BaseException:
                self._machine = None
                raise
            self._power = stack.pop_all()

    def _switch_off(self) -> None:
        self._machine = None
        self._resting = self._attended = False
        power, self._power = self._power, ExitStack()
        power.close()

    def _await_answer(self, machine: Machine, deadline: Deadline) -> None:
        while not self._platform.answers(machine, deadline.remaining(_SSH_TRY_SECONDS)):
            try:
                machine.check()
                machine.check_booting()
            except GuestLost as lost:
                raise machine.boot_error(lost, deadline.elapsed) from lost
            if deadline.expired:
                raise BootError(
                    f"{self.name} did not answer on SSH within {deadline.seconds:g} s; "
                    f"it got as far as: {machine.stage}",
                    stage=machine.stage,
                    seconds=deadline.seconds,
                    details=f"--- last lines of the console\n{machine.console.tail()}",
                    remedy="allow more time: --vm-boot-timeout (pytest), --boot-timeout (vmsandbox)",
                )
            deadline.pause(0.05)

    def _hang_up(self) -> None:
        self._processes.clear()
        while self._transports:
            self._transports.popitem()[1].close()
        self._platform.going_down()

    def _on(self) -> Machine:
        if self._machine is None:
            raise GuestLost(f"{self.name} is switched off", remedy="vm.power_on() switches it on")
        self._last_call = monotonic()
        if self._resting:
            with self._rest_lock:
                if self._resting:
                    self._platform.resume(self._machine)
                    self._resting = False
            self._on_wake()
        return self._machine

    def _check(self) -> None:
        self._on().check()

    def _command(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        cwd: GuestPath | None,
        env: Mapping[str, GuestPath] | None,
        user: str | None,
    ) -> Command:
        if isinstance(argv, str | bytes):
            raise TypeError("argv is a list of words; vm.shell() takes a script")
        words = tuple(script.word(word, "a word of argv") for word in argv)
        if not words:
            raise ValueError("argv is empty")
        if user is not None and not isinstance(user, str):
            raise TypeError(f"user is the name of one, a str, not {type(user).__name__}")
        return Command(
            argv=words,
            cwd=None if cwd is None else script.word(cwd, "cwd"),
            env={
                script.word(name, "the name of a variable"): script.word(value, f"env[{name!r}]")
                for name, value in (env or {}).items()
            },
            user=None if user == self.spec.user else user,
        )

    def _stream_script(
        self,
        script: str,
        *,
        stdin: IO[bytes] | None = None,
        stdout: Callable[[bytes], object] | None = None,
    ) -> str:
        written, stderr = bytearray(), bytearray()
        argv = ("/bin/sh", "-c", script)
        started = monotonic()
        status = self.stream(
            Command(argv=argv),
            stdin=stdin,
            stdout=stdout or written.extend,
            stderr=stderr.extend,
            timeout=math.inf,  # as long as something moves
            idle=self._command_seconds,
        )
        said = stderr.decode(errors="replace")
        if status != 0:
            raise _command_error(
                CommandResult(
                    argv=argv,
                    returncode=status,
                    stdout=written.decode(errors="replace"),
                    stderr=said,
                    duration=monotonic() - started,
                )
            )
        return said

    def _ask(self, program: str) -> GuestLost | None:
        """Ask the guest to go down; the connection may break before it answers.

        Returns:
            How the connection broke, for whom waits in vain; None if there was an answer.

        Raises:
            CommandError: the guest cannot go down.
        """
        try:
            result = self.run([program], check=False, user="root", timeout=self._command_seconds)
        except GuestLost as lost:
            return lost
        if result.returncode > 0:  # ended by a signal, it is one of the first to go
            raise _command_error(result)
        return None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Add to errors of the guest what its maker knows: where the artifacts are, and so on."""
        try:
            yield
        except VMSandboxError as error:
            add_hints(error, self._hints)
            raise


class _Snapshot:
    """What `Guest.snapshot` returns: no generator, which would roll back when it is dropped."""

    def __init__(self, save: Callable[[], Any], roll_back: Callable[[Any], None]) -> None:
        self._save = save
        self._roll_back = roll_back
        self._saved: Any = None

    def __enter__(self) -> None:
        self._saved = self._save()

    def __exit__(self, *_: object) -> None:
        self._roll_back(self._saved)


class Process:
    """A program that was started and left running; made by `Guest.popen`.

    Attributes:
        argv: the program and its arguments.
        stdin, stdout, stderr: its streams, text or bytes as `popen` was told.
    """

    def __init__(self, remote: RemoteProcess, argv: tuple[str, ...], *, text: bool) -> None:
        self._remote = remote
        self.argv = argv
        self.stdin = cast("IO[Any]", remote.stdin)
        self.stdout = cast("IO[Any]", remote.stdout)
        self.stderr = cast("IO[Any]", remote.stderr)
        if text:
            self.stdin = TextWriter(self.stdin, encoding="utf-8", write_through=True)
            self.stdout = io.TextIOWrapper(self.stdout, encoding="utf-8", errors="replace")
            self.stderr = io.TextIOWrapper(self.stderr, encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """Its exit status (−N: signal N), or None while it runs."""
        return self._remote.poll()

    def wait(self, timeout: float) -> int:
        """Wait for its end, at most `timeout` seconds; its exit status.

        Raises:
            CommandTimeout: it still runs, and is left running.
        """
        return self._remote.wait(_seconds(timeout))

    def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        self._remote.signal("TERM")

    def kill(self) -> None:
        """Send SIGKILL to its process group."""
        self._remote.signal("KILL")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            self.kill()
        self._remote.close()


def _warn_of(what: str, source: str | os.PathLike[str], left_out: Sequence[str]) -> None:
    """Warn whoever called the method that calls this, if something was left out."""
    if left_out:
        text = f"{os.fspath(source)} was {what} without {transfer.in_words(left_out)}"
        warnings.warn(text, stacklevel=3)


def _is_number(value: object, *kinds: type) -> bool:
    """Whether it is of one of `kinds`; True and False are no numbers here."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _seconds(timeout: float) -> float:
    if not _is_number(timeout, int, float) or not timeout >= 0:
        raise ConfigError(f"timeout={timeout!r} is not a number of seconds")
    return float(timeout)


def _command_error(result: CommandResult[str] | CommandResult[bytes]) -> CommandError:
    program, remedy = result.argv[0], ""
    brief = f"{shlex.join(result.argv)} returned {result.returncode}"
    if len(brief) > 500:  # a script; its first line is enough
        brief = f"{brief[:500]}… returned {result.returncode}"
    text = (
        result.stderr if isinstance(result.stderr, str) else result.stderr.decode(errors="replace")
    )
    if result.returncode == _NOT_FOUND and program in text:
        brief = f"command not found in the guest: {program}"
        remedy = "install it in the guest, or push it there; vm.shell() runs shell scripts"
    return CommandError(brief, result=result, remedy=remedy)
