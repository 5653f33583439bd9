"""The command `vmsandbox` with real guests, started as a user starts it."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.core.spec import format_size

VMSANDBOX = [sys.executable, "-P", "-m", "pytest_vmsandbox"]
SECONDS = 240  # for a boot under emulation on a busy machine


def vmsandbox(*arguments, **options):
    options = {"stdin": subprocess.DEVNULL, **options}
    if "input" in options:
        del options["stdin"]
    return subprocess.run(
        [*VMSANDBOX, *arguments], capture_output=True, timeout=SECONDS, check=False, **options
    )


def start(*arguments, **options) -> Any:
    """The command, left running, with its output piped to us."""
    return subprocess.Popen(
        [*VMSANDBOX, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **{"stdin": subprocess.DEVNULL, **options},
    )


@pytest.fixture(scope="module", autouse=True)
def proven():
    """The accelerator is known, so that nothing is said about it."""
    vmsandbox("run", "tiny", "--", "true")


def test_streams_are_passed_through_as_bytes():
    data = bytes(range(256)) * 5_000
    script = "cat; printf 'to\\000err\\377' >&2"
    done = vmsandbox("run", "tiny", "--", "sh", "-c", script, input=data)
    assert done.returncode == 0
    assert done.stdout == data
    assert done.stderr == b"to\0err\xff"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -KILL $$"], 137),
        (["sh", "-c", "kill -TERM $$"], 143),
        (["no-such-program"], 127),
    ],
    ids=["exit", "kill", "term", "not found"],
)
def test_the_exit_status_is_the_guests(command, status):
    done = vmsandbox("run", "tiny", "--", *command)
    assert (done.returncode, done.stdout) == (status, b"")


def test_words_reach_the_guest_as_they_are():
    words = ["a b", "*", "$HOME", "", "'", '"', "--", "-x", "é", "line\nbreak"]
    done = vmsandbox("run", "tiny", "--", "printf", "%s|", *words)
    assert done.stdout.decode() == "".join(f"{word}|" for word in words)


def test_hardware_user_and_files(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"\0\xff")
    (tmp_path / "script").write_text("#!/bin/sh\nid -un; nproc; od -An -tx1 /tmp/there/file\n")
    (tmp_path / "script").chmod(0o755)
    done = vmsandbox(
        "run", "tiny", "--cpus", "2", "--memory", "256MiB", "--user", "tester",
        "--push", f"{tmp_path}/tree:/tmp/there", "--push", f"{tmp_path}/script:/tmp/",
        "--", "/tmp/script",
    )  # fmt: skip
    assert done.stdout.split() == [b"tester", b"2", b"00", b"ff"]
    said = [line for line in done.stderr.splitlines() if not line.startswith(b"preparing tiny")]
    assert (done.returncode, said) == (0, [])


def test_a_time_out():
    done = vmsandbox("run", "tiny", "--timeout", "2", "--", "sh", "-c", "echo first; sleep 1000")
    assert done.returncode == 1
    assert done.stdout == b"first\n"
    assert b"did not end within 2 s and was killed" in done.stderr


def test_output_comes_while_the_command_runs_and_input_may_stay_open():
    command = ["sh", "-c", "echo ready; head -n 1"]
    with start("run", "tiny", "--", *command, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(b"go\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"go\n"
        assert process.wait(SECONDS) == 0  # though its input is still open


def test_something_in_the_background_does_not_hold_it():
    done = vmsandbox("run", "tiny", "--", "sh", "-c", "sleep 1000 & echo done")
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_a_reader_that_goes_away():
    with start("run", "tiny", "--", "yes") as process:
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(SECONDS) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


def test_an_output_that_is_full():
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*VMSANDBOX, "run", "tiny", "--", "sh", "-c", "echo hello; sleep 2"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
            check=False,
        )
    assert done.returncode == 69
    assert b"No space left on device" in done.stderr


def test_streams_that_are_closed():
    done = subprocess.run(
        [
            "/bin/sh",
            "-c",
            'exec "$@" <&- >&-',
            "sh",
            *VMSANDBOX,
            "run",
            "tiny",
            "--",
            "sh",
            "-c",
            "echo lost; echo said >&2; exit 4",
        ],
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (4, b"", b"said\n")


def test_interrupted_while_it_runs():
    with start("run", "tiny", "--", "sh", "-c", "echo ready; sleep 1000") as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == b"interrupted\n"


def test_a_user_that_is_not_there():
    done = vmsandbox("run", "tiny", "--user", "nobody-here", "--", "true")
    assert done.returncode == 2
    assert b"cannot log in to the guest" in done.stderr


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--memory", "64MiB"], 2, b"at least 128MiB"),
        (["--memory", "1TiB"], 69, b"does not fit"),
        (["--disk", "1GiB"], 2, b"this image has no root disk"),
        (["--boot-timeout", "0.01"], 69, b"did not answer"),
    ],
    ids=["little", "much", "disk", "time"],
)
def test_guests_that_cannot_be(options, status, said):
    booted = {**os.environ, "VMSANDBOX_CLONES": "never"}  # a clone is there in no time
    done = vmsandbox("run", "tiny", *options, "--", "true", env=booted)
    assert (done.returncode, done.stdout) == (status, b"")
    assert said in done.stderr
    assert b"Traceback" not in done.stderr


def test_without_qemu(tmp_path):
    done = vmsandbox("run", "tiny", "--", "true", env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 69
    assert b"there is no qemu-system-x86_64" in done.stderr
    assert b"vmsandbox quickstart" in done.stderr


def test_doctor_knows_the_accelerator():
    done = vmsandbox("doctor", "--json")
    content = json.loads(done.stdout)
    assert (done.returncode, content["schema"], content["ok"]) == (0, 1, True)
    checks = {check["name"]: check for check in content["checks"]}
    assert "whether" not in checks["accelerator"]["found"]
    assert "tiny" in checks["images"]["found"]


def test_shell_without_a_terminal():
    done = vmsandbox("shell", "tiny", input=b"hostname; exit 7\n")
    assert (done.returncode, done.stdout) == (7, b"tiny-1\n")


def on_a_terminal(*arguments):
    """The command at a terminal: its process, and the terminal's other end."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [*VMSANDBOX, *arguments], {**os.environ, "TERM": "xterm"})
    return child, terminal


