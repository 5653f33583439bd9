"""`Guest.run`, `shell` and `popen` on a real guest."""

from __future__ import annotations

import hashlib
import os
import threading
import time

import pytest

from pytest_vmsandbox import CommandError, CommandTimeout, ConfigError, GuestLost
from pytest_vmsandbox.guests.reaching.commands import Command

pytestmark = pytest.mark.vm("tiny", isolation="module")


def test_streams_and_status(vm):
    result = vm.shell("echo out; echo err >&2; exit 3", check=False)
    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 3)
    assert result.argv == ("/bin/sh", "-c", "echo out; echo err >&2; exit 3")
    assert 0 < result.duration < 60


def test_non_zero_is_an_error_with_both_streams(vm):
    with pytest.raises(CommandError) as caught:
        vm.shell("echo some output; echo some complaint >&2; exit 4")
    text = str(caught.value)
    assert "returned 4" in text
    assert "some output" in text
    assert "some complaint" in text
    assert caught.value.result.returncode == 4


@pytest.mark.parametrize(
    "word",
    [
        "",
        " ",
        "a b",
        "'",
        '"',
        "\\",
        "$HOME",
        "`id`",
        "*",
        "a\nb",
        "\t",
        "!",
        "-n",
        "ü€𝄞",
        "~",
        "#",
    ],
)
def test_words_arrive_as_they_are(vm, word):
    assert vm.run(["printf", "[%s]", word]).stdout == f"[{word}]"


def test_binary_output(vm):
    script = 'i=0; while [ $i -lt 256 ]; do printf "\\\\$(printf %03o $i)"; i=$((i+1)); done'
    assert vm.shell(script, text=False).stdout == bytes(range(256))


def test_text_that_is_not_utf8_is_replaced(vm):
    assert vm.shell("printf 'a\\377b'").stdout == "a\ufffdb"


def test_large_input_comes_back(vm):
    data = os.urandom(5_000_000)
    assert vm.run(["cat"], input=data, text=False, timeout=300).stdout == data


def test_input_as_text(vm):
    assert vm.run(["tr", "a-z", "A-Z"], input="abc\n").stdout == "ABC\n"


def test_no_input_is_empty_input(vm):
    assert vm.run(["cat"]).stdout == ""


def test_a_program_that_does_not_read_its_input(vm):
    assert vm.run(["true"], input=os.urandom(4_000_000)).returncode == 0


def test_both_streams_large_and_interleaved(vm):
    script = "i=0; while [ $i -lt 300 ]; do head -c 8192 /dev/zero; head -c 8192 /dev/zero >&2; i=$((i+1)); done"
    result = vm.shell(script, text=False, timeout=300)
    assert len(result.stdout) == len(result.stderr) == 300 * 8192


@pytest.mark.parametrize(
    ("name", "number"), [("KILL", 9), ("TERM", 15), ("SEGV", 11), ("USR1", 10)]
)
def test_end_by_signal(vm, name, number):
    assert vm.shell(f"kill -{name} $$", check=False).returncode == -number


def test_a_status_that_looks_like_a_signal_is_not_one(vm):
    assert vm.shell("exit 137", check=False).returncode == 137


def test_background_process_that_keeps_the_streams_open(vm):
    started = time.monotonic()
    result = vm.shell("sleep 300 & echo started")
    assert result.stdout == "started\n"
    assert time.monotonic() - started < 300  # it did not wait for that
    vm.run(["killall", "sleep"])


def test_background_writer_does_not_cut_the_output(vm):
    result = vm.shell("sleep 300 & head -c 3000000 /dev/zero", text=False)
    assert len(result.stdout) == 3_000_000
    vm.run(["killall", "sleep"])


def test_time_out_ends_the_whole_process_group(vm):
    with pytest.raises(CommandTimeout) as caught:
        vm.shell("echo begun; sleep 4321 & sleep 4321", timeout=2)
    assert caught.value.seconds == 2
    assert caught.value.stdout == b"begun\n"
    assert "begun" in str(caught.value)
    assert vm.run(["pgrep", "-f", "sleep 4321"], check=False).stdout == ""
    assert vm.run(["true"]).returncode == 0


def test_cwd_env_user(vm):
    assert vm.run(["pwd"], cwd="/var/log").stdout == "/var/log\n"
    assert vm.shell('echo "$A"', env={"A": "it's $x"}).stdout == "it's $x\n"
    assert vm.run(["id", "-un"]).stdout == "root\n"
    assert vm.run(["id", "-un"], user="tester").stdout == "tester\n"
    assert vm.run(["pwd"], cwd="/tmp", user="tester").stdout == "/tmp\n"


def test_time_out_as_another_user_ends_it_too(vm):
    with pytest.raises(CommandTimeout):
        vm.run(["sleep", "5432"], timeout=2, user="tester")
    assert vm.run(["pgrep", "-f", "sleep 5432"], check=False).stdout == ""


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda vm: vm.run(["no-such-program"]), "command not found in the guest: no-such-program"),
        (lambda vm: vm.run(["ls"], cwd="/no/such"), "could not be started in /no/such"),
        (lambda vm: vm.run(["ls"], user="nosuch"), "could not be started as nosuch"),
    ],
)
def test_what_cannot_be_started(vm, call, text):
    with pytest.raises(CommandError, match=text):
        call(vm)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda vm: vm.run("ls -l"), TypeError),
        (lambda vm: vm.run([]), ValueError),
        (lambda vm: vm.run(["a\0b"]), ValueError),
        (lambda vm: vm.run(["ls"], env={"A=B": ""}), ValueError),
        (lambda vm: vm.run(["ls"], timeout=-1), ConfigError),
        (lambda vm: vm.shell(["ls"]), TypeError),
        (lambda vm: vm.forward(0), ConfigError),
    ],
)
def test_bad_arguments(vm, call, error):
    with pytest.raises(error):
        call(vm)


