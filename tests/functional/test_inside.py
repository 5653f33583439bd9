"""Tests that run inside a guest: whatever they do to it, each has its reports, and the rest goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest

from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.guests.templates import TemplateStore

IMAGE = "debian-13"
SECRET = "not for the eyes of strangers"


class Run:
    """A run of pytest on a suite of its own."""

    def __init__(self, folder, *args):
        junit = folder / "junit.xml"
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-ra", "-p", "no:cacheprovider",
             f"--junitxml={junit}", f"--vm={IMAGE}", *args],
            env={**os.environ, "SECRET_OF_THE_HOST": "1", "PYTHONPATH": str(folder)},
            cwd=folder, capture_output=True, text=True, timeout=1500, check=False,
        )  # fmt: skip
        self.status, self.output = done.returncode, done.stdout + done.stderr
        self.artifacts = {
            path.relative_to(folder / "kept"): path.read_bytes()
            for path in (folder / "kept").rglob("*")
            if path.is_file()
        }
        self.cases = {}
        for case in ET.parse(junit).getroot().iter("testcase"):
            name = case.get("name").replace(f"[{IMAGE}]", "").replace(f"[{IMAGE}-", "[")
            found = [(it.tag, it.get("message", "") + (it.text or "")) for it in case
                     if it.tag in {"failure", "error", "skipped"}]  # fmt: skip
            self.cases.setdefault(name, []).extend(found)

    def outcome(self, name):
        kinds = [kind for kind, _ in self.cases[name]]
        return kinds or ["passed"]

    def text(self, name):
        return "\n".join(text for _, text in self.cases[name])


SUITE = """
import ctypes
import os
import signal
import subprocess
import time

import pytest

pytestmark = [pytest.mark.in_vm, pytest.mark.vm(test_timeout=300)]


def sysrq(letter):
    with open("/proc/sysrq-trigger", "w") as file:
        file.write(letter)
    time.sleep(60)


def test_first_is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_after_the_first():
    assert os.environ["SECRET_OF_THE_SUITE"]
    assert os.environ["VMSANDBOX_GUEST"].startswith("debian-13-")
    assert "SECRET_OF_THE_HOST" not in os.environ


def test_leaves():
    os._exit(0)


@pytest.fixture
def crashing_setup():
    os._exit(3)


def test_crashes_in_setup(crashing_setup):
    pass


@pytest.fixture
def crashing_teardown():
    yield
    os._exit(4)


def test_crashes_in_teardown(crashing_teardown):
    pass


def test_segmentation_fault():
    ctypes.string_at(0)


@pytest.mark.vm(test_timeout=15)
def test_hangs():
    time.sleep(1000)  # here it hangs


def test_takes_all_memory():
    hoard = []
    while True:
        hoard.append(b"x" * (16 << 20))


def test_fills_the_disk(tmp_path):
    with pytest.raises(OSError, match="No space left"), open("/full", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 30)
        while True:
            os.posix_fallocate(file.fileno(), os.path.getsize("/full"), 1 << 28)
    subprocess.run(["sh", "-c", "yes > /full2"], check=False)


def test_with_a_full_disk():
    print("still here")


def test_panics():
    sysrq("c")


def test_after_the_panic():
    assert not os.path.exists("/full")


def test_switches_off():
    sysrq("o")


def test_takes_the_network_down():
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)  # it is reached without


def test_after_the_network():
    pass


def test_last_kills_its_keeper():
    subprocess.run(["sh", "-c", "kill -9 -1"])
