"""`vmsandbox enter` and the console at our terminal, with guests that are played; none is started."""

from __future__ import annotations

import os
import pty
import shlex
import socket
import subprocess
import sys
import termios
import threading
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from pytest_vmsandbox import cli
from pytest_vmsandbox.cli import enter, terminal, woken
from pytest_vmsandbox.core import foreground
from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import GuestLost
from pytest_vmsandbox.guests.kept import KeptStore
from pytest_vmsandbox.machine.console import Console
from support import made_kept

NODEID = "tests/test_x.py::test_y[a b-tiny]"


class Played:
    """A guest that answers, and notes what is done to it."""

    name = "tiny-1"
    ssh_command = "ssh -o Port=1 root@127.0.0.1"
    folders: tuple[str, ...] = ("/root/the project",)

    def __init__(self, kept, wait):
        self.kept, self.wait = kept, wait
        machines = SimpleNamespace(faults=SimpleNamespace(unrestored=[]))
        self.engine = SimpleNamespace(loss=None, machines=machines)

    def run(self, argv, check):
        assert (argv[:2], check) == (["test", "-d"], False)
        return SimpleNamespace(returncode=0 if argv[2] in self.folders else 1)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def calls(monkeypatch):
    """What was called: programs by `attach`, and programs on this machine."""
    found: dict[str, list[Any]] = {"entered": [], "attach": [], "run": []}

    @contextmanager
    def entered(_backend, group, *, wait=True):
        guests = [Played(kept, wait) for kept in group]
        found["entered"] += guests
        yield guests

    def attach(_guest, *rest):
        found["attach"].append(rest)
        return 7

    def run(words):
        found["run"].append(words)
        return -15

    monkeypatch.setattr(enter, "all_entered", entered)
    monkeypatch.setattr(enter, "attach", attach)
    monkeypatch.setattr(foreground, "run", run)
    return found


