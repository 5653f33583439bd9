"""A running guest, as tests use it."""

from __future__ import annotations

import io
import os
import shlex
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, overload

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import CommandResult, CommandTimeout, ConfigError, MonitorError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests import commands, forwarding, transfer
from pytest_vmsandbox.guests.access import SSHAccess
from pytest_vmsandbox.guests.commands import StrPath
from pytest_vmsandbox.guests.engine import Engine
from pytest_vmsandbox.guests.machines import Saved
from pytest_vmsandbox.guests.process import Process
from pytest_vmsandbox.machine.console import Console

Streams = bytes | str | None
_INSTEAD = {  # what to do instead of the arguments that `popen` does not take
    "check": "check the result of .wait(timeout) or .poll()",
    "timeout": "call .wait(timeout)",
    "input": "write to .stdin, and close it",
}
_POLL_SECONDS = 0.25


class Guest:
    """A running virtual machine. Made by `GuestFactory.boot`, which ends it.

    Every method that talks to the guest raises `GuestLost` when it is gone.

    Methods may be called from any thread, also several at a time. A call that waits does not keep
    others waiting; when one of them takes the guest's power away, those that wait raise `GuestLost`.
    Snapshots of several threads must not overlap.

    Where many guests run, one that nobody uses may be paused; the next call lets it go on, with the
    right time. A guest is in use while a call waits for something in it. It is never paused again,
    until it is switched off, once something of it is used without a call: after `popen`, `forward`,
    `ssh`, `ssh_command`, `ssh_config`, `console` and `qmp`.

    Attributes:
        name: unique among the guests of this process; also the guest's hostname.
        image: the name of its image.
        engine: what it runs on. No part of the public interface: it changes without notice.
    """

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self.image = engine.image
        self.engine = engine

    def __repr__(self) -> str:
        state = "on" if self.engine.is_on else "off"
        return f"<Guest {self.name} image={self.image} {state}>"

    @property
    def spec(self) -> Hardware:
        """Its hardware; sizes in bytes."""
        return self.engine.spec

    @property
    def alive(self) -> bool:
        """Whether it is switched on and has neither ended nor panicked."""
        return self.engine.loss is None

    # -- commands -------------------------------------------------------------------------------

    @overload
    def run(self, argv: Sequence[StrPath], *, check: bool = ..., timeout: float | None = ...,
            input: Streams = ..., cwd: StrPath | None = ..., env: Mapping[str, StrPath] | None = ...,
            user: str | None = ..., text: Literal[True] = ...) -> CommandResult[str]: ...  # fmt: skip

    @overload
    def run(self, argv: Sequence[StrPath], *, check: bool = ..., timeout: float | None = ...,
            input: Streams = ..., cwd: StrPath | None = ..., env: Mapping[str, StrPath] | None = ...,
            user: str | None = ..., text: Literal[False]) -> CommandResult[bytes]: ...  # fmt: skip

    def run(
        self,
        argv: Sequence[StrPath],
        *,
        check: bool = True,
        timeout: float | None = None,
        input: Streams = None,  # noqa: A002  # subprocess.run's name
        cwd: StrPath | None = None,
        env: Mapping[str, StrPath] | None = None,
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
        data = input.encode() if isinstance(input, str) else input
        with self.engine.explained():
            command = commands.command(argv, cwd=cwd, env=env, user=user)
            done = self.engine.run(
                command,
                stdin=None if data is None else io.BytesIO(data),
                timeout=None if timeout is None else commands.seconds(timeout),
            )
            result = commands.text_of(done) if text else done
            if check:
                commands.check_status(result)
            return result

    @overload
    def shell(self, script: str, *, check: bool = ..., timeout: float | None = ...,
              input: Streams = ..., cwd: StrPath | None = ..., env: Mapping[str, StrPath] | None = ...,
              user: str | None = ..., text: Literal[True] = ...) -> CommandResult[str]: ...  # fmt: skip

    @overload
    def shell(self, script: str, *, check: bool = ..., timeout: float | None = ...,
              input: Streams = ..., cwd: StrPath | None = ..., env: Mapping[str, StrPath] | None = ...,
              user: str | None = ..., text: Literal[False]) -> CommandResult[bytes]: ...  # fmt: skip

    def shell(self, script: str, **same: Any) -> CommandResult[str] | CommandResult[bytes]:
        r"""Run a script with the guest's ``/bin/sh``; the arguments are those of `run`.

        Example::

            >>> vm.shell("echo $((6 * 7)) | tr 4 '>'").stdout
            '>2\n'
        """
        if not isinstance(script, str):
            raise TypeError(
                f"a script must be a str, not {type(script).__name__}; for a list of words, use vm.run()"
            )
        return self.run(["/bin/sh", "-c", script], **same)

    def popen(
        self,
        argv: Sequence[StrPath],
        *,
        check: None = None,
        timeout: None = None,
        input: None = None,  # noqa: A002  # subprocess.run's name
        cwd: StrPath | None = None,
        env: Mapping[str, StrPath] | None = None,
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
                    f"popen takes no {name}=, because it does not wait for the program",
                    remedy=_INSTEAD[name],
                )
        with self.engine.explained():
            command = commands.command(argv, cwd=cwd, env=env, user=user)
            return Process(self.engine.start(command), command.argv, text=text)

    def wait_until(self, argv: Sequence[StrPath], *, timeout: float) -> None:
        """Run a program again and again until it returns 0.

        Args:
            argv: the program and its arguments.
            timeout: seconds for all the tries together.

        Raises:
            CommandTimeout: it did not; the text has the last try's streams.
        """
        deadline = Deadline(commands.seconds(timeout))
        while True:
            last: CommandResult[bytes] | CommandTimeout
            try:
                last = self.run(
                    argv, check=False, text=False, timeout=max(deadline.remaining(), 1.0)
                )
                if last.returncode == 0:
                    return
                how = f"returned {last.returncode}"
            except CommandTimeout as late:
                last, how = late, "did not end"
            if deadline.expired:
                program = shlex.join(os.fspath(word) for word in argv)
                raise CommandTimeout(
                    f"{program} did not return 0 within {timeout:g} s; the last try {how}",
                    seconds=timeout,
                    stdout=last.stdout,
                    stderr=last.stderr,
                )
            deadline.pause(_POLL_SECONDS)

    # -- files ----------------------------------------------------------------------------------

    def push(self, source: StrPath, dest: StrPath) -> None:
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
        with self.engine.explained():
            left_out = transfer.push(self.engine.stream_script, Path(source), dest)
        _warn_of("pushed", source, left_out)

    def pull(self, source: StrPath, dest: StrPath) -> None:
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
        with self.engine.explained():
            left_out = transfer.pull(self.engine.stream_script, source, dest)
        _warn_of("pulled", source, left_out)

    def read_text(self, path: StrPath) -> str:
        """The content of a file in the guest, as UTF-8.

        Raises:
            TransferError: it cannot be read, has more than 256 MiB, or is a pipe or a device.
        """
        with self.engine.explained():
            return transfer.read_text(self.engine.stream_script, path)

    def write_text(self, path: StrPath, text: str) -> None:
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
                f"text must be a str, not {type(text).__name__}; to copy any file, use vm.push()"
            )
        with self.engine.explained():
            transfer.write_text(self.engine.stream_script, path, text)

    # -- power ----------------------------------------------------------------------------------

    def reboot(self, *, timeout: float | None = None) -> None:
        """Restart in an orderly way, and wait until the guest answers again.

        Args:
            timeout: seconds for going down and coming up; None for twice the boot time-out.

        Raises:
            BootError: it did not come back.
        """
        deadline = Deadline(
            2 * self.engine.boot_seconds if timeout is None else commands.seconds(timeout)
        )
        with self.engine.explained():
            self.engine.reboot(deadline)

    def power_off(self) -> None:
        """Switch off in an orderly way. A guest that is not off after the boot time-out is ended.

        Raises:
            CommandError: it refuses to go down.
        """
        with self.engine.explained():
            self.engine.power_off()

    def power_cut(self) -> None:
        """Pull the plug: what the guest had not yet written to its disk is lost."""
        with self.engine.explained():
            self.engine.power_cut()

    def power_on(self) -> None:
        """Switch on again, with the disks as they were, and wait until the guest answers.

        Raises:
            ConfigError: it is on.
            BootError: it did not come up.
        """
        with self.engine.explained():
            self.engine.power_on()

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
        return _Snapshot(self.engine)

    # -- from outside ---------------------------------------------------------------------------

    def forward(
        self,
        port: int,
        *,
        protocol: forwarding.Protocol = "tcp",
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
        with self.engine.explained():
            return forwarding.forward(self.engine, port, protocol, timeout)

    @property
    def console(self) -> Console:
        """The serial console since the guest was last switched on."""
        with self.engine.use(hold=True) as running:
            return running.machine.console

    def screenshot(self, path: StrPath) -> None:
        """Save the display to a file, as PNG.

        Raises:
            MonitorError: QEMU cannot (before 7.1, or built without PNG). Nothing is written then.
            OSError: `path` cannot be written.
        """
        with self.engine.explained(), tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:
            picture = Path(folder, "picture")
            with picture.open("wb") as file, self.engine.use() as running:
                running.machine.screenshot(file)
            data = picture.read_bytes()
            if not data:
                raise MonitorError(
                    "QEMU has written an empty screenshot",
                    remedy="use QEMU 7.1 or newer, built with PNG support",
                )
        Path(path).write_bytes(data)

    def qmp(self, command: str, **arguments: object) -> Any:
        """Execute a command of the QEMU machine protocol, and return its answer.

        Raises:
            MonitorError: QEMU refused it; `error_class` has the protocol's class.

        Example::

            >>> vm.qmp("query-status")["status"]
            'running'
        """
        with self.engine.explained(), self.engine.use(hold=True) as running:
            return running.machine.execute(command, arguments)

    @property
    def ssh(self) -> SSHAccess:
        """What other tools need to get in: address, port, user, and the files with the keys.

        It is true as long as the guest is switched on, and until a snapshot is rolled back.

        Raises:
            GuestLost: it does not answer on SSH.
        """
        with self.engine.explained():
            return self.engine.ssh_access()

    @property
    def ssh_command(self) -> str:
        """The line that a person types to get in, likewise.

        Raises:
            GuestLost: it does not answer on SSH.
        """
        return self.ssh.command

    def ssh_config(self, path: StrPath) -> None:
        """Write a configuration of OpenSSH for other tools, in which the guest is called by its name.

        Raises:
            GuestLost: it does not answer on SSH.
            OSError: `path` cannot be written.

        Example::

            vm.ssh_config("ssh_config")
            subprocess.run(["scp", "-F", "ssh_config", f"{vm.name}:/etc/hostname", "."], check=True)
        """
        Path(path).write_text(self.ssh.config(self.name), encoding="utf-8")


class _Snapshot:
    """The result of `Guest.snapshot`. A generator would roll back if it were dropped."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._saved: Saved

    def __enter__(self) -> None:
        with self._engine.explained():
            self._saved = self._engine.save()

    def __exit__(self, *_: object) -> None:
        with self._engine.explained():
            self._engine.roll_back(self._saved)


def _warn_of(what: str, source: StrPath, left_out: Sequence[str]) -> None:
    """Warn the caller of the method that calls this, if something was left out."""
    if left_out:
        text = f"{os.fspath(source)} was {what} without {transfer.in_words(left_out)}"
        warnings.warn(text, stacklevel=3)
