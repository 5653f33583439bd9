"""What a `Guest` does, on a machine that is a fake and programs that really run here."""

import gc
import io
import math
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest

from pytest_vmsandbox.core.errors import (
    BootError,
    CommandError,
    CommandResult,
    CommandTimeout,
    ConfigError,
    GuestLost,
    MonitorError,
    TransferError,
)
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests import guest as guest_module, leasing
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.reaching import ssh, transfer, ways_in
from pytest_vmsandbox.guests.reaching.access import KeyPair, SSHAccess
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.running import (
    engine as engine_module,
    forwarding,
    kernel_faults,
    machines as machines_module,
)
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.machine.console import Console
from pytest_vmsandbox.machine.disk import Disks

KEY = KeyPair.generate()


def access(platform, user):
    """The way into a guest."""
    return SSHAccess(
        host="127.0.0.1",
        port=40022,
        user=user,
        key_file=platform.hypervisor.folder / f"key.{KEY.name}",
        known_hosts_file=platform.hypervisor.folder / "known_hosts.tiny-1",
    )


class LocalProcess:
    """A program of the fake guest."""

    def __init__(self, command, home):
        self.command = command
        cwd = home if command.cwd is None else command.cwd
        argv = list(command.argv)
        if not any(Path(folder, argv[0]).exists() for folder in os.get_exec_path()):
            argv = ["/bin/sh", "-c", 'echo "sh: 1: exec: $0: not found" >&2; exit 127', argv[0]]
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env={**os.environ, **command.env},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def communicate(self, stdin, stdout, stderr, timeout, idle=math.inf):
        try:
            limit = None if timeout == float("inf") else timeout
            data = b"" if stdin is None else b"".join(iter(lambda: stdin.read(65536), b""))
            out, err = self.process.communicate(data, timeout=limit)
        except subprocess.TimeoutExpired:
            self.signal("KILL")
            out, err = self.process.communicate()
            stdout(out)
            raise CommandTimeout(f"{self.command.argv[0]} is late", seconds=timeout) from None
        stdout(out)
        stderr(err)
        return self.process.returncode

    def poll(self):
        return self.process.poll()

    def wait(self, timeout):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise CommandTimeout("it still runs", seconds=timeout) from None

    def signal(self, name):
        if self.process.poll() is None:
            os.killpg(self.process.pid, getattr(signal, f"SIG{name}"))

    stdin = property(lambda self: self.process.stdin)
    stdout = property(lambda self: self.process.stdout)
    stderr = property(lambda self: self.process.stderr)

    def close(self):
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()


class FakeTransport:
    def __init__(self, machine, user, home):
        self.machine, self.user, self.home = machine, user, home
        self.commands = []
        self.closed = False

    def start(self, command):
        self.commands.append(command)
        if command.argv[0] in {"reboot", "poweroff"}:
            self.machine.ask(command.argv[0])
            command = replace(command, argv=("true",))  # never run these here
        return LocalProcess(command, self.home)

    def close(self):
        self.closed = True


class FakeHelper:
    """The helper of a fake guest; it keeps the clock right."""

    lead = Lead()
    is_frozen = False
    is_away = False
    quiet_seconds = 0.5

    def __init__(self, platform):
        self.platform, self.events = platform, platform.events
        self.is_there = platform.has_helper

    def start(self, command, login):
        used = [transport for transport in self.platform.transports if not transport.closed]
        for transport in used:
            if transport.user == login:
                return transport.start(command)
        return self.platform.transport(login).start(command)

    def assume(self):
        pass

    def is_silent(self):
        return False

    def seed(self, data):
        pass

    def read_lead(self, timeout):
        return 0.0, 0.0

    def send_clock(self):
        return 1

    def clock_error(self, number, started):
        return 0.0

    def set_clock(self):
        return 0.0

    def connect(self, path):
        return None

    def ping(self):
        self.events.append("ping")

    def close(self):
        for transport in self.platform.transports:
            transport.close()
        self.events.append("going down")


class FakeMachine:
    """A machine that does what it is told; `fault` is what is wrong with it."""

    def __init__(self, platform, spec):
        self.platform = platform
        self.spec = spec
        self.console = Console(None)
        self.monitor = self
        self.drives = self
        self.helper = None
        self.process = SimpleNamespace(pid=os.getpid())
        self.status = None
        self.fault = None
        self.is_stopped = False
        self.disk_fault = None
        self.stage = "kernel" if b"Linux" in platform.first_words else "firmware"
        self.names = []
        self.obeys = True
        self.paused = False

    def ask(self, what):
        if self.obeys:
            if what == "reboot":
                self.names.append("RESET")
            else:
                self.status = 0

    def events(self):
        now = {"seconds": 0, "microseconds": 0}
        return [{"event": name, "timestamp": now} for name in self.names]

    def wait_event(self, name, *, since, timeout):
        return name if name in self.names[since:] else None

    def reaches(self, stage, timeout):
        self.platform.booting(self)
        return self.platform.answer

    def check(self):
        if self.fault:
            raise GuestLost(self.fault, stage="kernel")
        if self.status is not None:
            raise GuestLost("it is switched off")

    def check_disks(self):
        if self.disk_fault:
            raise GuestLost(self.disk_fault, stage="launch")

    def check_booting(self, seconds):
        try:
            self.check()
        except GuestLost as lost:
            raise BootError(
                f"{lost.brief} while booting", stage=lost.stage, seconds=seconds
            ) from lost

    def console_lines(self):
        return f"--- last lines of the console\n{self.console.tail()}"

    def ended(self):
        return self.status

    def end(self, timeout):
        self.status = 0 if self.status is None else self.status
        return True

    def kill(self):
        self.status = -9

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    def put_on_top(self, overlays):
        pass

    def save(self, state, *, with_memory):
        self.platform.events.append("save")
        state.write(b"saved")

    def forward(self, port, protocol="tcp"):
        return "127.0.0.1", {"tcp": 40_000, "udp": 50_000}[protocol] + port

    def execute(self, command, arguments=None):
        return {"command": command, **(arguments or {})}

    def screenshot(self, file):
        file.write(b"picture")