@pytest.fixture
def invoke(cache, monkeypatch, calls):
    monkeypatch.setenv("VMSANDBOX_CACHE", str(cache))
    told: dict[str, Any] = (
        {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    )
    return lambda *arguments: CliRunner(**told).invoke(cli.application, ["enter", *arguments])


class TestCommand:
    def test_its_status_and_words_are_passed_on(self, invoke, cache, calls):
        made_kept.add(cache, NODEID)
        done = invoke("test_y[a b]", "--", "ls", "--ssh", "")
        assert (done.exit_code, done.stdout, done.stderr) == (7, "", "")
        assert calls["attach"] == [(("ls", "--ssh", ""), float("inf"), None)]

    def test_it_runs_where_a_test_inside_ran(self, invoke, cache, calls):
        made_kept.add(cache, NODEID, folder="/root/the project")
        invoke(NODEID, "--", "ls")
        assert calls["attach"][0][2] == "/root/the project"

    def test_the_folder_may_be_gone(self, invoke, cache, calls):
        made_kept.add(cache, NODEID, folder="/gone")
        assert invoke(NODEID, "--", "ls").exit_code == 7
        assert calls["attach"][0][2] is None

    def test_an_option_of_the_command_is_explained(self, invoke, cache):
        made_kept.add(cache, NODEID)
        done = invoke(NODEID, "ls", "--color")
        assert (done.exit_code, "NODEID -- COMMAND" in done.stderr) == (2, True)

    def test_while_it_runs_nobody_removes_the_guest(self, invoke, cache, monkeypatch):
        it = made_kept.add(cache, NODEID)
        store = KeptStore(cache)
        left = []

        def attach(*_):
            left.extend(store.discard([it.folder]).in_use)
            return 0

        monkeypatch.setattr(enter, "attach", attach)
        assert invoke(NODEID, "--", "true").exit_code == 0
        assert left == [it.folder]


def pair(cache):
    """Two machines of a cluster, which wake together."""
    group = {"id": "a1", "guests": ["db1-1", "db2-1"], "networks": []}
    return [
        made_kept.add(cache, NODEID, guest=guest, number=number, group=group)
        for number, guest in enumerate(group["guests"], 1)
    ]


class TestTogether:
    @pytest.mark.parametrize(
        ("which", "names"),
        [
            (["db1"], ["db1-1", "db2-1"]),
            (["db2"], ["db2-1", "db1-1"]),
            (["db2", "--alone"], ["db2-1"]),
        ],
    )
    def test_the_one_that_is_entered_comes_first(self, invoke, cache, calls, which, names):
        pair(cache)
        done = invoke(NODEID, "--guest", *which, "--", "ls")
        assert (done.exit_code, done.stderr) == (7, "")
        assert [guest.kept.guest for guest in calls["entered"]] == names

    def test_one_that_is_not_kept_any_more_is_named(self, invoke, cache, calls):
        first, _ = pair(cache)
        KeptStore(cache).discard([first.folder])
        done = invoke(NODEID, "--", "ls")
        assert (done.exit_code, len(calls["entered"])) == (7, 1)
        assert done.stderr == "not kept any more, so it does not wake: db1-1\n"

    def test_a_second_command_enters_one_that_runs(self, invoke, cache, calls):
        _, second = pair(cache)
        with woken.entrance(KeptStore(cache).root, second.group) as door:
            guests: list[Any] = [Played(second, True)]
            with door.opened(guests, [second]):
                assert invoke(NODEID, "--guest", "db2", "--", "ls", "-l").exit_code == 128 + 15
                done = invoke(NODEID, "--guest", "db2", "--console")
        assert (done.exit_code, "leave that command first" in done.stderr) == (2, True)
        assert [words[:-1] for words in calls["run"]] == [["ssh", "-o", "Port=1", "root@127.0.0.1"]]
        assert calls["entered"] == []

    def test_one_that_was_lost_meanwhile_is_named(self, invoke, cache, calls, monkeypatch):
        def attach(*_):
            calls["entered"][1].engine.loss = GuestLost("db2-1: QEMU ended")
            return 0

        monkeypatch.setattr(enter, "attach", attach)
        pair(cache)
        done = invoke(NODEID, "--guest", "db1", "--", "ls")
        assert (done.exit_code, done.stderr) == (0, "lost meanwhile: db2-1: QEMU ended\n")


class TestShell:
    def test_it_is_ssh(self, invoke, cache, calls):
        made_kept.add(cache, NODEID)
        assert invoke(NODEID).exit_code == 128 + 15
        assert calls["run"] == [["ssh", "-o", "Port=1", "root@127.0.0.1"]]

    def test_for_a_test_inside_it_begins_in_the_project(self, invoke, cache, calls, tmp_path):
        folder = tmp_path / "it's here"
        folder.mkdir()
        made_kept.add(cache, NODEID, folder=str(folder))
        Played.folders = (*Played.folders, str(folder))
        invoke(NODEID)
        [words] = calls["run"]
        assert words[:-1] == ["ssh", "-o", "Port=1", "root@127.0.0.1"]
        done = subprocess.run(
            ["/bin/sh", "-c", words[-1]],
            input="pwd; echo $0",
            env={"SHELL": "/bin/sh", "PATH": os.defpath},
            text=True,
            capture_output=True,
            check=True,
        )
        assert done.stdout.splitlines()[0] == str(folder)

    def test_a_command_at_a_terminal_has_one(self, invoke, cache, calls, monkeypatch, tmp_path):
        monkeypatch.setattr(enter, "_is_at_terminal", lambda: True)
        folder = tmp_path / "it's here"
        folder.mkdir()
        made_kept.add(cache, NODEID, folder=str(folder))
        monkeypatch.setattr(Played, "folders", (str(folder),))
        invoke(NODEID, "--", "printf", "%s|", "a b", "$HOME", "'", "-t")
        [words] = calls["run"]
        assert words[:-1] == ["ssh", "-t", "-o", "Port=1", "root@127.0.0.1"]
        done = subprocess.run(
            ["/bin/sh", "-c", f"{words[-1]}; pwd"], text=True, capture_output=True, check=True
        )
        assert done.stdout.startswith("a b|$HOME|'|-t|")
        assert calls["attach"] == []

    def test_it_says_that_the_guest_is_gone(self, invoke, cache, calls, monkeypatch):
        def run(_):
            calls["entered"][0].engine.loss = GuestLost("tiny-1: it was powered off")
            return 255

        monkeypatch.setattr(foreground, "run", run)
        made_kept.add(cache, NODEID)
        done = invoke(NODEID)
        assert (done.exit_code, "it was powered off" in done.stderr) == (69, True)

    def test_without_an_ssh_client(self, invoke, cache, monkeypatch, calls):
        made_kept.add(cache, NODEID)
        monkeypatch.setenv("PATH", "/nowhere")
        done = invoke(NODEID)
        assert (done.exit_code, calls["entered"]) == (69, [])
        assert f"vmsandbox enter {shlex.quote(NODEID)} --guest tiny-1 -- COMMAND" in done.stderr


class TestRefused:
    @pytest.mark.parametrize(
        "ways", [("--ssh", "--pdb"), ("--console", "--", "ls"), ("--pdb", "ls")]
    )
    def test_one_way_in_at_a_time(self, invoke, cache, ways):
        made_kept.add(cache, NODEID)
        done = invoke(NODEID, *ways)
        assert (done.exit_code, "exclude each other" in done.stderr) == (2, True)

    @pytest.mark.parametrize("ways", [(), ("--ssh",), ("--", "ls")])
    def test_one_that_does_not_answer_has_a_console(self, invoke, cache, calls, ways):
        made_kept.add(cache, NODEID, answers=False, error="kernel panic")
        done = invoke(NODEID, *ways)
        assert (done.exit_code, calls["entered"]) == (69, [])
        assert "did not answer when it was kept" in done.stderr
        assert "kernel panic" in done.stderr
        assert "--console" in done.stderr

    @pytest.mark.parametrize(
        ("facts", "why"),
        [
            ({}, "ran on the host"),
            ({"folder": "/p", "stands": False}, "ended without an exception"),
            ({"folder": "/p", "stands": True, "has_memory": False}, "no interpreter stands"),
            ({"folder": "/p", "stands": True}, "needs a terminal"),
        ],
    )
    def test_no_debugger(self, invoke, cache, calls, facts, why):
        made_kept.add(cache, NODEID, **facts)
        done = invoke(NODEID, "--pdb")
        assert (done.exit_code, calls["entered"], why in done.stderr) == (2, [], True)

    def test_one_that_comes_up_no_more_has_a_console(self, invoke, cache, monkeypatch):
        def entered(*_, **__):
            raise GuestLost("no answer")

        made_kept.add(cache, NODEID)
        monkeypatch.setattr(enter, "all_entered", entered)
        done = invoke(NODEID, "--", "ls")
        assert done.exit_code == 69
        assert "no answer" in done.stderr
        assert "--guest tiny-1 --console" in done.stderr


def test_disks_only_are_booted_and_that_is_said(invoke, cache):
    made_kept.add(cache, NODEID, has_memory=False, answers=False)
    done = invoke(NODEID, "--", "ls")
    assert (done.exit_code, done.stdout) == (7, "")
    assert "boots from its disks" in done.stderr


def test_what_it_is():
    it: Any = SimpleNamespace(
        moment=SimpleNamespace(
            nodeid="a::b", outcome="failed", phase="call", error="assert 0", python=""
        ),
        saved_at=wall() - 7300,
    )
    said = enter._introduced(it, console=False)
    assert said == "a::b, assert 0, 2 hours ago. Your changes are gone when you leave"
    it.moment.python = "/opt/env/bin/python"
    said = enter._introduced(it, console=False)
    assert said.endswith("leave\nThe test's Python is /opt/env/bin/python")
    said = enter._introduced(it, console=True)
    assert said.startswith("a::b, assert 0, 2 hours ago. Your changes are gone when you leave\n")
    assert "Ctrl-] leaves" in said
    assert "if a program in the guest reads its console" in said


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "just now"),
        (59, "just now"),
        (61, "1 minute ago"),
        (7300, "2 hours ago"),
        (9e5, "10 days ago"),
    ],
)
def test_how_long_ago(seconds, text):
    assert enter._ago(seconds) == text


