"""Without any network but the loopback: what must work does, and the rest is refused in one line.

The same run holds a lock file: the image that it names is used.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pytest_vmsandbox.core.paths import LOCK_FILE
from support.images import define, toml

SUITE = """
import pytest

def test_a_guest(vm):
    assert vm.run(["cat", "/sys/class/net/eth0/operstate"]).returncode == 0

@pytest.mark.vm(network="nat")
def test_nat(vm):
    pass

def test_prepare(vm_factory):
    vm_factory.prepare("tiny", lambda vm: vm.run(["true"]), depends_on=["x"], network="nat")
"""


@pytest.fixture
def alone(tmp_path):
    """Run a command in the folder, in a network name space of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a network name space that runs guests")

    def alone(*argv):
        return subprocess.run(
            ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *argv],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )

    return alone


def test_offline(alone, tmp_path):
    images = [sys.executable, "-P", "-m", "pytest_vmsandbox", "images"]
    (tmp_path / "pytest.ini").write_text("[pytest]\nvm_images = tiny\n")
    (tmp_path / "test_suite.py").write_text(SUITE)
    for words, says in (
        (["lock"], "tiny is locked now"),
        (["verify"], "tiny: intact, and as it is locked"),
        (["update", "--offline"], "nothing has changed"),
        (["build", "tiny", "--offline"], "tiny is built"),
    ):
        done = alone(*images, *words)
        assert done.returncode == 0, done.stdout
        assert says in done.stdout
    assert (tmp_path / LOCK_FILE).is_file()
    define(tmp_path / "images" / "mine", toml())
    done = alone(*images, "build", "mine", "--offline", f"--image-path={tmp_path}/images")
    assert done.returncode == 69
    assert "mine cannot be built offline" in done.stdout

    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--vm-offline"]
    done = alone(*pytest_)
    last = done.stdout.splitlines()[-1]
    assert all(count in last for count in ("1 passed", "1 failed", "1 error")), done.stdout
    assert done.stdout.count("network='nat' is not allowed, because this run is offline") >= 2
