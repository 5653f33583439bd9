"""Tests inside one machine of a cluster, with the others beside it."""

import subprocess
import sys

from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.guests.kept import KeptStore

SUITE = """
import socket
import urllib.request
from pathlib import Path

import pytest


def form(cluster):
    server = cluster["server"]
    server.write_text("/srv/index.html", "hello\\n")
    server.run(["httpd", "-p", "8080", "-h", "/srv"])


MACHINES = {"server": "tiny", "client": "debian-13"}
pytestmark = pytest.mark.vm_cluster(MACHINES, inside="client", form=form)


@pytest.mark.in_vm
class TestInside:
    @pytest.mark.parametrize("attempt", range(3))
    def test_page(self, attempt):
        assert socket.gethostname() == "client"
        assert urllib.request.urlopen("http://server:8080/", timeout=60).read() == b"hello\\n"
        seen = Path("/root/seen")
        assert not seen.exists()
        seen.touch()

    def test_bad(self):
        assert not socket.gethostbyname("server")

    def test_unhappy(self):
        pass


def test_outside(vm_cluster):
    page = vm_cluster["server"].run(["wget", "-q", "-O", "-", "http://127.0.0.1:8080/"])
    assert page.stdout == "hello\\n"
"""
CONFTEST = """
from contextlib import suppress

import pytest

current = []


def pytest_runtest_logstart(nodeid):
    current[:] = [nodeid]


@pytest.hookimpl(optionalhook=True)  # pytest in the guest has no such hook
def pytest_vmsandbox_guest_ready(guest):
    if "unhappy" in current[0] and guest.name.startswith("server"):
        with suppress(Exception):
            guest.shell("echo c >/proc/sysrq-trigger; sleep 600")
"""


def test_inside(tmp_path):
    """Each test has a clone of the whole. All machines of a failed one are kept; a lost one is no success."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-ra", "-v", "-p", "no:cacheprovider",
         "-p", "no:randomly", "--vm-keep=failed", "--vm-artifacts=kept"],
        cwd=tmp_path, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    store = KeptStore(cache_dir())
    kept = store.find("test_it.py::TestInside::test_bad", tmp_path)
    try:
        assert "1 failed, 5 passed, 1 error" in output
        assert "kernel panic" in output
        machines = [one.guest.partition("-")[0] for one in kept]
        assert machines == ["server", "client"]
        assert [bool(one.moment.folder) for one in kept] == [False, True]
        artifacts = tmp_path / "kept" / "test_it.py-TestInside-test_bad-debian-13"
        for one in kept:
            assert (
                f"enter 'test_it.py::TestInside::test_bad[debian-13]' --guest {one.guest}" in output
            )
            assert (artifacts / one.guest).is_dir()
    finally:
        store.discard([one.folder for one in store.all() if one.moment.rootdir == str(tmp_path)])