PROGRAM = """
from pathlib import Path
import subprocess
from pytest_vmsandbox.cli import enter
from pytest_vmsandbox.cli.woken import Way
output = enter._output_aside()
loss = None
child = subprocess.Popen(["sleep", "60"])  # as QEMU, it has our standard output
try:
    raise SystemExit(enter._offer(Way("ssh root@there", "", lambda: loss), output))
finally:
    child.kill()
"""


class TestSSH:
    """The command line is printed, and the guest stays until somebody wants it to go."""

    def start(self, program=PROGRAM, **streams):
        return subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **streams,
        )

    def test_standard_output_ends_at_once_and_a_signal_ends_it(self):
        with self.start(stdin=subprocess.DEVNULL) as process:
            assert process.stdout.read() == b"ssh root@there\n"  # as in $(...)
            assert process.poll() is None
            process.terminate()
            assert (process.wait(20), process.stderr.read()) == (0, b"")

    def test_the_end_of_a_pipe_ends_it(self):
        with self.start(stdin=subprocess.PIPE) as process:
            assert process.stdout.read() == b"ssh root@there\n"
            process.stdin.write(b"anything\n")
            process.stdin.flush()
            assert process.poll() is None
            process.stdin.close()
            assert process.wait(20) == 0

    def test_a_shell_can_use_it(self, tmp_path):
        script = f'line=$({shlex.quote(sys.executable)} -c "$1" & echo $! >pid); echo "got $line"; kill $(cat pid)'
        done = subprocess.run(
            ["/bin/sh", "-c", script, "sh", PROGRAM],
            cwd=tmp_path,
            capture_output=True,
            timeout=20,
            check=False,
        )
        assert (done.stdout, done.returncode) == (b"got ssh root@there\n", 0)

    def test_a_guest_that_ends_is_told(self):
        lost = PROGRAM.replace(
            "loss = None",
            "from pytest_vmsandbox.core.errors import GuestLost\nloss = GuestLost('it is gone')",
        )
        with self.start(lost, stdin=subprocess.DEVNULL) as process:
            assert process.wait(20) == 1
            assert b"it is gone" in process.stderr.read()


