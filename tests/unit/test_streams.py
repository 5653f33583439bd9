"""Streams of programs in guests that are dropped without having been closed."""

import subprocess
import sys

import pytest

# Only Python's development mode tells of errors in a file's finalizer, or Python 3.13.
SCRIPT = """
import gc
from types import SimpleNamespace
from pytest_vmsandbox.core.errors import GuestLost
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.reaching.process import RemoteProcess, Process

def lost(*_):
    raise GuestLost("the guest is gone")

channel = SimpleNamespace(
    closed=False, end_input=lost, send=lost, receive=lost
)
for text in (True, False):
    remote = RemoteProcess(channel, Command(argv=("cat",)), check=lost)
    process = Process(remote, ("cat",), text=text)
    process.stdin.write("not sent" if text else b"not sent")
    {how}
    del process
    gc.collect()
print("done")
"""


@pytest.mark.parametrize("how", ["pass", "process.cycle = process", "remote.end_input()"])
def test_raise_nothing(how):
    argv = [sys.executable, "-X", "dev", "-W", "error", "-c", SCRIPT.format(how=how)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_what_was_not_sent_is_an_error_of_close():
    script = SCRIPT.format(how="process.stdin.close()")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "the guest is gone" in done.stderr