@dataclass
class FakeSpec:
    name: str
    hostname: str
    start: object
    tpm: bool = False
    cards: tuple = ()


class FakePlatform:
    """What an engine is made of, without QEMU and SSH; it is its blueprint, too."""

    unsaved = ""
    image = "tiny"
    built = SimpleNamespace(
        host_key="ssh-ed25519 AAAA",
        key=None,
        definition=SimpleNamespace(login=SimpleNamespace(ready="^last words$")),
    )
    verdict = SimpleNamespace(time_scale=1.0)
    stretch = staticmethod(float)
    kernel = None
    has_way_in = True
    first_words = b"Linux version 6\r\nlast words\r\n"

    def __init__(self, home):
        self.home = home
        self.machines = []
        self.transports = []
        self.off = 0
        self.answer = True
        self.has_helper = True
        self.fault = None
        self.events = []
        self.booting = lambda machine: None
        self.hypervisor = SimpleNamespace(folder=home.parent, cache=home.parent)

    def machine(self, name, public_key, start, *, hostname):
        return FakeSpec(name, hostname, start)

    @contextmanager
    def running(self, hypervisor, spec, *, state, **_):
        if state is not None:
            state.seek(0)
            self.events.append(f"roll back {state.read().decode()}")
        machine = FakeMachine(self, spec)
        machine.fault = self.fault
        machine.console.feed(self.first_words)
        self.machines.append(machine)
        try:
            yield machine
        finally:
            self.off += 1

    def connection(self, *, user, **_):
        """By SSH."""
        return self.transport(user)

    def transport(self, user):
        self.transports.append(FakeTransport(self.machines[-1], user, self.home))
        return self.transports[-1]


@pytest.fixture
def platform(tmp_path, monkeypatch):
    for module in (guest_module, engine_module, forwarding):
        monkeypatch.setattr(module, "_POLL_SECONDS", 0.001)
    home = tmp_path / "home"
    home.mkdir()
    platform = FakePlatform(home)
    monkeypatch.setattr(machines_module, "Machine", platform)
    monkeypatch.setattr(machines_module, "Helper", lambda *_, **__: FakeHelper(platform))
    monkeypatch.setattr(ssh, "SSHTransport", platform.connection)
    monkeypatch.setattr(machines_module, "greeting", lambda *_: platform.answer)
    monkeypatch.setattr(ways_in, "greeting", lambda *_: platform.answer)
    return platform


@contextmanager
def make(platform, *, user="root", network="isolated", boot_timeout=5.0, **more):
    platform.hardware = Hardware(user=user, network=network)
    machines = Machines(
        platform,
        platform.hypervisor,
        name="tiny-1",
        key=KEY,
        disks=Disks(base=None, overlays=()),
        logs=None,
    )
    with Engine(
        machines,
        settings=Settings(boot_timeout=boot_timeout, command_timeout=5.0),
        hints=lambda: ["artifacts: over there"],
        **more,
    ) as engine:
        yield Guest(engine)


@pytest.fixture
def vm(platform):
    with make(platform) as vm:
        yield vm


class TestThisMachinesDisk:
    """It was full, say. The guest has got an error, which may be what a call fails with."""

    def test_is_the_cause_of_an_error(self, vm, platform):
        platform.machines[0].disk_fault = "disk is full"
        with pytest.raises(GuestLost, match="disk is full") as caught:
            vm.run(["false"])
        assert isinstance(caught.value.__cause__, CommandError)
        assert caught.value.__notes__ == ["artifacts: over there"]

    @pytest.mark.parametrize(
        "switch",
        [
            lambda vm: vm.power_cut(),
            lambda vm: vm.power_off(),
            lambda vm: [vm.engine.power_cut(), vm.power_on()],
        ],
    )
    def test_is_told_when_the_guest_is_given_back(self, vm, platform, switch):
        vm.engine.check_disks()
        platform.machines[0].disk_fault = "disk is full"
        switch(vm)
        with pytest.raises(GuestLost, match="disk is full"):
            vm.engine.check_disks()

    def test_was_full_before_a_rollback(self, vm, platform):
        with vm.snapshot():
            platform.machines[0].disk_fault = "disk is full"
        assert len(platform.machines) == 2
        with pytest.raises(GuestLost, match="disk is full"):
            vm.engine.check_disks()

    def test_fails_while_a_template_is_saved(self, vm, platform, tmp_path):
        platform.machines[0].disk_fault = "disk is full"
        with (
            pytest.raises(GuestLost, match="disk is full"),
            (tmp_path / "state").open("wb") as state,
        ):
            vm.engine.save_devices(state)

    def test_spoils_whatever_a_block_has_found(self, vm, platform):
        def use(error=None):
            with leasing.on_sound_host(vm):
                if error is not None:
                    raise error

        use()
        with pytest.raises(AssertionError, match="found"):
            use(AssertionError("found"))
        platform.machines[0].disk_fault = "disk is full"
        with pytest.raises(GuestLost, match="disk is full"):
            use()
        with pytest.raises(GuestLost, match="disk is full") as caught:
            use(AssertionError("found"))
        assert isinstance(caught.value.__cause__, AssertionError)
        with pytest.raises(GuestLost, match="gone"):
            use(GuestLost("gone"))