class TestConsole:
    @pytest.fixture
    def played(self):
        """A console, the guest's end of it, our terminal, and what came out of it."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.settimeout(20)
        console = Console(None)
        console.line = ours
        console.feed(b"login:\r\n")
        keys, terminal_ = pty.openpty()
        shown, out = os.pipe()
        yield SimpleNamespace(
            console=console, guest=theirs, keys=keys, shown=shown, out=out, terminal=terminal_
        )
        for it in (ours, theirs):
            it.close()
        for descriptor in (keys, terminal_, shown, out):
            os.close(descriptor)

    def test_both_sides_write(self, played):
        before = termios.tcgetattr(played.terminal)

        def person():
            assert os.read(played.shown, 99) == b"login:\n"
            while termios.tcgetattr(played.terminal)[3] & termios.ICANON:
                pass  # before, the terminal would keep Ctrl-C
            os.write(played.keys, b"a\x03")
            heard.append(played.guest.recv(99))
            played.console.feed(b"\x1b[1mback\r\n")
            heard.append(os.read(played.shown, 99))
            os.write(played.keys, b"b\x1dc")

        heard: list[bytes] = []
        thread = threading.Thread(target=person, daemon=True)
        thread.start()
        terminal.converse(
            played.console, lambda: not thread.is_alive(), keys=played.terminal, screen=played.out
        )
        thread.join(20)
        assert [*heard, played.guest.recv(99)] == [b"a\x03", b"\x1b[1mback\r\n", b"b"]
        assert termios.tcgetattr(played.terminal) == before

    def test_what_is_typed_too_early_counts(self, played):
        os.write(played.keys, b"a\x1d")
        terminal.converse(played.console, lambda: True, keys=played.terminal, screen=played.out)
        assert played.guest.recv(99) == b"a"

    def test_it_ends_with_the_guest(self, played):
        with pytest.raises(GuestLost, match="has ended"):
            terminal.converse(played.console, lambda: True, keys=played.terminal, screen=played.out)

    def test_it_ends_with_its_input(self, played):
        with Path(os.devnull).open("rb") as nothing:
            terminal.converse(
                played.console, lambda: False, keys=nothing.fileno(), screen=played.out
            )
        assert os.read(played.shown, 99) == b"login:\n"
