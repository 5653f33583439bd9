"""Guests that are kept, and entered in a new process: from the moment on at which they were kept."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox import ConfigError, VMSandboxError
from pytest_vmsandbox.guests.entering import entered
from pytest_vmsandbox.guests.keeping import Keeper, KeepError
from pytest_vmsandbox.guests.kept import KeptStore, Moment
from pytest_vmsandbox.machine.qemu import find_qemu
from support import leaks
from support.mounts import small_file_system

pytestmark = pytest.mark.origins("cloned")
SIZE = {"memory": "160MiB"}
LATER = 600  # seconds between the test and the moment when somebody enters its guest
# Enters a kept guest that lies alone in a cache: no image, no template. It is ten minutes later there.
ENTER = f"""
import json, socket, sys, time
from pathlib import Path
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.reaching import helper
from pytest_vmsandbox.guests.entering import entered
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.kept import KeptStore

now = helper.wall
helper.wall = lambda: now() + {LATER}
seen = []
with GuestFactory.open(Settings()) as factory:
    (kept,) = KeptStore(factory.backend.cache).find("test_y", Path("/elsewhere"))
    for _ in range(2):
        with entered(factory, kept) as vm:
            card = vm.shell("ip -4 addr show eth1 | grep -c 10.1.0.1; cat /sys/class/net/eth1/carrier").stdout
            clock = int(vm.run(["date", "+%s"]).stdout) - now()
            with socket.create_connection(vm.forward(7000), 20) as service:
                greeting = service.makefile().readline()
            seen.append({{
                "name": vm.run(["hostname"]).stdout, "clock": clock, "greeting": greeting,
                "random": vm.shell("head -c 16 /dev/urandom | od -An -tx1").stdout,
                "files": vm.shell("cat /root/in-ram; head -c 6 /dev/vda; head -c 8 /dev/vdb").stdout,
                "root": vm.run(["id", "-u"]).stdout, "card": card,
                "booted": "vmsandbox: init" in vm.console.text,
            }})
            vm.shell("echo changed >/root/in-ram; echo changed >/dev/vda; sync")
