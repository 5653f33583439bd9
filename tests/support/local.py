"""A stand-in for a guest: its programs run on this machine."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

from pytest_vmsandbox.core.errors import CommandError, CommandResult, GuestLost
from pytest_vmsandbox.guests.running.ledger import Ledger


class LocalProcess:
    """A program that runs here; see `RemoteProcess`."""

    def __init__(self, guest, command):
        self.guest = guest
        self.process = subprocess.Popen(
            command.argv,
            cwd=command.cwd,
            env={**os.environ, **command.env},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def send(self, data, timeout):
        self.guest.check()
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def receive(self, timeout):
        self.guest.check()
        poller = select.poll()
        poller.register(self.process.stdout.fileno(), select.POLLIN)
        if not poller.poll(min(timeout, 60) * 1000):
            self.guest.check()
            raise TimeoutError
        return os.read(self.process.stdout.fileno(), 1 << 18)

    def close(self):
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except BrokenPipeError:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


class LocalGuest:
    """What a test session needs of a guest, without one."""

    running = None  # it has no machine

    def __init__(self, name="local-1", image="local"):
        self.name, self.image = name, image
        self.lost = None
        self.transient = False  # whether something else than the guest was at fault
        self.machines = SimpleNamespace(faults=Ledger(None), cards=[])

    @property
    def engine(self):
        return self

    @property
    def ssh_command(self):
        return str(Path(__file__).with_name("local_ssh"))

    @property
    def alive(self):
        return self.loss is None

    @property
    def loss(self):
        if self.lost is None:
            return None
        return GuestLost(self.lost, stage="kernel", transient=self.transient)

    def check(self):
        if self.loss is not None:
            raise self.loss

    def run(self, argv, *, check=True, user=None, timeout=60, input=None):  # noqa: A002
        self.check()
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout, check=False, input=input
        )
        result = CommandResult(
            argv=tuple(argv), returncode=done.returncode, stdout=done.stdout, stderr=done.stderr,
            duration=0.0,
        )  # fmt: skip
        if check and result.returncode:
            raise CommandError(f"{argv[0]} returned {result.returncode}", result=result)
        return result

    def stream_script(self, script, *, stdin=None, stdout=None):
        self.check()
        argv = ("sh", "-c", script)
        done = subprocess.run(
            argv, input=stdin.read() if stdin else b"", capture_output=True, check=False
        )
        if stdout is not None:
            stdout(done.stdout)
        if done.returncode:
            result = CommandResult(
                argv=argv, returncode=done.returncode, stdout="", stderr=done.stderr.decode(),
                duration=0.0,
            )  # fmt: skip
            raise CommandError(f"sh returned {done.returncode}", result=result)

    def start(self, command):
        self.check()
        return LocalProcess(self, command)

    def connect(self, path):
        return None
