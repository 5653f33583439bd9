"""The host's side of the resident helper, with the real program of guests, run here; and with fakes.

What would change this machine (its clock, its name, its random numbers) is asked of a fake only.
"""

import errno
import io
import os
import pwd
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest
from hypothesis import given, settings, strategies as st

from pytest_vmsandbox.core.errors import (
    CommandError,
    CommandTimeout,
    ConfigError,
    GuestLost,
    VMSandboxError,
)
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.reaching import (
    commands,
    helper as helper_module,
    process as process_module,
)
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.reaching.helper import Helper
from pytest_vmsandbox.machine.loop import LoopThread
from pytest_vmsandbox.machine.port import Port
from support.arguments import FITS, TOO_LONG, output_of
from support.resident import SECONDS, alive, compiled, wait_for

QUIET = 0.5
USER = pwd.getpwuid(os.geteuid()).pw_name
MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the helper is for Linux")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("helper"))


@pytest.fixture(scope="module")
def loop():
    with LoopThread() as loop:
        yield loop


@contextmanager
def opened(loop, sock):
    """A port that takes what arrives."""
    port = Port(sock)
    with loop.reading(sock, port.feed):
        yield port


def fine():
    """Nothing is wrong with the guest."""


class Real:
    """The program of guests, running here, and our side of it."""

    def __init__(self, program, loop, stack):
        ours, theirs = socket.socketpair()
        self.sock = stack.enter_context(ours)
        with theirs:
            self.process = subprocess.Popen(
                [program, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        stack.callback(self.end)
        self.port = stack.enter_context(opened(loop, ours))
        self.helper = Helper(self.port, check=fine, patience=SECONDS, quiet_seconds=QUIET)
        wait_for(lambda: self.helper.is_there)

    def end(self):
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def real(program, loop):
    with ExitStack() as stack:
        yield Real(program, loop, stack)


@pytest.fixture
def helper(real):
    yield real.helper
    assert real.process.poll() is None  # whatever has happened, it lives
    real.helper.ping()
    assert real.helper._replies == {}


def start(helper, *argv, **more):
    return helper.start(Command(argv=argv, **more), USER)


def sh(helper, script, **more):
    return start(helper, "sh", "-c", script, **more)


def run(process, data=None, timeout=SECONDS):
    """Status, standard output, standard error; then it is closed."""
    out, err = bytearray(), bytearray()
    try:
        stdin = None if data is None else io.BytesIO(data)
        status = process.communicate(stdin, out.extend, err.extend, timeout)
    finally:
        process.close()
    return status, bytes(out), bytes(err)


class TestStart:
    def test_output_and_status(self, helper):
        assert run(sh(helper, "echo out; echo err >&2; exit 7")) == (7, b"out\n", b"err\n")
        assert helper._channels == {}

    def test_arguments(self, helper):
        words = ("a b", "", "ü", "*", "$HOME", "'", "\udcff")
        expected = b"".join(os.fsencode(word) + b"|" for word in words)
        assert run(start(helper, "printf", "%s|", *words)) == (0, expected, b"")

    def test_environment(self, helper):
        env = {"ONE": "1", "EMPTY": "", "TWO": "a=b\nc", "HOME": "/elsewhere"}
        script = 'printf "%s|" "$ONE" "${EMPTY-unset}" "$TWO" "$HOME" "$USER"'
        assert run(sh(helper, script, env=env))[1] == f"1||a=b\nc|/elsewhere|{USER}|".encode()

    def test_folder(self, helper, tmp_path):
        assert run(start(helper, "pwd", cwd=str(tmp_path)))[1] == os.fsencode(tmp_path) + b"\n"

    def test_long_arguments_go_in_parts(self, helper):
        words = [str(number) * 50 for number in range(3000)]
        assert run(start(helper, "printf", "%s", *words))[1] == "".join(words).encode()

    @pytest.mark.parametrize("command", FITS.values(), ids=FITS.keys())
    def test_long_commands(self, helper, command):
        assert run(helper.start(command, USER)) == (0, output_of(command), b"")

    @pytest.mark.parametrize("command", TOO_LONG.values(), ids=TOO_LONG.keys())
    def test_longer_commands_are_refused_as_by_subprocess(self, helper, command):
        with pytest.raises(OSError, match="Argument list too long: 'true'") as caught:
            helper.start(command, USER)
        assert caught.value.errno == errno.E2BIG

    @pytest.mark.parametrize("words", [["x" * 200_000], ["x" * 100_000] * 25])
    def test_what_only_the_guest_finds_too_long(self, helper, monkeypatch, words):
        """Its kernel may take less than usual; so may the helper."""
        monkeypatch.setattr(commands, "_check_length", lambda command: None)
        with pytest.raises(OSError, match="Argument list too long: 'true'"):
            start(helper, "true", *words)

    @pytest.mark.parametrize(
        ("argv", "status", "err"),
        [
            (["/nowhere/at-all"], 127, b"/nowhere/at-all: not found\n"),
            (["no-such-program"], 127, b"no-such-program: not found\n"),
            (["/etc/passwd"], 126, b"/etc/passwd: Permission denied\n"),
            (["/bin/sh/under"], 126, b"/bin/sh/under: Not a directory\n"),
        ],
    )
    def test_a_program_that_there_is_not_ends_as_in_a_shell(self, helper, argv, status, err):
        assert run(start(helper, *argv)) == (status, b"", err)
        process = start(helper, *argv)
        assert process.poll() == process.wait(0) == status
        assert process.stderr.read() == err
        assert process.stdout.read() == b""
        process.signal("KILL")
        process.close()

    def test_its_input_goes_nowhere(self, helper):
        assert run(start(helper, "/nowhere/at-all"), b"x" * MIB)[0] == 127

    def test_no_such_folder(self, helper):
        with pytest.raises(CommandError, match="pwd could not be started in /nowhere") as caught:
            start(helper, "pwd", cwd="/nowhere")
        assert "No such file or directory" in str(caught.value)
        assert caught.value.result.returncode == 126

    def test_no_such_user(self, helper):
        with pytest.raises(CommandError, match="true could not be started as who-is-it") as caught:
            start(helper, "true", user="who-is-it")
        assert "no such user" in str(caught.value)

    def test_no_such_login(self, helper):
        """It is one user of a guest for all commands: a mistake in what the guest is told to be."""
        with pytest.raises(ConfigError, match="user 'who-is-it' cannot log in"):
            helper.start(Command(argv=("true",)), "who-is-it")
        assert helper._channels == {}

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
    def test_another_user(self, helper):
        script = "id -un; echo $HOME"
        home = pwd.getpwnam("nobody").pw_dir
        assert run(sh(helper, script, user="nobody"))[1] == f"nobody\n{home}\n".encode()
        assert run(helper.start(Command(argv=("id", "-un")), "nobody"))[1] == b"nobody\n"

    @pytest.mark.parametrize(
        "command",
        [
            Command(argv=("a\0b",)),
            Command(argv=("true",), cwd="/\0"),
            Command(argv=("true",), env={"A": "\0"}),
            Command(argv=("true",), env={"A=B": "c"}),
            Command(argv=("true",), env={"": "c"}),
        ],
    )
    def test_what_cannot_be_a_command(self, helper, command):
        with pytest.raises(
            ValueError, match="cannot contain a NUL|is not a name for an environment variable"
        ):
            helper.start(command, USER)
        assert helper._channels == {}

    def test_more_than_there_is_room_for(self, helper):
        processes = [start(helper, "cat") for _ in range(256)]
        with pytest.raises(GuestLost, match="cannot start another program"):
            start(helper, "cat")
        for process in processes:
            process.end_input()
        for process in processes:
            assert process.wait(SECONDS) == 0
            process.close()
        assert run(start(helper, "true"))[0] == 0

    def test_a_group_of_its_own(self, helper):
        process = sh(helper, "ps -o pgid= -p $$ || cut -d' ' -f5 /proc/$$/stat")
        group = process._channel.group
        assert int(run(process)[1]) == group > 0


class TestStreams:
    def test_much_output(self, helper):
        """More than the window of a stream, on both, one after the other."""
        script = f"head -c {5 * MIB} /dev/zero; head -c {3 * MIB} /dev/zero | tr '\\0' x >&2"
        assert run(sh(helper, script)) == (0, bytes(5 * MIB), b"x" * 3 * MIB)

    def test_interleaved(self, helper):
        script = "for i in $(seq 500); do echo out $i; echo err $i >&2; done"
        status, out, err = run(sh(helper, script))
        assert status == 0
        assert out.decode().split("\n") == [*(f"out {i}" for i in range(1, 501)), ""]
        assert err.decode().split("\n") == [*(f"err {i}" for i in range(1, 501)), ""]

    def test_much_both_ways(self, helper):
        data = random.Random(1).randbytes(6 * MIB + 12345)
        assert run(start(helper, "cat"), data) == (0, data, b"")

    def test_two_at_a_time_do_not_mix(self, helper):
        data = [random.Random(seed).randbytes(2 * MIB) for seed in range(3)]
        results = {}

        def use(number):
            results[number] = run(start(helper, "cat"), data[number])

        threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert [results[number] == (0, data[number], b"") for number in range(3)] == [True] * 3

    def test_input_that_nobody_reads(self, helper):
        assert run(sh(helper, "exec <&-; echo done"), b"x" * 5 * MIB) == (0, b"done\n", b"")
        assert run(start(helper, "true"), b"x" * 5 * MIB)[0] == 0
        assert run(start(helper, "head", "-c", "3"), b"abc" * MIB)[1] == b"abc"

    def test_input_that_is_broken(self, helper):
        class Broken(io.RawIOBase):
            def readable(self):
                return True

            def read(self, size=-1):
                raise KeyError("mine")

        process = start(helper, "sleep", "1000")
        with pytest.raises(KeyError, match="mine"):
            process.communicate(Broken(), fine_bytes, fine_bytes, SECONDS)
        process.close()
        wait_for(lambda: not alive(process._channel.group))

    def test_a_reader_that_takes_nothing_stops_the_writer(self, helper):
        """And nothing beyond the window is kept here."""
        process = start(helper, "yes")
        channel = process._channel
        wait_for(lambda: len(channel._streams[1]) == MIB)
        time.sleep(0.05)
        assert len(channel._streams[1]) == MIB
        helper.ping()  # others are not stopped
        process.signal("KILL")
        assert process.wait(SECONDS) == -9
        assert process.stdout.read().startswith(b"y\ny\n")
        process.close()

    def test_reading_gives_the_window_back(self, helper):
        process = sh(helper, f"head -c {4 * MIB} /dev/zero")
        total = 0
        while data := process.receive(SECONDS):
            total += len(data)
        assert total == 4 * MIB
        assert process.wait(SECONDS) == 0
        process.close()

    def test_a_slow_reader_of_one_stream_does_not_stop_the_other(self, helper):
        process = sh(
            helper,
            f"head -c {2 * MIB} /dev/zero 2>&- & head -c {3 * MIB} /dev/zero >&2; exec 2>&-; wait",
        )
        assert len(process.stderr.read()) == 3 * MIB
        assert len(process.stdout.read()) == 2 * MIB
        process.close()


def fine_bytes(data):
    """Take output."""


class TestStepByStep:
    def test_poll_and_wait(self, helper):
        process = sh(helper, "read line; exit 5")
        assert process.poll() is None
        process.send(b"go\n")
        assert process.wait(SECONDS) == 5
        assert process.poll() == 5
        process.close()

    def test_waiting_too_short_leaves_it_running(self, helper):
        process = start(helper, "cat")
        with pytest.raises(CommandTimeout, match=r"cat still runs after 0\.05 s"):
            process.wait(0.05)
        assert process.poll() is None
        process.send(b"still here")
        assert process.receive(SECONDS) == b"still here"
        process.end_input()
        assert process.wait(SECONDS) == 0
        process.close()

    def test_a_dialogue(self, helper):
        process = sh(helper, 'while read line; do echo "<$line>"; done; echo end >&2')
        for word in ("one", "two", "three"):
            process.send(f"{word}\n".encode())
            assert process.receive(SECONDS) == f"<{word}>\n".encode()
        process.end_input()
        assert process.receive(SECONDS) == b""
        assert process.stderr.read() == b"end\n"
        process.end_input()  # again, which means nothing
        process.close()

    def test_streams_as_files(self, helper):
        with start(helper, "sort").stdin as stdin:
            stdin.write(b"b\n")
        process = start(helper, "sort")
        with process.stdin as stdin:
            stdin.write(b"2\n1\n")
            stdin.flush()
            stdin.write(b"3\n")
        assert process.stdout.readline() == b"1\n"
        process.close()

    def test_lines(self, helper):
        process = sh(helper, "seq 10000")
        assert [int(line) for line in process.stdout] == list(range(1, 10001))
        process.close()

    def test_nothing_comes(self, helper):
        process = start(helper, "cat")
        with pytest.raises(TimeoutError):
            process.receive(0)
        process.close()

    def test_writing_to_one_that_has_ended(self, helper):
        process = start(helper, "true")
        process.wait(SECONDS)
        wait_for(lambda: process._channel.is_done)
        with pytest.raises(BrokenPipeError):
            process.send(bytes(MIB))
        process.close()

    def test_writing_to_one_that_does_not_read(self, helper):
        process = start(helper, "sleep", "1000")
        with pytest.raises(TimeoutError):
            process.send(bytes(MIB), timeout=0)
        process.signal("KILL")
        process.close()

    @pytest.mark.parametrize(("name", "number"), [("TERM", 15), ("KILL", 9), ("HUP", 1)])
    def test_signals(self, helper, name, number):
        process = start(helper, "sleep", "1000")
        process.signal(name)
        assert process.wait(SECONDS) == -number
        process.signal(name)  # it is gone: nothing happens
        process.close()

    def test_a_signal_that_is_caught(self, helper):
        process = sh(
            helper, "trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 0.01; done"
        )
        assert process.receive(SECONDS) == b"ready\n"
        process.signal("USR1")
        assert process.receive(SECONDS) == b"caught\n"
        assert process.wait(SECONDS) == 3
        process.close()

    def test_a_signal_for_one_is_none_for_others(self, helper):
        one, two = start(helper, "cat"), start(helper, "cat")
        one.signal("KILL")
        assert one.wait(SECONDS) == -9
        assert two.poll() is None
        two.end_input()
        assert two.wait(SECONDS) == 0
        one.close()
        two.close()

    def test_it_dies_by_itself(self, helper):
        assert run(sh(helper, "kill -SEGV $$"))[0] == -11

    def test_closing_leaves_it_running(self, helper, tmp_path):
        process = sh(helper, f"read line; echo $line >{tmp_path}/out; exec sleep 1000")
        process.send(b"word\n")
        group = process._channel.group
        process.close()
        process.close()
        try:
            wait_for((tmp_path / "out").exists)
            assert alive(group)
        finally:
            os.killpg(group, 9)
        assert helper._channels == {}
        with pytest.raises(BrokenPipeError):
            process.send(b"more")


class TestTimeouts:
    def test_the_whole_group_is_killed(self, helper, tmp_path):
        process = sh(helper, f"sleep 1000 & echo $! >{tmp_path}/pid; echo out; sleep 1000")
        out = bytearray()
        with pytest.raises(CommandTimeout, match=r"sh did not end within 0\.3 s and was killed"):
            process.communicate(None, out.extend, fine_bytes, 0.3)
        assert out == b"out\n"
        child = int((tmp_path / "pid").read_text())
        wait_for(lambda: not alive(child) and not alive(process._channel.group))
        process.close()

    def test_one_that_neither_takes_nor_gives(self, helper):
        process = sh(helper, "echo one; sleep 1000")
        with pytest.raises(CommandTimeout, match=r"had no input or output for 0\.2 s"):
            process.communicate(None, fine_bytes, fine_bytes, SECONDS, idle=0.2)
        wait_for(lambda: not alive(process._channel.group))
        process.close()

    def test_one_that_gives_all_the_time_is_not_idle(self, helper):
        script = "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.1; done"
        out = bytearray()
        process = sh(helper, script)
        assert process.communicate(None, out.extend, fine_bytes, SECONDS, idle=0.7) == 0
        assert out == b"1\n2\n3\n4\n5\n6\n7\n8\n"
        process.close()

    def test_input_that_is_not_taken(self, helper):
        process = start(helper, "sleep", "1000")
        with pytest.raises(CommandTimeout):
            process.communicate(io.BytesIO(bytes(MIB)), fine_bytes, fine_bytes, 0.2)
        assert threading.active_count() < 20
        process.close()
        wait_for(lambda: not alive(process._channel.group))

    def test_a_child_that_keeps_the_output_open(self, helper, tmp_path):
        """It is not waited for, once nothing comes any more; what had come is there."""
        process = sh(helper, f"sleep 1000 & echo $! >{tmp_path}/pid; echo out; exit 3")
        started = time.monotonic()
        assert run(process) == (3, b"out\n", b"")
        assert QUIET < time.monotonic() - started < 5
        os.kill(int((tmp_path / "pid").read_text()), 9)

    def test_a_child_that_goes_on_writing_for_a_while(self, helper):
        script = "(for i in 1 2 3 4 5 6; do sleep 0.1; echo $i; done) & exit 0"
        assert run(sh(helper, script)) == (0, b"1\n2\n3\n4\n5\n6\n", b"")

    def test_a_child_that_never_stops_writing(self, helper, monkeypatch, tmp_path):
        monkeypatch.setattr(process_module, "_DRAIN_SECONDS", 0.2)
        process = sh(helper, f"yes & echo $! >{tmp_path}/pid; exit 4")
        assert process.communicate(None, fine_bytes, fine_bytes, SECONDS) == 4
        os.kill(int((tmp_path / "pid").read_text()), 9)
        process.close()

    def test_who_takes_the_output_slowly_gets_all_of_it(self, helper, monkeypatch):
        monkeypatch.setattr(process_module, "_DRAIN_SECONDS", 0.2)
        taken = bytearray()

        def take(data):
            time.sleep(0.15)
            taken.extend(data)

        process = start(helper, "head", "-c", str(MIB), "/dev/zero")
        assert process.communicate(None, take, fine_bytes, SECONDS) == 0
        assert len(taken) == MIB
        process.close()

    def test_the_guest_is_looked_at(self, real, monkeypatch):
        def check():
            raise GuestLost("kernel panic", stage="kernel")

        process = start(real.helper, "sleep", "1000")
        process._check = check
        monkeypatch.setattr(process_module, "_CHECK_SECONDS", 0.01)
        for use in (
            lambda: process.communicate(None, fine_bytes, fine_bytes, SECONDS),
            lambda: process.wait(SECONDS),
            lambda: process.receive(SECONDS),
        ):
            with pytest.raises(GuestLost, match="kernel panic"):
                use()
        process.signal("KILL")
        process.close()


class TestSockets:
    @pytest.fixture
    def server(self, tmp_path):
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(SECONDS)
            server.bind(str(tmp_path / "socket"))
            server.listen()
            yield server

    def test_both_ways(self, helper, server):
        process = helper.connect(server.getsockname())
        peer, _ = server.accept()
        with peer:
            process.send(b"question")
            assert peer.recv(100) == b"question"
            peer.sendall(b"answer")
            assert process.receive(SECONDS) == b"answer"
            assert process.poll() is None
            process.end_input()
            assert peer.recv(100) == b""
            peer.sendall(b"the end")
        assert process.receive(SECONDS) == b"the end"
        assert process.receive(SECONDS) == b""
        assert process.wait(SECONDS) == 0
        process.close()

    def test_in_bulk(self, helper, server):
        data = random.Random(2).randbytes(4 * MIB)
        process = helper.connect(server.getsockname())
        peer, _ = server.accept()

        def echo():
            with peer:
                while piece := peer.recv(65536):
                    peer.sendall(piece)

        thread = threading.Thread(target=echo)
        thread.start()
        assert run(process, data) == (0, data, b"")
        thread.join(SECONDS)

    def test_closed_here(self, helper, server):
        process = helper.connect(server.getsockname())
        peer, _ = server.accept()
        with peer:
            process.close()
            peer.settimeout(SECONDS)
            assert peer.recv(100) == b""

    @pytest.mark.parametrize(
        ("path", "why"),
        [
            ("/nowhere/at/all", "No such file"),
            ("/etc/passwd", "Connection refused"),
            ("/" + "x" * 200, "name too long"),
        ],
    )
    def test_nobody_listens(self, helper, path, why):
        with pytest.raises(CommandError, match=f"nothing listens at (?s:.*){why}"):
            helper.connect(path)
        assert helper._channels == {}


class TestThreads:
    def test_many_at_once(self, helper):
        """Each of them starts, feeds, signals and asks."""
        failures = []

        def use(number):
            try:
                for step in range(5):
                    data = f"{number}.{step}".encode() * 100
                    assert run(start(helper, "cat"), data) == (0, data, b"")
                    helper.ping()
                    process = start(helper, "sleep", "1000")
                    process.signal("TERM")
                    assert process.wait(SECONDS) == -15
                    process.close()
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert failures == []
        assert helper._channels == {}


class TestEnd:
    def test_closing_loses_all_programs(self, helper):
        process = start(helper, "sleep", "1000")
        group = process._channel.group
        helper.close()
        assert not helper.is_there
        with pytest.raises(GuestLost, match="connection to the guest broke"):
            process.wait(SECONDS)
        with pytest.raises(GuestLost):
            process.communicate(None, fine_bytes, fine_bytes, SECONDS)
        assert process.receive(SECONDS) == b""
        process.close()
        os.kill(group, 9)

    def test_nothing_is_sent_to_a_frozen_guest(self, helper, monkeypatch):
        """It might wait until there is room."""
        process = start(helper, "sleep", "1000")
        monkeypatch.setattr(helper, "is_frozen", True)
        with monkeypatch.context() as patch:
            patch.setattr(helper, "post", pytest.fail)
            helper.close()
        os.kill(process._channel.group, 9)

    def test_the_guest_forgets_them(self, real):
        """So that a template holds none."""
        for _ in range(3):
            start(real.helper, "sleep", "1000")
        pids = [channel.group for channel in real.helper._channels.values()]
        folder = f"/proc/{real.process.pid}/fd"
        before = len(os.listdir(folder))
        real.helper.close()
        wait_for(lambda: len(os.listdir(folder)) == before - 9)
        assert all(map(alive, pids))
        for pid in pids:
            os.kill(pid, 9)

    def test_the_helper_is_gone(self, real):
        process = start(real.helper, "cat")
        process.send(b"x")
        # Once it answers, it holds none of the helper's descriptors any more.
        assert process.receive(SECONDS) == b"x"
        real.process.kill()
        real.process.wait()
        for use in (
            real.helper.ping,
            lambda: start(real.helper, "true"),
            lambda: process.send(b"x"),
            lambda: process.signal("KILL"),
        ):
            with pytest.raises(GuestLost, match="the guest's QEMU is gone"):
                use()
        process.close()
        real.helper.close()


class Peer:
    """The guest's end of the port, for a test to play the helper."""

    def __init__(self, sock):
        self.sock = sock
        self._buffer = bytearray()

    def send(self, kind, channel=0, payload=b""):
        self.sock.sendall(frame(kind, channel, payload))

    def hello(self, version=1):
        self.send("H", 0, struct.pack("<I", version))

    def receive(self):
        """The next frame: kind, channel, payload."""
        while len(self._buffer) < 4 or len(self._buffer) < 4 + self._size():
            received = self.sock.recv(1 << 20)
            assert received
            self._buffer += received
        size = self._size()
        kind, number = struct.unpack_from("<cI", self._buffer, 4)
        payload = bytes(self._buffer[9 : 4 + size])
        del self._buffer[: 4 + size]
        return kind.decode(), number, payload

    def _size(self):
        return struct.unpack_from("<I", self._buffer)[0]


def frame(kind, channel, payload=b""):
    return struct.pack("<IcI", 5 + len(payload), kind.encode("latin-1"), channel) + payload


class Fake:
    """Our side of a helper that a test plays."""

    def __init__(self, loop, stack, patience=SECONDS):
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        theirs.settimeout(SECONDS)
        self.peer = Peer(theirs)
        port = stack.enter_context(opened(loop, ours))
        self.helper = Helper(port, check=fine, patience=patience, quiet_seconds=QUIET)

    def during(self, work, play):
        """What `work` returns or raises while the test plays the helper."""
        results = []

        def run():
            try:
                results.append(work())
            except VMSandboxError as error:
                results.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            play()
        finally:
            thread.join(SECONDS)
        assert not thread.is_alive()
        return results[0]

    def started(self, group=77):
        """A program, as if it ran."""

        def play():
            _, number, _ = self.peer.receive()
            self.peer.send("S", number, struct.pack("<I", group))

        return self.during(lambda: start(self.helper, "some-program"), play)


@pytest.fixture
def fake(loop):
    with ExitStack() as stack:
        fake = Fake(loop, stack)
        fake.peer.hello()
        wait_for(lambda: fake.helper.is_there)
        yield fake


@pytest.fixture
def impatient(monkeypatch):
    """Nobody waits long for the cause of a broken connection."""
    monkeypatch.setattr(process_module, "_CAUSE_SECONDS", 0.05)
    monkeypatch.setattr(helper_module, "_LOOK_SECONDS", 0.01)


def reply(fake, kind, payload):
    """What the guest got, when it answers so."""
    got = []

    def play():
        got.append(fake.peer.receive())
        fake.peer.send(kind, got[0][1], payload)

    return got, play


class TestRequests:
    def test_seed(self, fake):
        got, play = reply(fake, "R", struct.pack("<i", 0))
        assert fake.during(lambda: fake.helper.seed(b"random"), play) is None
        assert (got[0][0], got[0][2]) == ("s", b"random")

    def test_hostname(self, fake):
        got, play = reply(fake, "R", struct.pack("<i", 0))
        assert fake.during(lambda: fake.helper.set_hostname("debian-13-7"), play) is None
        assert (got[0][0], got[0][2]) == ("h", b"debian-13-7")

    def test_file(self, real, tmp_path):
        real.helper.write_file(str(tmp_path / "it"), b"\0held\n")
        assert (tmp_path / "it").read_bytes() == b"\0held\n"
        with pytest.raises(GuestLost, match=r"could not write .*/no/it: No such file"):
            real.helper.write_file(str(tmp_path / "no/it"), b"")

    @pytest.mark.parametrize(
        ("ask", "what"),
        [
            (lambda helper: helper.seed(b"x"), "reseed the random numbers"),
            (lambda helper: helper.set_hostname("x"), "set the hostname"),
        ],
    )
    def test_refused(self, fake, ask, what):
        _, play = reply(fake, "R", struct.pack("<i", errno.EPERM))
        error = fake.during(lambda: ask(fake.helper), play)
        assert isinstance(error, GuestLost)
        assert f"could not {what}: Operation not permitted" in error.brief

    @pytest.mark.parametrize("payload", [b"", b"x", bytes(5), bytes(1000)])
    @pytest.mark.parametrize(
        "ask",
        [lambda it: it.seed(b"x"), lambda it: it.set_hostname("x"), lambda it: it.set_clock()],
    )
    def test_an_answer_of_the_wrong_size(self, fake, ask, payload):
        _, play = reply(fake, "R", payload)
        error = fake.during(lambda: ask(fake.helper), play)
        assert isinstance(error, GuestLost)
        assert "invalid" in error.brief

    def test_an_answer_of_the_wrong_kind(self, fake):
        _, play = reply(fake, "P", struct.pack("<i", 0))
        assert isinstance(fake.during(lambda: fake.helper.seed(b"x"), play), GuestLost)

    @pytest.mark.parametrize("behind", [0.0, 0.02, 5.0, -5.0, 1e9])
    def test_clock(self, fake, behind):
        got = []

        def play():
            got.append(fake.peer.receive())
            now = time.time() - behind
            payload = struct.pack("<iqq", 0, int(now), int(now % 1 * 1e9))
            fake.peer.send("R", got[0][1], payload)

        before = time.time()
        error = fake.during(fake.helper.set_clock, play)
        after = time.time()
        seconds, nanoseconds = struct.unpack("<qq", got[0][2])
        assert before - 1e-3 <= seconds + nanoseconds / 1e9 <= after
        assert abs(behind) - 1e-3 <= error <= abs(behind) + after - before + 1e-3

    @pytest.mark.parametrize("lead", [1e9, -3600.0])
    def test_clock_that_is_ahead(self, fake, lead):
        got = []

        def play():
            got.append(fake.peer.receive())
            now = time.time() + lead
            payload = struct.pack("<iqq", 0, int(now), int(now % 1 * 1e9))
            fake.peer.send("R", got[-1][1], payload)

        before = time.time()
        least, most = fake.during(fake.helper.read_lead, play)
        assert got[0][2] == b""  # it is only read
        assert least - 1e-3 <= lead <= most + 1e-3
        fake.helper.lead = Lead(lead)
        error = fake.during(fake.helper.set_clock, play)
        after = time.time()
        seconds, nanoseconds = struct.unpack("<qq", got[1][2])
        assert before - 1e-3 <= seconds + nanoseconds / 1e9 - lead <= after + 1e-3
        assert error <= after - before + 1e-3

    @pytest.mark.parametrize("seconds", [-1, 1 << 40, (1 << 63) - 1])
    def test_clock_of_no_time(self, fake, seconds):
        _, play = reply(fake, "R", struct.pack("<iqq", 0, seconds, 0))
        error = fake.during(fake.helper.read_lead, play)
        assert isinstance(error, GuestLost)
        assert "invalid" in error.brief

    def test_clock_is_refused(self, fake):
        _, play = reply(fake, "R", struct.pack("<iqq", errno.EPERM, 0, 0))
        error = fake.during(fake.helper.set_clock, play)
        assert "could not set the clock" in error.brief

    def test_an_answer_that_nobody_waits_for_is_dropped(self, fake):
        for number in range(1000):
            fake.peer.send("R", number, bytes(60000))
            fake.peer.send("P", number, bytes(60000))
        fake.peer.send("S", 4711, bytes(4))  # its channel has ended meanwhile
        _, play = reply(fake, "P", b"vmsandbox")
        fake.during(fake.helper.ping, play)
        assert fake.helper._replies == {}
        assert len(fake.helper._rest) == 0

    def test_no_answer(self, fake):
        with pytest.raises(GuestLost, match=r"did not answer within 0\.1 s"):
            fake.helper.ping(0.1)
        assert fake.helper._replies == {}
        _, play = reply(fake, "P", b"vmsandbox")
        fake.peer.receive()
        fake.during(fake.helper.ping, play)  # it was only slow

    def test_the_guest_is_looked_at_meanwhile(self, fake, monkeypatch):
        def check():
            raise GuestLost("kernel panic", stage="kernel")

        monkeypatch.setattr(helper_module, "_LOOK_SECONDS", 0.01)
        fake.helper.check = check
        with pytest.raises(GuestLost, match="kernel panic"):
            fake.helper.ping()
        with pytest.raises(GuestLost, match="kernel panic"):
            start(fake.helper, "true")
        assert fake.helper._channels == {}

    def test_a_guest_that_takes_nothing(self, fake, monkeypatch):
        monkeypatch.setattr(helper_module, "_SEND_SECONDS", 0.1)
        fake.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        process = fake.started()
        process._channel._room = 100 * MIB
        with pytest.raises(GuestLost, match=r"read nothing for 0\.1 s"):
            process.send(bytes(50 * MIB))


class TestHello:
    def test_again(self, fake, impatient):
        """It was started anew: what it ran before, nobody knows."""
        process = fake.started()
        fake.peer.hello()
        assert process.receive(SECONDS) == b""
        with pytest.raises(GuestLost, match="connection to the guest broke while a program ran"):
            process.wait(SECONDS)
        with pytest.raises(BrokenPipeError):
            process.send(b"x")
        process.signal("KILL")
        process.end_input()
        process.close()
        assert fake.started().poll() is None  # new ones can be had

    def test_while_a_program_is_started(self, fake):
        def play():
            fake.peer.receive()
            fake.peer.hello()

        error = fake.during(lambda: start(fake.helper, "true"), play)
        assert isinstance(error, GuestLost)
        assert "restarted" in error.brief

    def test_while_output_is_pumped(self, fake, impatient):
        process = fake.started()
        number = process._channel.number
        out = bytearray()

        def play():
            fake.peer.send("o", number, b"\1output")
            wait_for(lambda: out)
            fake.peer.hello()

        error = fake.during(
            lambda: process.communicate(None, out.extend, fine_bytes, SECONDS), play
        )
        assert isinstance(error, GuestLost)
        assert out == b"output"

    def test_of_another_version(self, fake):
        fake.peer.hello(version=2)
        with pytest.raises(GuestLost, match="invalid data"):
            fake.helper.ping()

    def test_none(self, loop):
        with ExitStack() as stack:
            fake = Fake(loop, stack, patience=0.05)
            assert not fake.helper.is_there
            with pytest.raises(GuestLost, match="did not answer"):
                fake.helper.ping()

    def test_one_that_came_before_anybody_listened(self, loop):
        with ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            stack.enter_context(theirs)
            port = stack.enter_context(opened(loop, ours))
            theirs.sendall(frame("H", 0, struct.pack("<I", 1)))
            wait_for(lambda: port._early)
            helper = Helper(port, check=fine, patience=SECONDS, quiet_seconds=QUIET)
            assert helper.is_there


STALE = [
    b"",
    b"x",
    frame("o", 3, b"\1half of this")[:-4],
    frame("o", 3, b"\1all of it") + frame("z", 3, bytes(4)),
    frame("o", 3, bytes(30000)),
    b"\xff" * 5000,
]


class TestAssume:
    """A clone's helper goes on with what it was about to tell somebody else."""

    def test_it_is_there_at_once(self, loop):
        with ExitStack() as stack:
            fake = Fake(loop, stack)
            fake.helper.assume()
            assert fake.helper.is_there

    @pytest.mark.parametrize("stale", STALE)
    def test_stale_bytes_are_skipped(self, loop, stale):
        with ExitStack() as stack:
            fake = Fake(loop, stack)
            fake.helper.assume()
            kind, number, token = fake.peer.receive()
            assert (kind, number, len(token)) == ("p", 0, 16)
            answer = frame("P", 0, token)
            assert heard(fake, stale + answer) == (b"vmsandbox", b"output")

    @pytest.mark.parametrize("stale", STALE[:4])
    def test_split_at_any_place(self, stale):
        """Straight into what takes the bytes, so that each piece comes alone."""
        answer_size = len(frame("P", 0, bytes(16)))
        for place in range(len(stale) + answer_size + 10):
            fed = Fed()
            fed.helper.assume()
            after = frame("P", 1, b"for us")
            fed.helper._replies[1] = None
            data = stale + frame("P", 0, fed.sent[0][9:]) + after
            for piece in (data[:place], data[place:]):
                if piece:
                    fed.feed(piece)
            assert fed.helper._replies[1] == (ord("P"), b"for us")
            assert fed.helper._rest == b""
            assert fed.helper._broken == ""

    @given(data=st.data(), stale=st.binary(max_size=200))
    @settings(deadline=None, max_examples=50)
    def test_in_any_pieces(self, data, stale):
        fed = Fed()
        fed.helper.assume()
        fed.helper._replies[1] = None
        everything = stale + frame("P", 0, fed.sent[0][9:]) + frame("P", 1, b"for us")
        cuts = data.draw(st.lists(st.integers(0, len(everything)), max_size=20).map(sorted))
        for begin, end in zip([0, *cuts], [*cuts, len(everything)], strict=True):
            fed.feed(everything[begin:end])
        assert fed.helper._replies[1] == (ord("P"), b"for us")

    def test_numbers_are_not_those_that_it_may_know(self):
        numbers = set()
        for _ in range(5):
            fed = Fed()
            fed.helper.assume()
            numbers.add(fed.helper._send_request(b"p", b""))
        assert len(numbers) == 5

    def test_one_that_does_not_stop_is_given_up(self, monkeypatch):
        monkeypatch.setattr(helper_module, "_MAX_SKIPPED", 100_000)
        fed = Fed()
        fed.helper.assume()
        for _ in range(50):
            fed.feed(bytes(10_000))
        assert len(fed.helper._rest) < 120_000
        with pytest.raises(GuestLost, match="went on sending old data"):
            fed.helper.ping()


def heard(fake, data):
    """What comes after `data`: of an answer, and of a program."""
    fake.peer.sock.sendall(data)
    got = []

    def ping():
        number = fake.helper._send_request(b"p", b"vmsandbox")
        got.append(fake.helper._await(number, None)[1])

    def play():
        _, number, payload = fake.peer.receive()
        fake.peer.send("P", number, payload)

    fake.during(ping, play)
    process = fake.started()
    fake.peer.send("o", process._channel.number, b"\1output")
    return got[0], process.receive(SECONDS)


class Fed:
    """A helper without a port: what it sends is kept, and it is fed."""

    def __init__(self):
        self.sent = []
        self.helper = Helper(self, check=fine, patience=0.05, quiet_seconds=QUIET)  # type: ignore[arg-type]

    def listen(self, feed):
        self.feed = feed

    def send(self, data, timeout):
        self.sent.append(bytes(data))

    def channel(self):
        """The number of one on which a program seems to run."""
        number = next(self.helper._numbers)
        channel = helper_module.HelperChannel(self.helper, number, 1)
        self.helper._channels[number] = channel
        self.feed(frame("S", number, struct.pack("<I", 5)))
        return channel


def fed():
    fed = Fed()
    fed.feed(frame("H", 0, struct.pack("<I", 1)))
    return fed


NONSENSE = [
    struct.pack("<I", 0) + bytes(20),
    struct.pack("<I", 4) + bytes(20),
    struct.pack("<I", 5 + 65537) + bytes(20),
    b"\xff" * 9,
    frame("H", 0),
    frame("H", 0, bytes(5)),
    frame("H", 0, struct.pack("<I", 9)),
    *(frame(kind, 1, payload) for kind in "SFaz" for payload in (b"", bytes(3), bytes(9))),
    frame("o", 1),
    frame("q", 1),
    frame("o", 1, b"\0x"),
    frame("o", 1, b"\3x"),
    frame("?", 1),
    frame("\xff", 1),
    frame("o", 1, b"\1" + bytes(40000)) * 27,
    frame("q", 1, b"\1") + frame("o", 1, b"\1late"),
]


class TestNonsense:
    """What a hostile guest could send."""

    @pytest.mark.parametrize("data", NONSENSE, ids=range(len(NONSENSE)))
    def test_is_the_end(self, data, impatient):
        it = fed()
        channel = it.channel()
        assert channel.number == 1
        it.feed(data)
        assert channel.closed
        with pytest.raises(GuestLost, match="invalid data"):
            it.helper.ping()
        with pytest.raises(GuestLost, match="invalid data"):
            start(it.helper, "true")
        assert it.helper._channels == {}

    def test_is_the_end_for_who_waits(self, fake, impatient):
        process = fake.started()
        error = fake.during(
            lambda: process.communicate(None, fine_bytes, fine_bytes, SECONDS),
            lambda: fake.peer.sock.sendall(b"\xff" * 100),
        )
        assert isinstance(error, GuestLost)

    def test_while_a_program_is_started(self, fake):
        def play():
            fake.peer.receive()
            fake.peer.sock.sendall(b"\xff" * 100)

        error = fake.during(lambda: start(fake.helper, "true"), play)
        assert isinstance(error, GuestLost)
        assert "invalid data" in error.brief

    def test_nothing_is_kept_after_it(self):
        it = fed()
        for _ in range(100):
            it.feed(b"\xff" * 65536)
        assert len(it.helper._rest) <= 65536

    @given(data=st.lists(st.binary(max_size=300), max_size=10))
    @settings(deadline=None, max_examples=100)
    def test_any_bytes(self, data):
        """Nothing is raised where they are read: that thread is everybody's."""
        it = fed()
        it.channel()
        for piece in data:
            it.feed(piece)
        assert len(it.helper._rest) <= 70_000

    @given(
        frames=st.lists(
            st.tuples(st.sampled_from("HSFoqabzPR?"), st.integers(0, 3), st.binary(max_size=20)),
            max_size=20,
        )
    )
    @settings(deadline=None, max_examples=200)
    def test_any_frames(self, frames):
        it = fed()
        channels = [it.channel() for _ in range(2)]
        it.helper._replies[3] = None
        it.feed(b"".join(frame(*parts) for parts in frames))
        for channel in channels:
            assert sum(map(len, channel._streams.values())) <= 2 * MIB
            assert 0 <= channel._room <= 65536
            channel.has_output(process_module.STDOUT)

    def test_output_beyond_the_window(self):
        """A guest cannot make us keep more than was asked for."""
        it = fed()
        channel = it.channel()
        for _ in range(100):
            it.feed(frame("o", 1, b"\1" + bytes(32768)))
        assert len(channel._streams[1]) <= MIB
        assert it.helper._broken

    def test_more_acknowledged_than_was_sent(self):
        it = fed()
        channel = it.channel()
        for _ in range(10):
            it.feed(frame("a", 1, struct.pack("<I", 0xFFFFFFFF)))
        assert channel.send(bytes(MIB)) == 65536

    def test_an_impossible_signal(self):
        it = fed()
        channel = it.channel()
        it.feed(frame("z", 1, struct.pack("<i", -(2**31))))
        assert channel.status == -process_module.UNKNOWN_SIGNAL

    def test_the_reading_thread_survives(self, fake):
        """A helper that goes mad does not harm the next one."""
        fake.peer.sock.sendall(frame("o", 1) + b"\xff" * 70000)
        with pytest.raises(GuestLost), suppress(AssertionError):
            fake.helper.ping(0.05)


class TestPort:
    def test_keeps_what_comes_before_anybody_listens(self, loop):
        ours, theirs = socket.socketpair()
        with ours, theirs, opened(loop, ours) as port:
            theirs.sendall(b"early")
            wait_for(lambda: port._early == b"early")
            got = bytearray()
            port.listen(got.extend)
            theirs.sendall(b" late")
            wait_for(lambda: got == b"early late")
            assert port._early == b""

    def test_frames_of_several_threads_do_not_mix(self, loop):
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with ours, theirs, opened(loop, ours) as port:
            words = [bytes([65 + number]) * 50_000 for number in range(6)]
            threads = [threading.Thread(target=port.send, args=(it, SECONDS)) for it in words]
            for thread in threads:
                thread.start()
            data = bytearray()
            theirs.settimeout(SECONDS)
            while len(data) < 300_000:
                data += theirs.recv(65536)
            for thread in threads:
                thread.join(SECONDS)
            assert sorted(re.findall(rb"(.)\1*", bytes(data))) == [
                b"A",
                b"B",
                b"C",
                b"D",
                b"E",
                b"F",
            ]

    def test_the_other_end_is_gone(self, loop):
        ours, theirs = socket.socketpair()
        with ours, opened(loop, ours) as port:
            theirs.close()
            with pytest.raises(GuestLost, match="the guest's QEMU is gone"):
                port.send(b"x", SECONDS)
