"""Processes that the launcher spawns and owns: real ones, and really killed."""

import gc
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.machine import launcher as launcher_program
from pytest_vmsandbox.machine.loop import LoopThread
from pytest_vmsandbox.machine.process import Identity, Launcher

ENV = {"PATH": os.defpath}
PAUSE = ["/bin/sh", "-c", "exec sleep 1000"]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def launcher(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with Launcher(folder) as launcher:
        with sh(launcher, "exit 0") as process:  # from here on it is up
            process.wait(10)
        yield launcher


def sh(launcher, script, **more):
    return launcher.spawn(["/bin/sh", "-c", script], fds={}, env=ENV, **more)


@contextmanager
def watched(*pids):
    """Descriptors of processes; a pid alone may be somebody else's by now."""
    with ExitStack() as stack:
        fds = [os.pidfd_open(pid) for pid in pids]
        for fd in fds:
            stack.callback(os.close, fd)
        yield fds


def ends(*pidfds, seconds=10):
    """Whether all of them end in time."""
    return all(select.select([fd], [], [], seconds)[0] for fd in pidfds)


def launcher_pid(owner):
    """The child of `owner` that runs the launcher's program."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            argv = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent) == owner and any(word.endswith(b"launcher.py") for word in argv):
            found.append(int(entry.name))
    (pid,) = found
    return pid


def idle_descriptors(pid):
    """The descriptors of a launcher without guests, once it has closed the last one's."""
    deadline = Deadline(10)
    while True:
        found = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
        if found[-1] < launcher_program.FIRST_FREE_FD or deadline.expired:
            return found


class TestSpawn:
    @pytest.mark.parametrize(
        ("script", "status"),
        [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -9 $$", -9), ("kill -6 $$", -6)],
    )
    def test_tells_the_exit_status(self, launcher, script, status):
        with sh(launcher, script) as process:
            assert process.wait(10) == status
            assert process.wait(0) == status

    def test_runs_on_and_is_killed_at_the_end(self, launcher):
        with ExitStack() as stack:
            with sh(launcher, "exec sleep 1000") as process:
                fds = stack.enter_context(watched(process.pid))
                assert process.wait(0) is None
                assert not ends(*fds, seconds=0)
            assert ends(*fds, seconds=0)

    def test_is_sent_signals(self, launcher):
        with sh(launcher, "exec sleep 1000") as process:
            process.signal(signal.SIGTERM)
            assert process.wait(10) == -signal.SIGTERM
            process.signal(signal.SIGTERM)  # it is gone: nothing happens

    def test_tells_the_end_of_what_it_wrote(self, launcher):
        with sh(launcher, "echo out; echo oops >&2; exit 1") as process:
            process.wait(10)
            assert process.stderr_tail == "out\noops\n"

    def test_keeps_only_the_end(self, launcher):
        with sh(
            launcher, "head -c 100000 /dev/zero | tr '\\0' x; echo; printf '\\377end'"
        ) as process:
            process.wait(10)
            assert process.stderr_tail.endswith("x\n\ufffdend")
            assert len(process.stderr_tail) < 10_000

    def test_one_who_looks_does_not_wait_for_one_who_waits(self, launcher):
        with sh(launcher, "exec sleep 1000") as process:
            waiting = threading.Thread(target=process.wait, args=(10,))
            waiting.start()
            while not process._lock.locked():
                pass
            assert process.wait(0) is None
            assert waiting.is_alive()
            process.signal(signal.SIGKILL)
            waiting.join()
            assert process.wait(0) == -9

    def test_is_known_after_its_end(self, launcher):
        with sh(launcher, "echo oops; kill -9 $$") as process:
            pass
        assert process.wait(0) == process.wait(1) == -9
        assert process.stderr_tail in {"", "oops\n"}  # it was killed, maybe early
        with sh(launcher, "echo oops; exit 3") as process:
            process.wait(10)
        assert (process.wait(0), process.stderr_tail) == (3, "oops\n")

    def test_what_it_writes_is_read_without_getting_in_its_way(self, launcher):
        read, write = os.pipe()
        script = "echo one; read x; echo two"
        with launcher.spawn(["/bin/sh", "-c", script], fds={0: read}, env=ENV) as process:
            os.close(read)
            while process.stderr_tail != "one\n":
                pass
            os.close(write)
            process.wait(10)
            assert process.stderr_tail == "one\ntwo\n"

    @pytest.mark.parametrize("limit", [3, 201])
    def test_a_launcher_without_descriptors_lives_on(self, launcher, limit):
        pid = launcher_pid(os.getpid())
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        open_files = idle_descriptors(pid)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
        with pytest.raises(LaunchError, match="could not be started"), sh(launcher, "exit 0"):
            pass
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        with sh(launcher, "exit 4") as process:
            assert process.wait(10) == 4
        launcher.check()
        assert idle_descriptors(pid) == open_files

    def test_a_launcher_that_cannot_fork_lives_on(self, monkeypatch):
        def fork():
            raise BlockingIOError(11, "no more processes")

        monkeypatch.setattr(os, "fork", fork)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        before = os.listdir("/proc/self/fd")
        status, theirs = os.pipe()
        guests = {}
        launcher_program.spawn({"spawn": 1, "fds": [1]}, [theirs, os.dup(1)], guests)
        with os.fdopen(status) as file:
            assert "no more processes" in json.loads(file.read())["error"]
        assert os.listdir("/proc/self/fd") == before
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        assert guests == {}

    @pytest.mark.parametrize("program", ["/nowhere/program", "/etc/passwd", "/etc"])
    def test_a_program_that_cannot_be_started(self, launcher, program):
        with (  # noqa: PT012  # either of the two raises
            pytest.raises(LaunchError, match=f"{program} could not be started"),
            launcher.spawn([program], fds={}, env=ENV) as process,
        ):
            process.wait(10)
            process.wait(10)
        with sh(launcher, "exit 4") as process:
            assert process.wait(10) == 4

    def test_has_the_environment_it_is_given_and_no_other(self, launcher):
        argv = ["/usr/bin/env"]
        with launcher.spawn(argv, fds={}, env={"A": "ü b"}) as process:
            process.wait(10)
            assert process.stderr_tail == "A=ü b\n"

    def test_has_its_descriptors_at_their_numbers_and_no_others(self, launcher):
        script = """
            import os
            os.write(12, os.read(7, 100).upper())
            numbers = [int(name) for name in os.listdir("/proc/self/fd")]
            numbers = [n for n in numbers if os.path.exists(f"/proc/self/fd/{n}")]
            os.write(12, str(sorted(numbers)).encode())
        """
        argv = [sys.executable, "-ISc", textwrap.dedent(script)]
        theirs, ours = os.pipe()
        answer, result = os.pipe()
        os.write(ours, b"ping ")
        with launcher.spawn(argv, fds={12: result, 7: theirs}, env=ENV) as process:
            os.close(result)
            assert process.wait(10) == 0, process.stderr_tail
        with os.fdopen(answer, "rb") as file:
            assert file.read() == b"PING [0, 1, 2, 7, 12]"
        os.close(theirs)
        os.close(ours)

    @pytest.mark.parametrize("count", [60, 64, 195, 252, 253, 300])
    def test_has_many_descriptors(self, launcher, count):
        numbers = range(6, 6 + count)
        script = f"""
            import os
            for number in range(6, {6 + count}):
                assert os.fstat(number).st_size == number, number
        """
        argv = [sys.executable, "-ISc", textwrap.dedent(script)]
        with ExitStack() as stack:
            fds = {}
            for number in numbers:
                file = stack.enter_context(tempfile.TemporaryFile())
                file.truncate(number)
                fds[number] = file.fileno()
            with launcher.spawn(argv, fds=fds, env=ENV) as process:
                assert process.wait(10) == 0, process.stderr_tail
        with sh(launcher, "exit 4") as process:
            assert process.wait(10) == 4

    def test_descriptors_may_swap_their_numbers(self, launcher):
        with ExitStack() as stack:
            pipes = [os.pipe() for _ in range(2)]
            for fd in (fd for pipe in pipes for fd in pipe):
                stack.callback(os.close, fd)
            (a, a_end), (b, b_end) = pipes
            os.write(a_end, b"a")
            os.write(b_end, b"b")
            script = f"import os; print((os.read({a}, 1) + os.read({b}, 1)).decode())"
            argv = [sys.executable, "-ISc", script]
            with launcher.spawn(argv, fds={a: b, b: a}, env=ENV) as process:
                assert process.wait(10) == 0
                assert process.stderr_tail == "ba\n"

    def test_has_default_signals_and_a_session_of_its_own(self, launcher):
        with sh(launcher, "exec cat /proc/self/stat /proc/self/status") as process:
            process.wait(10)
            stat, *status = process.stderr_tail.splitlines()
            assert int(stat.rpartition(")")[2].split()[3]) == process.pid
        for name in ("SigIgn", "SigBlk"):
            line = next(line for line in status if line.startswith(name))
            assert int(line.split()[1], 16) & (1 << 31) - 1 == 0  # 32 and up are the C library's

    def test_reads_nothing(self, launcher):
        with sh(launcher, "cat") as process:
            assert process.wait(10) == 0

    @AS_ROOT
    def test_becomes_another_user(self, launcher):
        identity = Identity(uid=61200, gid=61201, groups=(61202,))
        with sh(launcher, "id -u; id -g; id -G", identity=identity) as process:
            process.wait(10)
            assert process.stderr_tail.split() == ["61200", "61201", "61201", "61202"]

    @AS_ROOT
    def test_dies_with_the_launcher_as_another_user_too(self, launcher):
        identity = Identity(uid=61200, gid=61200)
        with (
            sh(launcher, "exec sleep 1000", identity=identity) as process,
            watched(process.pid) as fds,
        ):
            os.kill(launcher_pid(os.getpid()), signal.SIGKILL)
            assert ends(*fds)

    def test_several_at_once(self, launcher):
        with ExitStack() as stack:
            processes = [stack.enter_context(sh(launcher, f"exit {n}")) for n in range(8)]
            assert [process.wait(10) for process in processes] == list(range(8))

    def test_from_several_threads(self, launcher):
        statuses = []

        def run(number):
            with sh(launcher, f"exit {number}") as process:
                statuses.append(process.wait(10))

        threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == list(range(6))


class TestLauncher:
    def test_ignores_what_a_terminal_sends(self, launcher):
        pid = launcher_pid(os.getpid())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            os.kill(pid, number)
        with sh(launcher, "exit 5") as process:
            assert process.wait(10) == 5
        assert launcher_pid(os.getpid()) == pid

    def test_ends_all_it_owns_and_removes_the_folder(self, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "key").touch()
        with ExitStack() as stack:
            with Launcher(folder) as launcher:
                process = stack.enter_context(launcher.spawn(PAUSE, fds={}, env=ENV))
                fds = stack.enter_context(watched(process.pid, launcher_pid(os.getpid())))
            assert ends(*fds)
            assert process.wait(10) == -9
            assert not folder.exists()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_removes_what_a_killed_owner_had_elsewhere(self, tmp_path, number):
        """Folders that links in the run's folder lead to, and nothing beside them."""
        for name in ("run", "logs/guests-1/tiny-1", "logs/of-a-test"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "run" / "owned-1").symlink_to(tmp_path / "logs" / "guests-1")
        (tmp_path / "run" / "owned-2").symlink_to(tmp_path / "gone")
        source = f"""
            from pathlib import Path
            from pytest_vmsandbox.machine.process import Launcher
            with Launcher(Path({str(tmp_path / "run")!r})) as launcher:
                with launcher.spawn(["/bin/sleep", "0"], fds={{}}, env={{}}) as process:
                    process.wait(10)
                print("up", flush=True)
                input()
        """
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as owner:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"up\n"
            with watched(launcher_pid(owner.pid)) as fds:
                owner.send_signal(number)
                assert ends(*fds)
        assert [it.name for it in (tmp_path / "logs").iterdir()] == ["of-a-test"]
        assert not (tmp_path / "run").exists()

    def test_killed_takes_all_with_it(self, launcher):
        with launcher.spawn(PAUSE, fds={}, env=ENV) as process:
            with watched(process.pid) as fds:
                os.kill(launcher_pid(os.getpid()), signal.SIGKILL)
                assert ends(*fds)
            assert process.wait(10) == -9
            with pytest.raises(LaunchError, match="the launcher process is gone") as caught:
                launcher.check()
            assert "out-of-memory" in caught.value.remedy
            assert caught.value.transient
            process.signal(signal.SIGTERM)  # nothing happens

    def test_one_that_was_killed_is_replaced(self, launcher):
        """The next program has a launcher of its own, and what the former one had is over."""
        with launcher.spawn(PAUSE, fds={}, env=ENV) as lost:
            former = launcher_pid(os.getpid())
            os.kill(former, signal.SIGKILL)
            assert lost.wait(10) == -9
            with launcher.spawn(PAUSE, fds={}, env=ENV) as process:
                assert launcher_pid(os.getpid()) != former
                assert process.wait(0) is None
                lost.signal(signal.SIGKILL)  # it is nobody's number now
                assert process.wait(0.1) is None
                process.signal(signal.SIGTERM)
                assert process.wait(10) == -15

    def test_killed_before_it_obeys(self, launcher):
        pid = launcher_pid(os.getpid())
        os.kill(pid, signal.SIGSTOP)

        def kill():
            os.kill(pid, signal.SIGKILL)

        killer = threading.Timer(0.05, kill)  # by then the message waits in the socket
        killer.start()
        with (
            pytest.raises(LaunchError, match="could not be started: the launcher process is gone"),
            launcher.spawn(PAUSE, fds={}, env=ENV),
        ):
            pass
        killer.join()


OWNER = """
    import json, os, signal, sys
    from pathlib import Path
    from pytest_vmsandbox.machine.hypervisor import Hypervisor

    root = Path(sys.argv[1])
    with Hypervisor.running(runtime=root / "runtime", cache=root / "cache") as hypervisor:
        env = {"PATH": os.defpath}
        argv = ["/bin/sh", "-c", "exec sleep 1000"]
        with hypervisor.launcher.spawn(argv, fds={}, env=env) as process:
            child = 0
            if "fork" in sys.argv:
                child = os.fork()  # it holds all that we hold
                if child == 0:
                    signal.pause()
            told = {"guest": process.pid, "child": child, "folder": str(hypervisor.folder)}
            print(json.dumps(told), flush=True)
            signal.pause()
"""


class TestDeathOfTheOwner:
    @contextmanager
    def owner(self, tmp_path, *args):
        argv = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(OWNER), str(tmp_path), *args]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                told = json.loads(process.stdout.readline())
                yield process, told
            finally:
                process.kill()

    @pytest.mark.parametrize("args", [(), ("fork",)], ids=["alone", "a child holds the socket"])
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_nothing_is_left(self, tmp_path, number, args):
        with self.owner(tmp_path, *args) as (process, told):
            folder = Path(told["folder"])
            assert folder.is_dir()
            with watched(told["guest"], launcher_pid(process.pid)) as fds:
                if told["child"]:
                    os.kill(told["child"], 0)
                try:
                    process.send_signal(number)
                    process.wait(10)
                    assert ends(*fds)
                    assert not folder.exists()
                    if told["child"]:
                        os.kill(told["child"], 0)
                finally:
                    if told["child"]:
                        os.kill(told["child"], signal.SIGKILL)

    def test_a_stopped_owner_is_not_a_dead_one(self, tmp_path):
        with self.owner(tmp_path) as (process, told):
            process.send_signal(signal.SIGSTOP)
            with watched(told["guest"]) as fds:
                assert not ends(*fds, seconds=0.05)
            process.send_signal(signal.SIGCONT)


class TestLoop:
    def test_hands_on_what_arrives(self):
        got = bytearray()
        arrived = threading.Event()

        def feed(data):
            got.extend(data)
            if got.endswith(b"\n"):
                arrived.set()

        ours, theirs = socket.socketpair()
        with ours, theirs, LoopThread() as loop, loop.reading(ours, feed):
            theirs.sendall(b"x" * 100_000 + b"\n")
            assert arrived.wait(10)
        assert len(got) == 100_001

    def test_nothing_that_arrived_before_the_end_is_lost(self):
        got = bytearray()
        ours, theirs = socket.socketpair()
        with ours, theirs, LoopThread() as loop:
            with loop.reading(ours, got.extend):
                theirs.sendall(b"last words")
            assert got == b"last words"

    def test_the_other_end_may_close(self):
        got = bytearray()
        ours, theirs = socket.socketpair()
        with ours, LoopThread() as loop, loop.reading(ours, got.extend):
            theirs.sendall(b"bye")
            theirs.close()
        assert got == b"bye"

    def test_its_thread_is_gone_afterwards(self):
        with LoopThread():
            assert any(thread.name == "vmsandbox-loop" for thread in threading.enumerate())
        assert not any(thread.name == "vmsandbox-loop" for thread in threading.enumerate())

    @pytest.mark.filterwarnings("error")
    def test_what_comes_after_its_end_is_no_warning(self):
        async def work():
            pass

        with LoopThread() as loop:
            pass
        with pytest.raises(RuntimeError, match="closed"):
            loop.submit(work())
        gc.collect()