def test_wait_until(vm):
    vm.popen(["sh", "-c", "sleep 2; touch /tmp/there"])
    vm.wait_until(["test", "-e", "/tmp/there"], timeout=60)
    with pytest.raises(CommandTimeout, match="the last try returned 1"):
        vm.wait_until(["test", "-e", "/tmp/never"], timeout=1)


def test_popen(vm):
    with vm.popen(
        ["sh", "-c", "read line; echo got $line; echo done >&2; read line; exit 5"]
    ) as process:
        assert process.poll() is None
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == "got hello\n"
        assert process.stderr.readline() == "done\n"
        with pytest.raises(CommandTimeout):
            process.wait(0.2)
        process.stdin.close()
        assert process.wait(30) == 5
        assert process.poll() == 5


@pytest.mark.parametrize(("end", "status"), [("terminate", -15), ("kill", -9)])
def test_popen_ended(vm, end, status):
    process = vm.popen(["sleep", "1000"])
    getattr(process, end)()
    assert process.wait(30) == status


def test_commands_from_several_threads(vm):
    answers: dict[int, str] = {}

    def work(number: int) -> None:
        answers[number] = vm.shell(f"sleep 0.3; echo {number}").stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: f"{number}\n" for number in range(6)}


def test_digest_of_a_long_stream(vm):
    """20 MB pass through without being held on either side."""
    digest, size = hashlib.sha256(), 0

    def take(data: bytes) -> None:
        nonlocal size
        digest.update(data)
        size += len(data)

    done = vm.engine.run(
        Command(argv=("head", "-c", "20000000", "/dev/zero")),
        stdout=take,
        timeout=600,
    )
    assert (done.returncode, size) == (0, 20_000_000)
    assert digest.digest() == hashlib.sha256(bytes(20_000_000)).digest()


def test_time_out_of_a_program_that_never_stops_talking(vm):
    with pytest.raises(CommandTimeout):
        vm.run(["yes"], timeout=2)
    assert vm.run(["pgrep", "-x", "yes"], check=False).stdout == ""


def test_a_stream_that_stands_still_is_ended(vm, tmp_path):
    (tmp_path / "data").write_bytes(bytes(10_000_000))
    vm.run(["mkfifo", "/tmp/nobody-reads"])
    with (
        (tmp_path / "data").open("rb") as stdin,
        pytest.raises(CommandTimeout, match="had no input or output for 2 s"),
    ):
        vm.engine.run(
            Command(argv=("sh", "-c", "cat > /tmp/nobody-reads")),
            stdin=stdin, stdout=bytes, timeout=600, idle=2,
        )  # fmt: skip


def test_a_long_script_with_many_quotes(vm):
    """Longer than the command line that some SSH servers take, dropbear among them."""
    script = "\n".join(f"echo 'it is {number}'" for number in range(400))
    expected = "".join(f"it is {number}\n" for number in range(400))
    assert vm.shell(script).stdout == expected
    assert vm.shell(script, user="tester").stdout == expected
    assert vm.run(["cat"], input="x" * 100_000).stdout == "x" * 100_000


def test_a_signal_that_ssh_has_no_name_for_is_not_success(vm):
    assert vm.shell("kill -SYS $$", check=False).returncode < 0


def test_a_forgotten_process_goes_on(vm):
    import gc

    vm.popen(["sh", "-c", "sleep 1; echo said; echo end > /tmp/it-went-on"])
    gc.collect()
    vm.wait_until(["test", "-s", "/tmp/it-went-on"], timeout=30)


def test_a_tree_that_cannot_be_read_is_told_at_once(vm, tmp_path, monkeypatch):
    """The cause is told, not that the transfer stood still; and no half of it takes its place."""
    import tarfile

    from pytest_vmsandbox import TransferError

    (tmp_path / "file").write_bytes(bytes(1000))

    def fail(self, *_):
        raise PermissionError("not yours")

    monkeypatch.setattr(tarfile.TarFile, "addfile", fail)
    started = time.monotonic()
    with pytest.raises(TransferError, match="not yours"):
        vm.push(tmp_path, "/tmp/never")
    assert time.monotonic() - started < 60


def test_processes_from_before_a_restart_are_lost(vm_factory):
    with vm_factory.boot("tiny", memory="160MiB") as vm:
        process = vm.popen(["sleep", "1000"])
        vm.reboot()
        with pytest.raises(GuestLost):
            process.wait(30)
        assert vm.run(["true"]).returncode == 0


def test_a_user_who_is_not_there(vm_factory):
    with (
        vm_factory.boot("tiny", memory="160MiB", user="stranger") as vm,
        pytest.raises(ConfigError, match="user 'stranger' cannot log in"),
    ):
        vm.run(["true"])