class TestRun:
    def test_result(self, vm):
        result = vm.run(["printf", "%s", "a b"])
        assert (result.argv, result.returncode) == (("printf", "%s", "a b"), 0)
        assert (result.stdout, result.stderr) == ("a b", "")
        assert 0 < result.duration < 5

    def test_bytes(self, vm):
        result = vm.run(["cat"], input=b"\xff\0", text=False)
        assert (result.stdout, result.stderr) == (b"\xff\0", b"")

    def test_text_replaces_what_cannot_be_decoded(self, vm):
        assert vm.run(["printf", r"\377é"]).stdout == "\ufffdé"
        assert vm.run(["cat"], input="é").stdout == "é"

    def test_environment_and_folder(self, vm, tmp_path):
        result = vm.run(["sh", "-c", "echo $A; pwd"], env={"A": "x y"}, cwd=str(tmp_path))
        assert result.stdout == f"x y\n{tmp_path}\n"

    def test_a_path_is_a_word(self, vm, tmp_path):
        assert vm.run(["echo", tmp_path]).stdout == f"{tmp_path}\n"

    def test_paths_are_words(self, vm, tmp_path):
        result = vm.run(["sh", "-c", "echo $A; pwd"], env={"A": tmp_path}, cwd=tmp_path)
        assert result.stdout == f"{tmp_path}\n{tmp_path}\n"
        assert vm.run(["pwd"], cwd=PurePosixPath("/")).stdout == "/\n"
        with vm.popen(["pwd"], cwd=PurePosixPath("/")) as process:
            assert process.stdout.read() == "/\n"

    @pytest.mark.parametrize(
        ("how", "text"),
        [
            ({"env": {"A": 1}}, r"env\['A'\] must be a str or a path, not int"),
            ({"env": {"A": None}}, r"env\['A'\] must be a str or a path, not NoneType"),
            ({"env": {1: "A"}}, "the name of a variable must be a str or a path, not int"),
            ({"cwd": 1}, "cwd must be a str or a path, not int"),
            ({"cwd": b"/"}, "cwd must be a str or a path, not bytes"),
            ({"user": 0}, "user must be a str, not int"),
        ],
    )
    def test_what_is_no_text(self, vm, how, text):
        with pytest.raises(TypeError, match=text):
            vm.run(["true"], **how)

    def test_a_status_that_is_not_zero(self, vm):
        with pytest.raises(CommandError, match="returned 3") as caught:
            vm.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
        assert "--- stdout\nout\n--- stderr\nerr" in str(caught.value)
        assert caught.value.result.returncode == 3
        assert caught.value.__notes__ == ["artifacts: over there"]

    def test_a_signal(self, vm):
        assert vm.run(["sh", "-c", "kill -9 $$"], check=False).returncode == -9

    def test_unchecked(self, vm):
        assert vm.run(["false"], check=False).returncode == 1

    def test_a_program_that_is_not_there(self, vm):
        with pytest.raises(CommandError, match="command not found in the guest: nosuch") as caught:
            vm.run(["nosuch", "-x"])
        assert "install it" in caught.value.remedy
        assert vm.run(["nosuch"], check=False).returncode == 127

    def test_a_timeout(self, vm):
        with pytest.raises(CommandTimeout) as caught:
            vm.run(["sh", "-c", "echo out; sleep 1000"], timeout=0.05)
        assert caught.value.stdout == b"out\n"
        assert caught.value.seconds == 0.05
        assert "vm_command_timeout" in caught.value.remedy

    @pytest.mark.parametrize(
        ("argv", "error"),
        [
            ("ls -l", TypeError),
            (b"ls", TypeError),
            ([], ValueError),
            (["ls", 1], TypeError),
            (["ls", b"x"], TypeError),
            (["ls", None], TypeError),
        ],
    )
    def test_what_is_no_list_of_words(self, vm, platform, argv, error):
        with pytest.raises(error):
            vm.run(argv)
        with pytest.raises(error):
            vm.popen(argv)
        assert platform.transports == []

    @pytest.mark.parametrize("timeout", [-1, True, "5", float("nan")])
    def test_what_is_no_time(self, vm, timeout):
        with pytest.raises(ConfigError, match="is not a number of seconds"):
            vm.run(["true"], timeout=timeout)

    def test_a_long_script_is_cut_in_the_first_line(self, vm):
        with pytest.raises(CommandError) as caught:
            vm.shell("exit 3 # " + "x" * 5000)
        assert len(caught.value.brief) < 600


class TestShell:
    def test_is_a_shell(self, vm):
        assert vm.shell("echo $((6 * 7)) | tr 4 '>'").stdout == ">2\n"

    def test_takes_what_run_takes(self, vm):
        result = vm.shell("cat; exit 3", input=b"x", check=False, text=False)
        assert (result.returncode, result.stdout) == (3, b"x")

    def test_takes_no_list(self, vm):
        with pytest.raises(TypeError, match=r"for a list of words, use vm\.run\(\)"):
            vm.shell(["ls"])


class TestUser:
    @pytest.mark.parametrize(
        ("own", "asked", "login", "becomes"),
        [
            ("root", None, "root", None),
            ("root", "root", "root", None),
            ("root", "me", "root", "me"),
            ("me", None, "me", None),
            ("me", "me", "me", None),
            ("me", "root", "root", None),
        ],
    )
    @pytest.mark.parametrize("has_helper", [True, False])
    def test_root_becomes_others_and_others_log_in(
        self, platform, own, asked, login, becomes, has_helper
    ):
        platform.has_helper = has_helper
        with make(platform, user=own) as vm:
            vm.run(["true"], user=asked)
            (transport,) = platform.transports
            assert (transport.user, transport.commands[0].user) == (login, becomes)

    @pytest.mark.parametrize("has_helper", [True, False])
    def test_there_is_one_connection_for_each(self, platform, has_helper):
        platform.has_helper = has_helper
        with make(platform, user="me") as vm:
            for user in (None, "root", None, "root"):
                vm.run(["true"], user=user)
        assert [it.user for it in platform.transports] == ["me", "root"]
        assert all(it.closed for it in platform.transports)