json.dump(seen, sys.stdout)
"""


def moment(**more):
    usual = {"nodeid": "t.py::test_y[tiny]", "rootdir": "/p", "number": 1, "phase": "call"}
    return Moment(**{**usual, "outcome": "failed", "error": "assert 0", **more})


@pytest.fixture
def keeper(vm_factory, tmp_path, monkeypatch):
    """Keeps guests in a cache of their own."""
    keeper = Keeper(vm_factory.backend, limit=1 << 40, tell=lambda _: None)
    monkeypatch.setattr(keeper, "_store", KeptStore(tmp_path / "kept"))
    with keeper:
        yield keeper


def in_a_new_process(cache):
    return subprocess.run(
        [sys.executable, "-c", ENTER], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "VMSANDBOX_CACHE": str(cache)},
    )  # fmt: skip


def test_is_entered_in_a_new_process(vm_factory, keeper, tmp_path, monkeypatch):
    lan = vm_factory.network("lan", ipv4="10.1.0.0/24")
    with lan, vm_factory.boot("tiny", networks=[lan], disks=["16MiB"], **SIZE) as vm:
        service = vm.popen(["sh", "-c", "while :; do echo hello | nc -l -p 7000; done"])
        disk = vm.attach_disk(size="8MiB")
        vm.shell(
            f"echo kept >/root/in-ram; echo kept- >/dev/vda; echo attached >{disk.device}; sync"
        )
        key = keeper.keep(vm, moment(environment=("TOKEN",)))
        vm.shell("echo later >/root/in-ram; echo later >/dev/vda; sync")  # it goes on
        vm.detach(disk)
        assert service.poll() is None
    (outcome,) = keeper.close()
    assert (outcome.key, outcome.error) == (key, None)
    kept = outcome.kept
    assert kept.damage() == ""
    modes = {
        stat.S_IMODE(path.stat().st_mode)
        for path in kept.folder.rglob("*")
        if path.is_file() and path.stat().st_nlink == 1
    }
    assert modes == {0o600}

    # Proving the accelerator anew would take longer than all of the rest.
    (tmp_path / "kept" / "accelerator").symlink_to(vm_factory.backend.cache / "accelerator")
    done = in_a_new_process(tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert first.pop("random") != second.pop("random")
    for seen in (first, second):
        assert abs(seen.pop("clock") - LATER) < 2
        assert seen == {
            "name": f"{vm.name}\n", "greeting": "hello\n", "root": "0\n", "booted": True,
            "card": "1\n1\n",
            "files": "kept\nkept-\nattached",
        }  # fmt: skip
    assert kept.damage() == ""

    another = tmp_path / "qemu-system"
    shutil.copy(find_qemu("x86_64").path, another)
    with another.open("ab") as file:
        file.write(b"\0")
    monkeypatch.setenv("VMSANDBOX_QEMU", str(another))
    with pytest.raises(ConfigError) as refused, entered(vm_factory, kept):
        pass
    said = str(refused.value)
    assert "cannot go on with this QEMU: another build has saved it" in said
    assert f"saved by: QEMU {kept.qemu[0]} (SHA-256 {kept.qemu[1]})" in said
    assert f"Remedy: install QEMU {kept.qemu[0]} from the same package" in said


def connected(cluster):
    """What a file in the second machine gets goes over one connection, into a file in the first one."""
    one, two = cluster.values()
    one.shell("(sleep 99999 | nc -l -p 9000 >/tmp/heard) </dev/null >/dev/null 2>&1 &")
    one.wait_until(["sh", "-c", "netstat -ltn | grep -q ':9000 '"], timeout=120)
    two.shell("touch /tmp/said; (tail -f /tmp/said | nc db1 9000) </dev/null >/dev/null 2>&1 &")
    two.shell("echo before >>/tmp/said")
    one.wait_until(["grep", "-q", "before", "/tmp/heard"], timeout=120)


def test_machines_of_a_cluster_wake_together(vm_factory, keeper, tmp_path):
    """They talk to each other as before. Two commands enter two of them, and all end with these."""
    with vm_factory.cluster({"db1": "tiny", "db2": "tiny"}) as cluster:
        connected(cluster)
        keys = keeper.keep_all(
            {guest: moment(number=number) for number, guest in enumerate(cluster.values(), 1)}
        )
        names = [guest.name for guest in cluster.values()]
    kept = [outcome.kept for outcome in keeper.close()]
    assert [it.key for it in kept] == keys
    assert [it.guest for it in keeper._store.together(kept[1])] == names

    (tmp_path / "kept" / "accelerator").symlink_to(vm_factory.backend.cache / "accelerator")
    enter = [sys.executable, "-P", "-m", "pytest_vmsandbox", "enter", "test_y", "--guest"]
    streams: Any = {"env": {**os.environ, "VMSANDBOX_CACHE": str(tmp_path / "kept")}, "text": True}
    with subprocess.Popen(
        [*enter, "db1", "--ssh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **streams
    ) as first:
        into_one = first.stdout.read()
        script = "ping -c1 -W20 db1 >/dev/null && echo woken >>/tmp/said && hostname"
        command = [*enter, "db2", "--", "sh", "-c", script]
        second = subprocess.run(command, capture_output=True, timeout=300, check=False, **streams)
        assert (second.returncode, second.stdout, second.stderr) == (0, "db2\n", "")
        script = "until grep woken /tmp/heard; do sleep 0.1; done; cat /tmp/heard"
        words = [*shlex.split(into_one), script]
        heard = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
        assert heard.stdout == "woken\nbefore\nwoken\n"
        below = leaks.descendants(first.pid)
        assert len([name for _, name in below if name.startswith("qemu")]) == 2
        first.stdin.close()
        assert first.wait(60) == 0
    assert [name for pid, name in below if Path(f"/proc/{pid}").exists()] == []
    assert keeper._store.discard([it.folder for it in kept]).in_use == []


def test_guests_that_do_not_answer(vm_factory, keeper):
    with vm_factory.boot("tiny", **SIZE) as panicked, vm_factory.boot("tiny", **SIZE) as off:
        with suppress(VMSandboxError):
            panicked.shell("echo c >/proc/sysrq-trigger", timeout=30)
        keeper.keep(panicked, moment())
        assert not panicked.alive
        off.power_cut()
        keeper.keep(off, moment(number=2))
    first, second = (outcome.kept for outcome in keeper.close())
    assert (first.has_memory, first.answers) == (True, False)
    assert (second.has_memory, second.answers) == (False, False)
    with entered(vm_factory, first) as vm:
        assert vm.engine.is_on
        assert vm.qmp("query-status")["status"] == "guest-panicked"


def test_no_room(vm_factory, keeper, tmp_path):
    """Neither on the disk, nor for the limit: the guest goes on, and nothing is left of it."""
    with vm_factory.boot("tiny", **SIZE) as vm:
        on_a_full_disk(vm, vm_factory, tmp_path)
        larger_than_the_limit(vm, vm_factory, keeper)


def on_a_full_disk(vm, vm_factory, tmp_path):
    with (
        small_file_system(tmp_path / "small", "16m") as small,
        Keeper(vm_factory.backend, limit=1 << 40, tell=pytest.fail) as keeper,
    ):
        keeper._store = KeptStore(small)
        with pytest.raises(KeepError, match=f"{vm.name} could not be kept") as raised:
            keeper.keep(vm, moment())
        before = time.time()
        assert abs(int(vm.run(["date", "+%s"]).stdout) - before) < 3
        (outcome,) = keeper.close()
        assert outcome.kept is None
        assert outcome.error is raised.value
        assert "No space left on device" in outcome.error.details
        assert outcome.error.remedy.startswith(f"make room on the disk of {small}/kept, or set ")
        assert [path.name for path in Path(small).rglob("*")] == ["kept", f"{outcome.key}.lock"]


def larger_than_the_limit(vm, vm_factory, keeper):
    """One that is takes no older ones away, also not that of the same test."""
    keeper.keep(vm, moment())
    with keeper, Keeper(vm_factory.backend, limit=1 << 20, tell=pytest.fail) as small:
        small._store = keeper._store
        small.keep(vm, moment(error="later"))
        (outcome,) = small.close()
    assert outcome.kept is None
    assert str(outcome.error).startswith(f"{vm.name} could not be kept\nit takes ")
    assert "vm_keep_size is 1MiB" in str(outcome.error)
    assert [kept.moment.error for kept in keeper._store.all()] == ["assert 0"]