"""


@pytest.fixture(scope="module")
def crashes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crashes")
    (folder / "pytest.ini").write_text(f"[pytest]\nvm_env = SECRET_OF_THE_SUITE={SECRET}\n")
    (folder / "test_crashes.py").write_text(SUITE)
    return Run(folder, "--vm-artifacts=kept", "--vm-pcap")


def test_each_test_has_its_reports(crashes):
    assert len(crashes.cases) == len(re.findall(r"^def test_", SUITE, re.MULTILINE)), crashes.output
    assert crashes.status == 1


@pytest.mark.parametrize(
    "name",
    ["test_after_the_first", "test_fills_the_disk", "test_with_a_full_disk",
     "test_after_the_panic", "test_takes_the_network_down", "test_after_the_network"],
)  # fmt: skip
def test_the_rest_goes_on(crashes, name):
    assert crashes.outcome(name) == ["passed"], crashes.output


@pytest.mark.parametrize(
    ("name", "outcome", "text"),
    [
        ("test_first_is_killed", "FAILED", "the interpreter was killed by SIGKILL"),
        ("test_leaves", "FAILED", "the interpreter ended with status 0"),
        ("test_crashes_in_setup", "ERROR", "the interpreter ended with status 3"),
        ("test_crashes_in_teardown", "ERROR", "the interpreter ended with status 4"),
        ("test_segmentation_fault", "FAILED", "SIGSEGV"),
        ("test_segmentation_fault", "FAILED", "in test_segmentation_fault"),
        ("test_hangs", "FAILED", "did not end within 15 s"),
        ("test_hangs", "FAILED", "in test_hangs"),
        ("test_takes_all_memory", "FAILED", "ran out of memory"),
        ("test_panics", "ERROR", "kernel panic: sysrq triggered crash"),
        ("test_switches_off", "ERROR", "is switched off"),
        ("test_last_kills_its_keeper", "ERROR", "is gone"),
    ],
)
def test_the_cause_is_named(crashes, name, outcome, text):
    assert f"\n{outcome} test_crashes.py::{name}[" in crashes.output
    assert text in crashes.text(name), crashes.output


def artifacts_of(crashes, name):
    """The artifacts of a test, by the names of files."""
    return {
        path.name: content.decode(errors="replace")
        for path, content in crashes.artifacts.items()
        if path.parts[0] == f"test_crashes.py-{name}-{IMAGE}" and "prepared" not in path.parts[1]
    }


def test_a_failed_test_shows_its_guest(crashes):
    shown = artifacts_of(crashes, "test_segmentation_fault")
    assert {*shown} == {
        *("console.log", "qmp.log", "qemu.argv", "screenshot.png", "network.pcap"),
        *("processes.txt", "memory.txt", "dmesg.txt", "journal.txt"),
    }
    assert "vmsandbox: init" in shown["console.log"]  # its template's boot
    assert "/sbin/init" in shown["processes.txt"]
    assert "systemd" in shown["journal.txt"]
    assert "Linux version" in shown["dmesg.txt"]


@pytest.mark.parametrize(
    ("name", "why"), [("test_panics", "kernel panic"), ("test_switches_off", "is switched off")]
)
def test_a_guest_that_is_lost_is_not_asked(crashes, name, why):
    shown = artifacts_of(crashes, name)
    assert why in shown["not-gathered.txt"]
    assert {"console.log", "qmp.log", "qemu.argv", "network.pcap"} <= {*shown}
    assert "processes.txt" not in shown


def test_artifacts_hold_no_secret_and_are_not_empty(crashes):
    keys = [it.private_key for it in TemplateStore(cache_dir()).all() if it.image == IMAGE]
    assert len(crashes.artifacts) > 50
    for path, content in crashes.artifacts.items():
        assert content, path
        assert SECRET.encode() not in content, path
        for line in {line for key in keys for line in key.splitlines()}:
            assert line.encode() not in content, path


def test_a_guest_without_python(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n@pytest.mark.in_vm\n@pytest.mark.vm('tiny')\ndef test_it():\n    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert "tests cannot run inside tiny: this image has no Python" in done.stdout
    assert "Remedy: run them inside debian-1" in done.stdout
    assert "1 error" in done.stdout


KILLS = """
import os
import signal
import threading

count = 0

def pytest_vmsandbox_guest_ready(config, guest):
    global count
    count += 1
    guest.write_text("/root/number", str(count))

    def kill():
        guest.console.wait_for("kill me now", 900)
        os.kill(guest.engine.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
"""
KILLED = """
import os
import time

def killed_here():
    with open("/dev/console", "w") as console:
        console.write("kill me now\\n")
    time.sleep(900)

def number():
    with open("/root/number") as file:
        return int(file.read())

if os.path.exists("/root/number") and number() == 1:
    killed_here()

def test_first(): pass

def test_second():
    if number() == 2:
        killed_here()

def test_third():
    assert number() == 3
"""


def test_something_kills_qemu(tmp_path):
    """Once while a session collects, once while a test runs: a fresh guest is tried, and told of."""
    (tmp_path / "test_it.py").write_text(KILLED)
    (tmp_path / "vmsandbox_kills.py").write_text(KILLS)  # a name that stays on this side
    run = Run(tmp_path, "--in-vm", "-p", "vmsandbox_kills")
    assert run.status == 0, run.output
    assert "3 passed" in run.output
    retried = re.findall(r"^vmsandbox: retried in a fresh guest .*", run.output, re.MULTILINE)
    assert len(retried) == 2
    assert all("QEMU ended with signal SIGKILL" in line for line in retried)