class TestPopen:
    @pytest.mark.parametrize(
        ("same", "remedy"),
        [
            ({"check": True}, "check the result"),
            ({"timeout": 3}, ".wait(timeout)"),
            ({"input": "x"}, ".stdin"),
        ],
    )
    def test_popen_says_what_stands_for_what_it_lacks_of_run(self, vm, same, remedy):
        (name,) = same
        with pytest.raises(ConfigError, match=f"popen.* no {name}=") as caught:
            vm.popen(["true"], **same)
        assert remedy in caught.value.remedy

    def test_talks(self, vm):
        with vm.popen(["cat"]) as process:
            process.stdin.write("one\n")
            process.stdin.flush()
            assert process.stdout.readline() == "one\n"
            assert process.poll() is None
            process.stdin.close()
            assert process.wait(5) == 0

    def test_bytes(self, vm):
        with vm.popen(["cat"], text=False) as process:
            process.stdin.write(b"\xff\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"\xff\n"

    def test_is_killed_at_the_end(self, vm):
        with vm.popen(["sleep", "1000"], text=False) as process:
            remote = process._remote
        assert remote.poll() == -9

    def test_is_ended(self, vm):
        with vm.popen(["sleep", "1000"], text=False) as process:
            with pytest.raises(CommandTimeout):
                process.wait(0.01)
            process.terminate()
            assert process.wait(5) == -15
            process.kill()


class TestWaitUntil:
    SCRIPT = 'echo x >>count; [ "$(wc -l <count)" -ge 3 ]'

    def test_tries_again(self, vm, platform):
        vm.wait_until(["sh", "-c", self.SCRIPT], timeout=5)
        assert (platform.home / "count").read_text() == "x\n" * 3

    def test_gives_up_with_the_last_try(self, vm):
        with pytest.raises(CommandTimeout, match="did not return 0 within 0.05 s") as caught:
            vm.wait_until(["sh", "-c", "echo why >&2; exit 4"], timeout=0.05)
        assert "the last try returned 4" in caught.value.brief
        assert caught.value.stderr == b"why\n"
        assert caught.value.seconds == 0.05

    def test_a_try_that_does_not_end(self, vm):
        with pytest.raises(CommandTimeout, match="did not return"):
            vm.wait_until(["sleep", "1000"], timeout=0)

    def test_a_lost_guest_is_not_waited_for(self, vm, platform):
        platform.machines[0].fault = "kernel panic"
        with pytest.raises(GuestLost, match="kernel panic"):
            vm.wait_until(["true"], timeout=60)


class TestFiles:
    def test_text(self, vm, platform):
        vm.write_text("sub/-name", "é\r\n")
        file = platform.home / "sub/-name"
        assert file.read_bytes() == "é\r\n".encode()
        assert file.stat().st_mode & 0o777 == 0o644
        assert vm.read_text("sub/-name") == "é\r\n"
        vm.write_text("-x", "y")
        assert vm.read_text("-x") == vm.read_text(str(platform.home / "-x")) == "y"

    @pytest.mark.parametrize("text", [b"x", 1, None])
    def test_what_is_no_text(self, vm, text):
        with pytest.raises(TypeError, match="text must be a str"):
            vm.write_text("file", text)

    def test_text_that_is_none(self, vm, platform):
        (platform.home / "raw").write_bytes(b"\xff")
        with pytest.raises(TransferError, match="raw is not UTF-8") as caught:
            vm.read_text("raw")
        assert "vm.pull()" in caught.value.remedy

    def test_what_has_no_end_is_not_read(self, vm, platform):
        os.mkfifo(platform.home / "pipe")
        for path in ("pipe", "/dev/zero", platform.home):
            with pytest.raises(TransferError, match="cannot be read") as caught:
                vm.read_text(path)
            assert "is not a regular file" in str(caught.value)

    def test_text_that_is_too_long(self, vm, platform, monkeypatch):
        monkeypatch.setattr(transfer, "_MAX_TEXT", 4)
        (platform.home / "short").write_text("four")
        (platform.home / "long").write_text("fives")
        assert vm.read_text("short") == "four"
        with pytest.raises(TransferError, match="long is larger than 4B") as caught:
            vm.read_text("long")
        assert "vm.pull()" in caught.value.remedy

    def test_what_is_not_there(self, vm):
        with pytest.raises(TransferError, match="none cannot be read"):
            vm.read_text("none")
        with pytest.raises(TransferError, match="cannot be written"):
            vm.write_text("/dev/null/x", "x")

    def test_push_and_pull(self, vm, platform, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        (source / "file").write_text("x")
        vm.push(source, "copy")
        vm.push(str(source / "file"), "one")
        vm.pull("copy", tmp_path / "back")
        vm.pull("one", str(tmp_path / "one"))
        assert (tmp_path / "back/file").read_text() == (tmp_path / "one").read_text() == "x"

    def test_errors_of_reading_and_writing_have_hints(self, vm, tmp_path):
        (tmp_path / "binary").write_bytes(b"\xff")
        for use in (
            lambda: vm.read_text("/no/such"),
            lambda: vm.read_text(str(tmp_path / "binary")),
            lambda: vm.write_text("/dev/null/below", "x"),
        ):
            with pytest.raises(TransferError) as caught:
                use()
            assert caught.value.__notes__ == ["artifacts: over there"]

    def test_errors_have_hints(self, vm, tmp_path):
        with pytest.raises(TransferError) as caught:
            vm.push(tmp_path / "none", "x")
        assert caught.value.__notes__ == ["artifacts: over there"]


class TestPower:
    def test_is_on_and_then_gone(self, platform):
        with make(platform) as vm:
            assert vm.alive
            assert repr(vm) == "<Guest tiny-1 image=tiny on>"
        assert platform.off == 1
        assert repr(vm) == "<Guest tiny-1 image=tiny off>"
        assert not vm.alive

    def test_a_cut(self, vm, platform):
        vm.run(["true"])
        vm.power_cut()
        assert platform.machines[0].status == -9
        assert platform.transports[0].closed
        assert not vm.alive
        with pytest.raises(GuestLost, match="tiny-1 is switched off") as caught:
            vm.run(["true"])
        assert "vm.power_on()" in caught.value.remedy
        vm.power_on()
        vm.run(["true"])
        assert (len(platform.machines), platform.off) == (2, 1)

    @pytest.mark.parametrize("obeys", [True, False])
    def test_off(self, vm, platform, obeys):
        platform.machines[0].obeys = obeys
        vm.power_off()
        assert platform.machines[0].status == 0
        assert not vm.alive

    def test_on_while_it_is_on(self, vm):
        with pytest.raises(ConfigError, match="tiny-1 is already on"):
            vm.power_on()

    def test_on_after_it_ended_by_itself(self, vm, platform):
        platform.machines[0].status = 0
        vm.power_on()
        assert vm.alive

    def test_a_cut_while_it_boots(self, vm, platform):
        vm.power_cut()

        def cut(machine):
            vm.power_cut()
            platform.answer = False

        platform.booting = cut
        with pytest.raises(BootError, match="switched off while booting"):
            vm.power_on()
        assert platform.off == len(platform.machines) == 2
        platform.booting, platform.answer = lambda machine: None, True
        vm.power_on()
        assert vm.alive

    def test_one_restart_after_the_other(self, vm, platform):
        """Else the second one might wait for a restart that is over."""
        (machine,) = platform.machines
        reached, go_on = threading.Event(), threading.Event()

        def boot(machine):
            reached.set()
            assert go_on.wait(10)

        platform.booting = boot
        with ThreadPoolExecutor(2) as pool:
            restarts = [pool.submit(vm.reboot) for _ in range(2)]
            assert reached.wait(10)
            time.sleep(0.05)  # the second one may get as far as it can
            assert machine.names == ["RESET"]
            go_on.set()
            for restart in restarts:
                restart.result(10)
        assert machine.names == ["RESET"] * 2

    def test_reboot(self, vm, platform):
        vm.run(["true"])
        vm.reboot()
        assert platform.transports[0].closed
        assert vm.run(["echo", "x"]).stdout == "x\n"
        assert len(platform.machines) == 1

    def test_a_reboot_whose_program_never_answers(self, vm, platform, monkeypatch):
        """The restart itself counts: an init may end the helper before the program."""
        closed = []

        class Silent:
            def wait(self, timeout):
                raise CommandTimeout("it still runs", seconds=timeout)

            def close(self):
                closed.append(True)

        start = FakeTransport.start

        def begin(transport, command):
            if command.argv[0] != "reboot":
                return start(transport, command)
            transport.machine.ask("reboot")
            return Silent()

        monkeypatch.setattr(FakeTransport, "start", begin)
        vm.reboot(timeout=5)
        assert closed == [True]
        assert len(platform.machines) == 1

    def test_a_reboot_that_does_not_happen(self, vm, platform):
        platform.machines[0].obeys = False
        with pytest.raises(BootError, match="did not shut down to reboot"):
            vm.reboot(timeout=0.05)

    def test_a_guest_that_does_not_answer(self, platform):
        platform.answer = False
        with (
            pytest.raises(BootError, match="did not answer on SSH within 0.02 s") as caught,
            make(platform, boot_timeout=0.02),
        ):
            pass
        assert caught.value.stage == "kernel"
        assert "last words" in caught.value.details
        assert "--vm-boot-timeout" in caught.value.remedy
        assert caught.value.__notes__ == ["artifacts: over there"]
        assert platform.off == 1

    @pytest.mark.parametrize(
        ("console", "ends", "brief", "option"),
        [
            (
                b"vmsandbox: there is no /dev/vda\r\n",
                False,
                "does not see the root disk",
                "VIRTIO_BLK",
            ),
            (
                b"vmsandbox: cannot mount /dev/vda\r\n",
                True,
                "cannot mount the root disk",
                "EXT4_FS",
            ),
            (b"VFS: Unable to mount root fs on unknown-block(0,0)", True, "initial RAM", "INITRD"),
        ],
    )
    def test_what_a_kernel_of_the_user_lacks(self, platform, console, ends, brief, option):
        platform.answer = False
        platform.kernel = SimpleNamespace(release="6.12.9", modules=None)
        platform.booting = lambda machine: machine.console.feed(console)
        platform.fault = "is switched off" if ends else None
        with (
            pytest.raises(BootError, match=f"cannot boot on 6.12.9: .*{brief}") as caught,
            make(platform),
        ):
            pass
        assert option in caught.value.remedy
        assert "last lines of the console" in caught.value.details
        assert platform.off == 1

    @pytest.mark.parametrize("text", [b"SeaBIOS (version 1)\r\n", b"Linux version 6\r\n"])
    def test_a_kernel_of_the_user_that_is_silent(self, platform, text, monkeypatch):
        platform.answer = False
        platform.kernel = SimpleNamespace(release="6.12.9", modules=None)
        platform.first_words = text
        monkeypatch.setattr(kernel_faults, "_SILENT_SECONDS", 0.0)
        said = "has written nothing" if text.startswith(b"SeaBIOS") else "did not answer on SSH"
        with pytest.raises(BootError, match=said), make(platform, boot_timeout=0.1):
            pass

    def test_a_kernel_of_the_user_may_fail_in_another_way(self, platform):
        platform.answer = False
        platform.kernel = SimpleNamespace(release="6.12.9", modules=None)
        platform.fault = "kernel panic"
        with pytest.raises(BootError, match="kernel panic while booting"), make(platform):
            pass

    def test_a_guest_that_panics_while_booting(self, platform):
        platform.answer = False
        platform.fault = "kernel panic"
        with pytest.raises(BootError, match="kernel panic while booting"), make(platform):
            pass
        assert platform.off == 1

    def test_an_error_of_a_lost_guest_has_hints_once(self, vm, platform):
        platform.machines[0].fault = "kernel panic"
        with pytest.raises(GuestLost) as caught:
            vm.shell("true")
        assert caught.value.__notes__ == ["artifacts: over there"]


class TestNoWayIn:
    """A system that nobody can log in to: it is up when its console says so."""

    @pytest.fixture
    def rescue(self, platform):
        platform.has_helper = False
        platform.has_way_in = False
        platform.image = "rescue"
        with make(platform) as vm:
            yield vm

    @pytest.mark.parametrize(
        "call",
        [
            lambda vm: vm.run(["true"]),
            lambda vm: vm.shell("true"),
            lambda vm: vm.popen(["true"]),
            lambda vm: vm.push(__file__, "/tmp/file"),
            lambda vm: vm.read_text("/etc/passwd"),
            lambda vm: vm.reboot(),
            lambda vm: vm.power_off(),
            lambda vm: vm.ssh,
        ],
    )
    def test_what_needs_one(self, rescue, call):
        with pytest.raises(ConfigError, match="there is no way into rescue") as caught:
            call(rescue)
        assert "vm.console.wait_for" in caught.value.remedy

    def test_what_does_not(self, rescue, platform):
        assert rescue.console.text.endswith("last words\n")
        rescue.power_cut()
        rescue.power_on()
        assert len(platform.machines) == 2

    def test_it_does_not_come_up(self, platform):
        platform.has_helper = platform.has_way_in = False
        platform.first_words = b"Linux version 6\r\n"
        with (
            pytest.raises(
                BootError, match=r"did not show '\^last words\$' on its console within 0.1 s"
            ),
            make(platform, boot_timeout=0.1),
        ):
            pass


class TestRest:
    def test_until_it_is_asked_for_something(self, platform, vm):
        vm.run(["true"])
        assert vm.engine.idle_seconds > 0
        vm.engine.rest()
        assert (vm.engine.resting, platform.machines[0].paused) == (True, True)
        assert vm.engine.idle_seconds == 0
        vm.run(["true"])
        assert (vm.engine.resting, platform.machines[0].paused) == (False, False)

    def test_whoever_has_made_it_is_told_that_it_wakes(self, platform):
        woken = []
        with make(platform, on_resume=lambda: woken.append(1)) as vm:
            vm.engine.rest()
            vm.run(["true"])
            vm.run(["true"])
        assert woken == [1]

    @pytest.mark.parametrize(
        "use",
        [
            lambda vm: vm.popen(["true"]).__exit__(),
            lambda vm: vm.forward(80),
            lambda vm: vm.ssh,
            lambda vm: vm.engine.connect("/socket"),
            lambda vm: vm.qmp("stop"),
            lambda vm: vm.console,
            lambda vm: vm.power_cut(),
        ],
        ids=["popen", "forward", "ssh", "connect", "qmp", "console", "off"],
    )
    def test_not_if_somebody_counts_on_it(self, platform, vm, use):
        use(vm)
        vm.engine.rest()
        assert not vm.engine.resting
        assert not platform.machines[0].paused

    def test_not_while_a_program_runs(self, platform, vm):
        asked = []

        def listen(data):
            vm.engine.rest()
            asked.append(vm.engine.resting)

        vm.engine.run(Command(argv=("echo", "x")), stdout=listen)
        assert asked
        assert not any(asked)

    @pytest.mark.parametrize("again", ["reboot", "power_on"])
    def test_not_while_it_boots(self, platform, again):
        asked = []
        with make(platform) as vm:

            def rest(machine):
                vm.engine.rest()
                asked.append(machine.paused)

            platform.booting = rest
            if again == "power_on":
                vm.power_cut()
            getattr(vm, again)()
        assert asked == [False]

    @pytest.mark.parametrize(
        "use",
        [
            lambda vm: vm.run(["true"]),
            lambda vm: vm.popen(["true"]).__exit__(),
            lambda vm: vm.engine.connect("/socket"),
            lambda vm: vm.forward(80),
            lambda vm: vm.ssh,
            lambda vm: vm.qmp("query-status"),
            lambda vm: vm.screenshot(os.devnull),
            lambda vm: vm.reboot(),
        ],
        ids=["run", "popen", "connect", "forward", "ssh", "qmp", "screenshot", "reboot"],
    )
    def test_whoever_comes_while_it_is_being_paused_lets_it_go_on(
        self, platform, vm, monkeypatch, use
    ):
        (machine,) = platform.machines
        reached, go_on = threading.Event(), threading.Event()
        pause = machine.pause

        def slow_pause():
            reached.set()
            assert go_on.wait(10)
            pause()

        monkeypatch.setattr(machine, "pause", slow_pause)
        with ThreadPoolExecutor(2) as pool:
            resting = pool.submit(vm.engine.rest)
            assert reached.wait(10)
            using = pool.submit(use, vm)
            time.sleep(0.05)  # it may get as far as it can
            go_on.set()
            resting.result(10)
            using.result(10)
        assert not machine.paused

    def test_a_look_does_not_end_it(self, vm):
        vm.engine.rest()
        assert vm.alive
        assert vm.engine.pid == os.getpid()
        assert vm.engine.resting

    def test_its_plug_is_pulled_as_it_is(self, platform, vm):
        vm.engine.rest()
        vm.power_cut()
        assert platform.machines[0].paused

    def test_what_a_snapshot_holds_is_held_again(self, vm):
        with vm.snapshot():
            vm.popen(["true"]).__exit__()
        vm.engine.rest()
        assert vm.engine.resting
        vm.popen(["true"]).__exit__()
        with vm.snapshot():
            pass
        vm.engine.rest()
        assert not vm.engine.resting


class TestSavingAGuestThatRestartsByItself:
    """It is saved when it is set up again: clones could not be set up any more."""

    @pytest.fixture
    def order(self, vm, platform, monkeypatch):
        """What happens in turn. The helper comes back as soon as somebody waits for it."""
        restarts, order = vm.engine.running.restarts, platform.events

        def comes_back():
            order.append("wait")
            platform.machines[0].names.clear()

        monkeypatch.setattr(
            type(restarts), "is_news", property(lambda _: "RESET" in platform.machines[0].names)
        )
        monkeypatch.setattr(restarts, "await_end", comes_back)
        return order

    def test_waits_before(self, vm, platform, order):
        platform.machines[0].names.append("RESET")
        vm.engine.save()
        assert [it for it in order if it in ("wait", "save")] == ["wait", "save"]

    def test_begins_again_if_it_restarts_meanwhile(self, vm, platform, order, monkeypatch):
        helper, met = vm.engine.running.resident, []

        def read_lead(timeout):
            if order.count("wait") == 1:
                platform.machines[0].names.append("RESET")
            return 0.0, 0.0

        monkeypatch.setattr(helper, "read_lead", read_lead)
        vm.engine.save(lambda: met.append(list(order)))
        assert [it for it in order if it in ("wait", "save")] == ["wait", "wait", "save"]
        assert len(met) == 2  # others count on it: once before its CPUs stop, once before they run

    def test_tells_any_other_error(self, vm, order, monkeypatch):
        def read_lead(timeout):
            raise GuestLost("it does not answer")

        monkeypatch.setattr(vm.engine.running.resident, "read_lead", read_lead)
        with pytest.raises(GuestLost, match="it does not answer"):
            vm.engine.save()
        assert "save" not in order


class TestSnapshot:
    def test_the_machine_is_another_one_afterwards(self, platform, vm):
        with vm.snapshot():
            assert platform.events == ["save"]
            assert len(platform.machines) == 1
            vm.run(["true"])
        assert platform.events == ["save", "going down", "roll back saved"]
        assert len(platform.machines) == 2
        vm.run(["true"])
        assert [it.closed for it in platform.transports] == [True, False]

    @pytest.mark.parametrize("error", [ValueError, pytest.fail.Exception, KeyboardInterrupt])
    def test_an_error_is_told_before(self, platform, error):
        told = []

        def hear(name, failure):
            told.append((name, type(failure), len(platform.machines)))
            raise RuntimeError

        with make(platform, on_restore=hear) as vm:
            with vm.snapshot():
                pass
            assert not told
            is_told = error is not KeyboardInterrupt  # there is no time
            with pytest.raises(RuntimeError if is_told else error), vm.snapshot():
                raise error("x")
            assert len(platform.machines) == 3  # it is restored in any case
        assert told == ([("tiny-1", error, 2)] if is_told else [])

    def test_also_when_the_test_fails_in_it(self, platform, vm):
        with pytest.raises(KeyError), vm.snapshot():
            raise KeyError
        assert len(platform.machines) == 2
        vm.run(["true"])

    def test_also_when_the_guest_is_lost_in_it(self, platform, vm):
        with vm.snapshot():
            platform.machines[-1].fault = "kernel panic"
            with pytest.raises(GuestLost):
                vm.run(["true"])
        vm.run(["true"])

    def test_they_can_be_nested(self, platform, vm):
        with vm.snapshot(), vm.snapshot():
            pass
        assert len(platform.machines) == 3

    def test_one_that_is_dropped_rolls_nothing_back(self, platform, vm):
        snapshot = vm.snapshot()
        snapshot.__enter__()
        del snapshot
        gc.collect()
        assert platform.events == ["save"]

    def test_one_waits_until_a_guest_that_reboots_is_up(self, platform, vm):
        """What is saved while it goes down could never be talked to again."""
        is_down, may_boot = threading.Event(), threading.Event()

        def boots(machine):
            is_down.set()
            assert may_boot.wait(10)

        platform.booting, platform.has_helper = boots, False
        reboot = threading.Thread(target=vm.reboot)
        reboot.start()
        assert is_down.wait(10)
        platform.has_helper = True
        snapshot = threading.Thread(target=vm.snapshot().__enter__)
        snapshot.start()
        snapshot.join(0.2)
        saved = "save" in platform.events
        may_boot.set()
        for thread in (reboot, snapshot):
            thread.join(10)
        assert not saved
        assert platform.events[-1] == "save"

    def test_not_of_a_guest_that_is_off(self, vm):
        vm.power_cut()
        with pytest.raises(GuestLost, match="switched off"), vm.snapshot():
            pass


HEAD = "  sl  local_address rem_address   st tx_queue rx_queue\n"
NOBODY = HEAD + "   0: 0100007F:0050 0100007F:A2B6 01 00000000:00000000\n"  # a connection
ON_LOOPBACK = HEAD + "   0: 0100007F:0050 00000000:0000 0A 00000000:00000000\n"
LISTENS = HEAD + "   0: 00000000:0050 00000000:0000 0A 00000000:00000000\n"


class TestFromOutside:
    def test_forward(self, vm):
        assert vm.forward(80) == ("127.0.0.1", 40_080)

    def test_forward_of_udp(self, vm, platform):
        with pytest.raises(
            ConfigError, match="answers of a guest leave it only with network='nat'"
        ):
            vm.forward(80, protocol="udp")
        with make(platform, network="nat") as other:
            assert other.forward(80, protocol="udp") == ("127.0.0.1", 50_080)

    def test_forward_of_an_unknown_protocol(self, vm):
        with pytest.raises(ConfigError, match="protocol='sctp' is unknown"):
            vm.forward(80, protocol="sctp")

    @pytest.fixture
    def listeners(self, monkeypatch):
        """What the guest's kernel tells; a text for each time that it is asked."""
        texts = []

        def run(engine, command, **how):
            assert command.argv == ("cat", "/proc/net/tcp", "/proc/net/tcp6")
            if isinstance(texts[0], Exception):
                raise texts[0]
            text = texts.pop(0) if len(texts) > 1 else texts[0]
            return CommandResult(
                argv=(), returncode=0, stdout=text.encode(), stderr=b"", duration=0
            )

        monkeypatch.setattr(Engine, "run", run)
        return texts

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (NOBODY, "nothing listens on TCP port 80 of tiny-1"),
            (ON_LOOPBACK, "the service on TCP port 80 of tiny-1 listens only on 127.0.0.1"),
        ],
    )
    def test_forward_to_a_port_where_nobody_listens(self, vm, listeners, caplog, text, said):
        listeners.append(text)
        assert vm.forward(80) == ("127.0.0.1", 40_080)
        assert caplog.messages[0].startswith(said)
        assert caplog.messages[0].endswith(
            "A connection to 127.0.0.1:40080 ends at once; to wait for the service, pass timeout= to forward()"
        )
        for timeout in (0, 0.01):
            with pytest.raises(ConnectionRefusedError, match=said):
                vm.forward(80, timeout=timeout)

    def test_forward_waits_until_somebody_listens(self, vm, listeners, caplog, monkeypatch):
        monkeypatch.setattr(guest_module, "_POLL_SECONDS", 0.001)
        listeners += [NOBODY, ON_LOOPBACK, LISTENS]
        assert vm.forward(80, timeout=60) == ("127.0.0.1", 40_080)
        assert caplog.messages == []

    @pytest.mark.parametrize("text", [LISTENS, "", CommandTimeout("it is late", seconds=5)])
    def test_forward_says_nothing_where_it_does_not_know_better(self, vm, listeners, caplog, text):
        listeners.append(text)
        vm.forward(80, timeout=0)
        vm.forward(80)
        assert caplog.messages == []

    @pytest.mark.parametrize("port", [0, -1, 65_536, "80", 80.0, True, None])
    def test_what_is_no_port(self, vm, port):
        with pytest.raises(ConfigError, match="is not a TCP port"):
            vm.forward(port)

    def test_console(self, vm):
        assert vm.console.tail(1) == "last words"

    def test_screenshot(self, vm, tmp_path):
        vm.screenshot(tmp_path / "it.png")
        assert (tmp_path / "it.png").read_bytes() == b"picture"

    def test_a_screenshot_that_is_none_leaves_no_file(self, platform, vm, tmp_path, monkeypatch):
        def fail(file):
            raise MonitorError("no PNG")

        for cause in (fail, lambda file: None):
            monkeypatch.setattr(platform.machines[-1], "screenshot", cause)
            with pytest.raises(MonitorError):
                vm.screenshot(tmp_path / "it.png")
            assert not (tmp_path / "it.png").exists()

    def test_monitor(self, vm):
        assert vm.qmp("query-status", a=1) == {"command": "query-status", "a": 1}

    def test_ways_in(self, platform, tmp_path):
        with make(platform, user="me") as vm:
            assert vm.ssh == access(platform, user="me")
            assert vm.ssh_command == access(platform, user="me").command
            vm.ssh_config(tmp_path / "ssh_config")
            assert (tmp_path / "ssh_config").read_text() == access(platform, user="me").config(
                vm.name
            )

    def test_nothing_of_a_guest_that_is_off(self, vm, tmp_path):
        vm.power_cut()
        for use in (
            lambda: vm.console,
            lambda: vm.ssh,
            lambda: vm.ssh_command,
            lambda: vm.ssh_config(tmp_path / "ssh_config"),
            lambda: vm.forward(80),
            lambda: vm.qmp("stop"),
            lambda: vm.screenshot(tmp_path / "it.png"),
            vm.power_off,
            vm.reboot,
        ):
            with pytest.raises(GuestLost, match="is switched off"):
                use()