def end_of(child, terminal):
    """Its exit status."""
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status)


def test_shell_on_a_terminal():
    child, terminal = on_a_terminal("shell", "tiny")
    seen = read_until(terminal, b"# ")
    assert b"\x1b" in seen  # something moved while it booted
    assert b"removed when you leave" in seen
    os.write(terminal, b"echo $((6 * 7)); exit 5\r")
    assert re.search(rb"^42\r$", read_until(terminal, None), re.MULTILINE)
    assert end_of(child, terminal) == 5


def read_until(terminal, end):
    """What comes, up to `end`, or to the end of it all."""
    seen = b""
    deadline = time.monotonic() + SECONDS
    while end is None or end not in seen.replace(b"\x1b", b""):
        assert time.monotonic() < deadline, seen
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # the other side is closed
            break
    return seen


SUITE = """
import pytest

@pytest.mark.vm("tiny", memory="160MiB")
@pytest.mark.parametrize("text", ["a b'c\\"$d é"])
def test_odd(vm, text):
    vm.write_text("/root/file", "kept")
    vm.shell("echo on its console >/dev/console")
    assert vm is None
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The words of the line in pytest's summary, which a shell reads."""
    folder = tmp_path_factory.mktemp("project") / "tests"
    folder.mkdir()
    name = f"test_{secrets.token_hex(4)}"  # not one of another run in the same cache
    (folder / f"{name}.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--vm-keep=failed", "tests"],
        cwd=folder.parent, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    lines = re.findall(r"^.*(vmsandbox enter .*)$", done.stdout, re.MULTILINE)
    [line] = {line.strip() for line in lines}  # in the report, and in the summary
    program, *words = shlex.split(line)
    assert program == "vmsandbox"
    yield words
    [it] = [
        it
        for it in json.loads(vmsandbox("kept", "list", "--json").stdout)["kept"]
        if it["test"] == words[1]
    ]
    removed = vmsandbox("kept", "rm", words[1]).stdout.decode()
    assert removed == f"removed: 1 kept guest; freed {format_size(it['size_bytes'])}\n"


class TestKept:
    """The guest of one failed test, entered in every way."""

    def test_a_shell_on_a_terminal(self, words):
        child, terminal = on_a_terminal(*words)
        seen = read_until(terminal, b"# ")
        assert b"Your changes are gone when you leave" in seen
        assert b"assert <Guest" in seen
        os.write(terminal, b"cat /root/file; exit 5\r")
        assert b"\r\nkept" in read_until(terminal, None)
        assert end_of(child, terminal) == 5

    def test_its_console_on_a_terminal(self, words):
        child, terminal = on_a_terminal(*words, "--console")
        assert b"Ctrl-] leaves" in read_until(terminal, b"on its console")
        os.write(terminal, b"\x1d")
        assert end_of(child, terminal) == 0

    def test_ssh_for_a_script(self, words, tmp_path):
        script = 'line=$("$@" --ssh & echo $! >pid); eval "$line cat /root/file"; kill $(cat pid)'
        done = subprocess.run(
            ["/bin/sh", "-c", script, "sh", *VMSANDBOX, *words],
            cwd=tmp_path, capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, b"kept", b"")

    def test_one_command_in_another_cache_far_from_the_project(self, words, tmp_path):
        file, elsewhere = tmp_path / "file", {**os.environ, "VMSANDBOX_CACHE": f"{tmp_path}/cache"}
        assert vmsandbox("kept", "export", words[1], str(file)).returncode == 0
        done = vmsandbox("kept", "import", str(file), "--trust", env=elsewhere)
        assert done.returncode == 0, done.stderr
        command = ["sh", "-c", "cat /root/file; exit 4"]
        done = vmsandbox(*words, "--", *command, cwd=tmp_path, env=elsewhere)
        assert (done.returncode, done.stdout) == (4, b"kept"), done.stderr


def test_quickstart_where_everything_is_there(tmp_path):
    (tmp_path / "conftest.py").write_text("raise RuntimeError('not ours to read')\n")
    done = vmsandbox(
        "quickstart",
        "--image",
        "tiny",
        cwd=tmp_path,
        env={**os.environ, "PYTEST_ADDOPTS": "--no-such-option", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout
    assert b"test_destroying_everything[tiny] PASSED" in done.stdout
    assert b"Nothing of these is left" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
    assert list(tmp_path.glob("vmsandbox-quickstart-*")) == []


def test_bench():
    done = vmsandbox("bench", "tiny", "--only", "armed_run_ms", "--count", "5", "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert (content["schema"], content["image"]) == (1, "tiny")
    assert content["samples"] == {"cold_boot_s": 1, "armed_run_ms": 5}
    assert content["ratios"]["armed_run_ms"]["p50"] > 1
    assert content["armed_run_ms"]["p99"] is None  # of so few
    assert "armed_run_ms" in content["reasons"]
