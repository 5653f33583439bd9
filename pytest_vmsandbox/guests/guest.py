"""A running guest, as tests use it."""

from __future__ import annotations

import io
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import CommandResult, CommandTimeout, ConfigError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.crash.crash_points import HasCrashPoints
from pytest_vmsandbox.guests.faults.faults import TakesFaults
from pytest_vmsandbox.guests.forks import HasForks
from pytest_vmsandbox.guests.networks.network import HasNetworks
from pytest_vmsandbox.guests.reaching import commands, transfer
from pytest_vmsandbox.guests.reaching.access import SSHAccess
from pytest_vmsandbox.guests.reaching.commands import StrPath
from pytest_vmsandbox.guests.reaching.process import Process
from pytest_vmsandbox.guests.running import forwarding
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.plugging import TakesDisks
from pytest_vmsandbox.guests.running.saved import Saved
from pytest_vmsandbox.machine import capture
from pytest_vmsandbox.machine.console import Console

Streams = bytes | str | None
_INSTEAD = {  # what to do instead of the arguments that `popen` does not take
    "check": "check the result of .wait(timeout) or .poll()",
    "timeout": "call .wait(timeout)",
    "input": "write to .stdin, and close it",
}
_POLL_SECONDS = 0.25


class Guest(TakesDisks, TakesFaults, HasNetworks, HasCrashPoints, HasForks):
    """A running virtual machine. `GuestFactory.boot` makes it and ends it.

    Every method that talks to the guest raises `GuestLost` if the guest is gone.

    You may call methods from any thread, also several at a time. A call that waits does not block
    other calls. If one of them takes the guest's power away, calls that wait raise `GuestLost`.
    Snapshots of several threads must not overlap.

    With more than eight guests per CPU, a guest that has been idle for half a second is paused. The
    next call resumes it, with the right time. A guest is never paused while a call waits for something
    in it, nor while it is on a network. After `popen`, `forward`, `ssh`, `ssh_command`, `ssh_config`,
    `console` or `qmp`, it is not paused any more until it is switched off.

    Attributes:
        name: unique among the guests of this process. It is also the hostname, except in a cluster.
        image: the name of its image.
        engine: what it runs on. Not part of the public interface: it changes without notice.
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
        """The guest's hardware. Sizes are in bytes."""
        return self.engine.spec

    @property
    def origin(self) -> str:
        """Whether it was ``armed`` (cloned ahead of demand), ``cloned`` (on demand) or ``booted``."""
        return self.engine.origin

    @property
    def alive(self) -> bool:
        """Whether the guest is switched on, and has neither ended nor panicked."""
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
        r"""Run one program and wait until it ends. No shell reads the arguments.

        Args:
            argv: the program and its arguments.
            check: raise `CommandError` if it returns non-zero.
            timeout: seconds; None for the ini key ``vm_command_timeout``.
            input: what it reads from standard input. Without it, standard input is empty.
            cwd: the folder it starts in; None for the user's home.
            env: variables to add to the user's environment.
            user: who runs it; None for the guest's user.
            text: streams are `str` (UTF-8; undecodable bytes are replaced), else `bytes`.

        Returns:
            A `CommandResult`. Its ``returncode`` is −N if signal N ended the program.

        Raises:
            CommandError: it returned non-zero, or the folder or the user does not exist.
            CommandTimeout: it did not end in time. Its process group was killed.
            OSError: a word has 128 KiB or more, there are more than 65,535 words, or all words together
                take about 2 MiB («Argument list too long», as with `subprocess`).
            TypeError: a word, the folder or a variable is neither a `str` nor a path.

        A program may leave something in the background that holds its streams open. Then the call
        returns when the program has ended and no output has come for half a second.

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
        r"""Run a script with the guest's ``/bin/sh``. The arguments are those of `run`.

        This is the only method in which a shell reads a string.

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
        """Start a program and leave it running. The arguments are those of `run`.

        The program ends with the guest at the latest. Read its streams if it writes much: it stops when
        2 MiB wait to be read.

        Args:
            check: not allowed, like ``timeout`` and ``input``. Only `run` has these.

        Returns:
            A `Process`.

        Raises:
            CommandError: the folder or the user does not exist.
            ConfigError: you passed ``check``, ``timeout`` or ``input``.
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
            timeout: seconds for all tries together.

        Raises:
            CommandTimeout: it never returned 0. The error has the output of the last try.
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
        """Copy a file or a folder into the guest.

        ``dest`` is the name of the copy. If it is an existing folder, a file is copied into it, and a
        folder is merged with it. A ``dest`` that ends in ``/`` is a folder to put the copy into. Missing
        folders are created. If ``source`` is a link, its target is copied.

        Modes (with setuid bits), times, holes, and links in a folder are kept. The owner is the guest's
        user. A file is replaced atomically. It is written in place where no file can be made beside it
        (``/proc``, ``/sys``, a read-only folder), and if it is a device. Then only the content is
        copied. If ``dest`` is a link, its target is written.

        The folder may change meanwhile: each file is copied as it was read, also a log that grows. Pipes,
        sockets and devices are left out, with one warning.

        Raises:
            TransferError: ``source`` does not exist, or the guest cannot take it.
        """
        with self.engine.explained():
            left_out = transfer.push(self.engine.stream_script, Path(source), dest)
        _warn_of("pushed", source, left_out)

    def pull(self, source: StrPath, dest: StrPath) -> None:
        """Copy a file or a folder out of the guest. ``dest`` means the same as in `push`.

        Symbolic links are copied as links and never followed. Modes and times are kept, and long runs of
        zeros become holes. Setuid bits are kept only if no other user of this machine can enter the
        folder of ``dest``.

        A file is read to its end, also a log that grows or a file of ``/proc``. The folder may change
        meanwhile: each file is copied as it was read. Pipes, sockets, devices, and setuid bits that are
        not kept are left out, with one warning.

        Raises:
            TransferError: ``source`` does not exist, or ``dest`` cannot be written.
        """
        with self.engine.explained():
            left_out = transfer.pull(self.engine.stream_script, source, dest)
        _warn_of("pulled", source, left_out)

    def read_text(self, path: StrPath) -> str:
        """Return the content of a file in the guest, decoded as UTF-8.

        Raises:
            TransferError: it cannot be read, is larger than 256 MiB, or is a pipe or a device.
        """
        with self.engine.explained():
            return transfer.read_text(self.engine.stream_script, path)

    def write_text(self, path: StrPath, text: str) -> None:
        """Write a file in the guest, encoded as UTF-8. Missing folders are created.

        An existing file keeps its mode and its owner; a new one has mode 0644. A file is replaced
        atomically. It is written in place where no file can be made beside it (``/proc``, ``/sys``, a
        read-only folder), and if it is a device. If ``path`` is a link, its target is written.

        Raises:
            TransferError: it cannot be written.
            TypeError: ``text`` is not a `str`.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"text must be a str, not {type(text).__name__}; to copy any file, use vm.push()"
            )
        with self.engine.explained():
            transfer.write_text(self.engine.stream_script, path, text)

    # -- power ----------------------------------------------------------------------------------

    def reboot(self, *, timeout: float | None = None) -> None:
        """Restart the guest in an orderly way, and wait until it answers. Its services may start later:
        use `wait_until`.

        Args:
            timeout: seconds for going down and coming up; None for twice the boot timeout.

        Raises:
            BootError: it did not come back.
        """
        deadline = Deadline(
            2 * self.engine.boot_seconds if timeout is None else commands.seconds(timeout)
        )
        with self.engine.explained():
            self.engine.reboot(deadline)

    def power_off(self) -> None:
        """Shut the guest down in an orderly way. If it is still on after the boot timeout, it is killed.

        Raises:
            CommandError: it refuses to go down.
        """
        with self.engine.explained():
            self.engine.power_off()

    def power_cut(self) -> None:
        """Pull the plug. What the guest had not written to its disk is lost."""
        with self.engine.explained():
            self.engine.power_cut()

    def power_on(self) -> None:
        """Switch the guest on, with the disks as they were, and wait until it answers. Its services may
        start later: use `wait_until`.

        Raises:
            ConfigError: it is on.
            BootError: it did not come up.
        """
        with self.engine.explained():
            self.engine.power_on()

    def snapshot(self) -> AbstractContextManager[None]:
        """A context manager that restores memory and disks at its end to what they are now.

        It does so however the context ends, even if the guest was lost or switched off. Contexts can be
        nested. After the restore, what runs now runs again, with the right time and its own random numbers.
        If a test has set the clock off by two seconds or more, it stays that far off.

        Connections are not restored. A process of `popen` goes on in the guest, but nothing more is heard
        of it. A forwarded port has to be forwarded again.

        Raises:
            ConfigError: the guest has no helper, so its clock would be wrong.
            MonitorError: the state of the guest cannot be saved.
            LaunchError: at the end: this host has no room for all of the guest's memory.

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
        """Make a port of the guest reachable on a loopback address of this host.

        It works with any network; for UDP only with ``nat``. The service in the guest has to listen on
        ``0.0.0.0``, not only on the guest's own loopback. The forwarding ends when the guest is
        switched off or a snapshot is restored. Every user of this machine can reach the port.

        QEMU accepts each connection at once, even if nothing listens in the guest. Such a connection ends
        without a byte. Pass ``timeout`` to wait for the service. Without it, the log tells if nothing
        listens yet (a failed test shows it), and you may use the port later.

        Args:
            port: of the guest.
            protocol: ``tcp`` or ``udp``.
            timeout: seconds to wait until a service in the guest listens; 0 to look once.

        Returns:
            Address and port, as `socket.create_connection` takes them. Asked again, they are the same.

        Raises:
            ConnectionRefusedError: nothing listens there within ``timeout`` seconds.
            ConfigError: ``port`` or ``protocol`` is invalid, or you want UDP and the guest's network is not ``nat``.
            MonitorError: QEMU cannot do it.
        """
        with self.engine.explained():
            return forwarding.forward(self.engine, port, protocol, timeout)

    @property
    def console(self) -> Console:
        """The serial console since the guest was last switched on.

        A clone was switched on with its template, so the text begins with that boot.
        """
        with self.engine.use(hold=True) as running:
            return running.machine.console

    def screenshot(self, path: StrPath) -> None:
        """Save the display to a file, as PNG.

        Raises:
            MonitorError: QEMU cannot do it (older than 7.1, or built without PNG). No file is written.
            OSError: ``path`` cannot be written.
        """
        with self.engine.explained(), self.engine.use() as running:
            data = capture.screen(running.machine)
        Path(path).write_bytes(data)

    def qmp(self, command: str, **arguments: object) -> Any:
        """Execute a command of the QEMU machine protocol, and return its answer.

        Raises:
            MonitorError: QEMU refused it; ``error_class`` has the protocol's class.

        Example::

            >>> vm.qmp("query-status")["status"]
            'running'
        """
        with self.engine.explained(), self.engine.use(hold=True) as running:
            return running.machine.execute(command, arguments)

    @property
    def ssh(self) -> SSHAccess:
        """What other tools need to log in, such as the address, the user and the key.

        It is valid until the guest is switched off or a snapshot is restored.

        Raises:
            GuestLost: it does not answer on SSH.
        """
        with self.engine.explained():
            return self.engine.ssh_access()

    @property
    def ssh_command(self) -> str:
        """The command line that logs in to the guest. It is valid as long as `ssh`.

        Raises:
            GuestLost: it does not answer on SSH.
        """
        return self.ssh.command

    def ssh_config(self, path: StrPath) -> None:
        """Write an OpenSSH configuration for other tools. It calls the guest by its `name`, and is valid as
        long as `ssh`.

        Raises:
            GuestLost: it does not answer on SSH.
            OSError: ``path`` cannot be written.

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
            self._engine.machines.faults.refuse_recorded(
                f"snapshot() does not work with {self._engine.name}",
                "take the snapshot before crash_points begins, or after its block",
            )
            self._saved = self._engine.save()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # pytest's failures are no subclasses of Exception. With the others, there is no time.
            if error is not None and not isinstance(
                error, (KeyboardInterrupt, SystemExit, GeneratorExit)
            ):
                self._engine.on_restore(self._engine.name, error)
        finally:
            with self._engine.explained():
                self._engine.roll_back(self._saved)
                self._engine.machines.faults.rolled_back(self._saved.faults)


def _warn_of(what: str, source: StrPath, left_out: Sequence[str]) -> None:
    """Warn the caller of the method that calls this, if something was left out."""
    if left_out:
        text = f"{os.fspath(source)} was {what} without {transfer.in_words(left_out)}"
        warnings.warn(text, stacklevel=3)