class TestPathsInTheGuest:
    def test_may_be_path_objects(self, vm, tmp_path):
        place = PurePosixPath(tmp_path, "file")
        vm.write_text(place, "x")
        vm.pull(place, tmp_path / "pulled")
        vm.push(tmp_path / "pulled", place.with_name("pushed"))
        assert vm.read_text(place.with_name("pushed")) == "x"

    @pytest.mark.parametrize("path", [b"/tmp/x", 1, None])
    def test_nothing_else(self, vm, tmp_path, path):
        for use in (
            lambda: vm.write_text(path, "x"),
            lambda: vm.read_text(path),
            lambda: vm.pull(path, tmp_path),
            lambda: vm.push(tmp_path, path),
        ):
            with pytest.raises(TypeError, match="a path in the guest must be a str or a path"):
                use()

    def test_what_is_left_out_is_one_warning(self, vm, tmp_path):
        (tmp_path / "tree").mkdir()
        for number in range(7):
            os.mkfifo(tmp_path / f"tree/pipe{number}")
        for name, copy in (("pushed", vm.push), ("pulled", vm.pull)):
            with pytest.warns(
                UserWarning, match=rf"tree was {name} without \./.* and 2 more"
            ) as warned:
                copy(str(tmp_path / "tree"), str(tmp_path / name))
            (warning,) = warned
            assert warning.filename == __file__


def test_streams_are_passed_on_as_they_come(vm):
    got = []
    command = Command(argv=("cat",))
    done = vm.engine.run(command, stdin=io.BytesIO(b"x"), stdout=got.append)
    assert (done.returncode, b"".join(got), done.stdout, done.stderr) == (0, b"x", b"", b"")


class TestPing:
    def test_the_helper_is_asked(self, platform, vm):
        vm.engine.ping()
        assert platform.events == ["ping"]

    def test_a_guest_that_is_gone(self, platform, vm):
        vm.power_cut()
        with pytest.raises(GuestLost):
            vm.engine.ping()


class TestItsName:
    """A guest of an image with a key of its own is told its name: nothing in it reads our command line."""

    @pytest.fixture
    def told(self, platform, monkeypatch):
        """The names that were told."""
        monkeypatch.setattr(machines_module, "_SET_HOSTNAME", "true")

        def told():
            commands = [command for way in platform.transports for command in way.commands]
            return [words[-1] for words in (c.argv for c in commands) if words[2:3] == ("true",)]

        return told

    def test_after_each_boot(self, platform, told, tmp_path, monkeypatch):
        built = SimpleNamespace(host_key="ssh-ed25519 AAAA", key=tmp_path / "key")
        monkeypatch.setattr(platform, "built", built)
        with make(platform, user="tester") as vm:
            assert told() == ["tiny-1"]
            assert platform.transports[-1].user == "root"
            vm.reboot()
            assert told() == ["tiny-1"] * 2
            vm.power_cut()
            vm.power_on()
            assert told() == ["tiny-1"] * 3

    def test_not_where_the_kernel_has_it_from_its_command_line(self, platform, told):
        with make(platform) as vm:
            vm.reboot()
            assert told() == []
