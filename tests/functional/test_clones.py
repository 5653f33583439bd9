"""Clones: what was wrong in them is right, they share nothing, and there is a fallback."""

from __future__ import annotations

import calendar
import dataclasses
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox import CommandError, GuestLost, Provision
from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import MonitorError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.cloning import template_builder
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.gathering import WHY_NOT, gathered
from pytest_vmsandbox.guests.running import resume
from pytest_vmsandbox.guests.running.machines import Running
from pytest_vmsandbox.guests.templates import TemplateStore
from pytest_vmsandbox.machine import machine as machine_module
from pytest_vmsandbox.machine.qemu import find_qemu
from pytest_vmsandbox.machine.qmp import Monitor
from support.mounts import small_file_system

TINY = {"memory": "160MiB"}


class Told(list):
    """What a factory has said and told."""

    def about(self, word):
        return [line for line in self if word in line]


@pytest.fixture
def cache(tmp_path):
    """A cache without templates; images and verdicts are those of the user."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    for name in ("images", "accelerator"):
        (folder / name).symlink_to(cache_dir() / name)
    return folder


def opener(stack, cache):
    """Opens factories on a cache, each as a run of its own."""

    def open_one(clones="demand", cache=cache, captures=False, **more):
        told = Told()
        callbacks = Announcer(told.append)
        for name, callback in more.items():
            setattr(callbacks, name, callback)
        settings = Settings(cache=cache, clones=clones, captures=captures)
        one: Any = stack.enter_context(GuestFactory.open(settings, callbacks))
        one.told = told
        return one

    return open_one


@pytest.fixture
def factory():
    """Opens factories on the user's cache: a template that another test has made is not made again."""
    with ExitStack() as stack:
        yield opener(stack, cache_dir())


@pytest.fixture
def first_factory(cache):
    """Opens factories on the cache without templates."""
    with ExitStack() as stack:
        yield opener(stack, cache)


def offset(vm) -> float:
    """By how many seconds the guest's clock is ahead of ours, as far as a file's time tells."""
    before = time.time()
    text = vm.shell("touch /tmp/now; stat -c %y /tmp/now; date +%z").stdout.splitlines()[0]
    after = time.time()
    whole, _, fraction = text.partition(".")
    theirs = float(calendar.timegm(time.strptime(whole, "%Y-%m-%d %H:%M:%S")))
    theirs += float(f"0.{fraction.split()[0]}")
    if theirs < before:
        return theirs - before
    return max(0.0, theirs - after)


class TestWhatIsPutRight:
    def test_the_clock_also_of_one_that_has_waited(self, factory):
        one = factory("armed")
        one.expect("tiny", one.hardware("tiny", TINY), 3)
        with one.boot("tiny", **TINY) as vm:
            assert vm.origin in {"cloned", "armed"}
            assert abs(offset(vm)) < 0.05
        assert one.await_armed(120)
        time.sleep(3)
        with one.boot("tiny", **TINY) as vm:
            assert vm.origin == "armed"
            assert abs(offset(vm)) < 0.05

    def test_random_numbers_differ(self, factory):
        one, found = factory(), set()
        for _ in range(4):
            with one.boot("tiny", **TINY) as vm:
                found.add(vm.run(["head", "-c", "16", "/dev/urandom"], text=False).stdout)
                found.add(vm.read_text("/proc/sys/kernel/random/uuid"))
        assert len(found) == 8

    def test_the_network_and_its_isolation(self, factory):
        one = factory()
        with one.boot("tiny", **TINY) as vm:
            vm.popen(["sh", "-c", "while :; do echo hello | nc -l -p 8080; done"])
            vm.wait_until(["sh", "-c", "netstat -ltn | grep -q :8080"], timeout=60)
            import socket

            with socket.create_connection(vm.forward(8080), 30) as sock:
                assert sock.recv(100) == b"hello\n"

    def test_each_has_its_own_name(self, factory):
        one = factory()
        with one.boot("tiny", **TINY) as a, one.boot("tiny", **TINY) as b:
            names = [vm.run(["hostname"]).stdout.strip() for vm in (a, b)]
            assert names == [a.name, b.name]
            b.reboot()
            assert b.run(["hostname", "-s"]).stdout.strip() == b.name

    def test_no_timer_wakes_it(self, factory):
        """A clone that has waited is as quiet as when it was saved."""
        one = factory()
        with one.boot("debian-13") as vm:
            assert vm.origin == "cloned"
            before = vm.run(["ps", "-e", "--no-headers", "-o", "comm"]).stdout.split()
            time.sleep(5)
            after = vm.run(["ps", "-e", "--no-headers", "-o", "comm"]).stdout.split()
            assert "(udev-worker)" not in before
            kernel = ("kworker", "ksoftirqd", "migration")
            assert {it for it in after if not it.startswith(kernel)} <= {*before, "ps"}
            timers = vm.run(["systemctl", "list-timers", "--no-legend"]).stdout
            assert timers.strip() == ""
            name = vm.run(["hostname"]).stdout.strip()
            assert name == vm.name
            assert "127.0.1.1" in vm.run(["getent", "hosts", name]).stdout
            files = vm.run(["cat", "/etc/hostname", "/etc/hosts"]).stdout
            vm.reboot()
            assert vm.run(["cat", "/etc/hostname", "/etc/hosts"]).stdout == files


class TestKeepingAhead:
    def test_a_run_does_for_its_tests(self, tmp_path):
        suite = """
            import pytest

            def test_first(vm, vm_factory):
                assert vm_factory.await_armed(60)

            @pytest.mark.parametrize("number", range(3))
            def test_next(vm, number):
                assert vm.origin == "armed"
        """
        (tmp_path / "test_it.py").write_text(textwrap.dedent(suite))
        argv = [sys.executable, "-m", "pytest", "--vm=tiny", "-p", "no:cacheprovider", "-v"]
        environment = {**os.environ, "VMSANDBOX_CLONES": "armed"}
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert "4 passed" in done.stdout, done.stdout


class TestSharingNothing:
    def test_neither_memory_nor_disk(self, factory):
        one = factory()
        hardware = {**TINY, "disks": ["16MiB"]}
        with one.boot("tiny", **hardware) as a, one.boot("tiny", **hardware) as b:
            a.write_text("/root/mine", "a")
            a.shell("echo a | dd of=/dev/vda conv=notrunc 2>/dev/null; sync")
            assert b.run(["ls", "/root"]).stdout == ""
            assert b.run(["head", "-c", "1", "/dev/vda"], text=False).stdout == b"\0"
        with one.boot("tiny", **hardware) as vm:
            assert vm.run(["ls", "/root"]).stdout == ""
            assert vm.run(["head", "-c", "1", "/dev/vda"], text=False).stdout == b"\0"

    def test_a_used_clone_is_never_handed_out_again(self, factory):
        one = factory("armed")
        one.expect("tiny", one.hardware("tiny", TINY), 8)
        seen = set()
        for _ in range(8):
            with one.boot("tiny", **TINY) as vm:
                assert vm.run(["ls", "/root"]).stdout == ""
                vm.write_text("/root/used", "x")
                seen.add(vm.engine.pid)
        assert len(seen) == 8

    def test_nobody_can_write_to_the_memory_of_a_template(self, factory):
        one = factory()
        with one.boot("tiny", **TINY) as vm:
            (opened,) = one._clones._builder._open.values()
            pid = vm.engine.pid
            maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
            # A copy in memory; the template's file itself, where QEMU maps what it can only read.
            mapped = [it for it in maps if "memfd:vmsandbox-memory" in it or it.endswith("/memory")]
            assert mapped
            assert all(line.split()[1].endswith("p") for line in mapped)  # private
            with pytest.raises(OSError, match=r"not permitted|Bad file"):
                os.pwrite(opened.memory.fileno(), b"x", 0)


def packets(file):
    """The packets in a capture of a network."""
    data, place, found = file.read_bytes(), 24, []
    while place < len(data):
        (size,) = struct.unpack_from("=8xI4x", data, place)
        found.append(data[place + 16 : place + 16 + size])
        place += 16 + size
    return found


def greet(vm):
    """Connect to the guest's SSH server, which greets."""
    with socket.create_connection(vm.forward(22), 60) as sock:
        assert sock.recv(4) == b"SSH-"


class TestWhatAFailureShows:
    def test_the_guest_and_its_network(self, factory, tmp_path):
        def logs(guest):
            (tmp_path / guest).mkdir(exist_ok=True)
            return tmp_path / guest

        with factory(logs=logs, captures=True).boot("tiny", **TINY) as vm:
            greet(vm)
            with vm.snapshot():
                greet(vm)
            greet(vm)
            vm.popen(["sleep", "4711"])
            vm.shell("echo from the kernel >/dev/kmsg")
            found = gathered(vm)
            assert {*found} == {"processes.txt", "memory.txt", "dmesg.txt"}
            line = next(it for it in found["processes.txt"].splitlines() if "sleep 4711" in it)
            assert line.split()[2:4] == ["root", "S"]  # and its memory follows
            assert int(line.split()[4]) > 0
            assert found["memory.txt"].startswith("$ free\n")
            assert "MemAvailable:" in found["memory.txt"]
            assert "from the kernel" in found["dmesg.txt"]
            name = vm.name
            vm.power_cut()
            assert "switched off" in gathered(vm)[WHY_NOT]
        found = packets(tmp_path / name / "network.pcap")
        assert len([it for it in found if b"SSH-2.0-" in it and it[34:36] == b"\0\x16"]) == 3


class TestTemplates:
    def test_a_second_run_boots_nothing(self, factory):
        with factory().boot("tiny", **TINY) as vm:
            assert vm.origin == "cloned"
        again = factory()
        with again.boot("tiny", **TINY) as vm:
            assert vm.origin == "cloned"
            # The boot is its template's: it is shown, but nothing of it happens now.
            assert "vmsandbox: init" in vm.console.text
            with pytest.raises(TimeoutError):
                vm.console.wait_for("vmsandbox: init", timeout=0)
            vm.shell("echo so it goes >/dev/console")
            vm.console.wait_for("^so it goes$", timeout=30)
            with vm.snapshot():
                pass
            assert "so it goes" in vm.console.text
            assert "so it goes" not in vm.console.own
        assert again.told == []

    def test_two_runs_at_once_make_it_once(self, first_factory):
        import threading

        said = []

        def use():
            one = first_factory()
            with one.boot("tiny", **TINY) as vm:
                vm.run(["true"])
            said.extend(one.told)

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len([line for line in said if line.startswith("preparing")]) == 1

    def test_prepared_once_per_change(self, first_factory):
        done = []

        def prepare(vm):
            done.append(1)
            vm.write_text("/opt/made", "here")
            vm.popen(["sleep", "100000"])

        def use(one, depends_on, base="tiny"):
            image = one.prepare(base, prepare, depends_on=depends_on, network="nat")
            with one.boot(image) as vm:
                assert vm.image == "tiny"
                assert vm.origin == "cloned"
                assert vm.spec.network == "isolated"
                assert vm.read_text("/opt/made") == "here"
                assert vm.run(["pidof", "sleep"]).stdout.strip()

        use(first_factory(), ["1"])
        use(first_factory(image=lambda: "tiny"), ["1"], base=None)
        assert len(done) == 1
        use(first_factory(), ["2"])
        assert len(done) == 2

    def test_a_preparation_that_fails_is_told_as_it_is(self, factory):
        one = factory()
        with pytest.raises(CommandError, match="false returned 1"):
            one.prepare("tiny", lambda vm: vm.run(["false"]), depends_on=[])
        assert one.told.about("are booted, because they cannot be cloned") == []

    def test_a_guest_that_is_prepared_logs_for_who_waits_for_it(self, first_factory, tmp_path):
        begun = []

        def logs(guest):
            folder = tmp_path / guest
            folder.mkdir()
            return folder

        def prepare(vm):
            vm.shell("echo so it went >/dev/console")
            vm.run(["false"])

        def failed(guest, name):
            asked[name] = gathered(guest)

        asked = {}
        one = first_factory(logs=logs, guest_begun=begun.append, preparation_failed=failed)
        with pytest.raises(CommandError):
            one.prepare("tiny", prepare, depends_on=[])
        assert "MemTotal" in asked["tiny-prepared-2"]["memory.txt"]
        assert begun == ["tiny-prepared-1", "tiny-prepared-2"]  # the image itself, and the layer
        assert "vmsandbox: init" in (tmp_path / begun[0] / "console.log").read_text()
        layer = (tmp_path / begun[1] / "console.log").read_text()
        assert (
            layer.index("vmsandbox: init") < layer.index("saved here") < layer.index("so it went")
        )

    def test_the_hook_gives_every_guest_a_layer(self, first_factory):
        layer = Provision(
            name="a file", depends_on=["1"], run=lambda vm: vm.write_text("/opt/layer", "x")
        )
        for clones in ("demand", "never"):
            one = first_factory(clones, provisions=lambda image: [layer] if image == "tiny" else [])
            with one.boot("tiny", **TINY, user="tester") as vm:  # the image's user makes it
                assert vm.shell("id -un; stat -c %U /opt/layer").stdout == "tester\nroot\n"
                assert vm.read_text("/opt/layer") == "x"


class TestSnapshot:
    @pytest.mark.parametrize("clones", ["demand", "never"])
    def test_memory_and_disk_are_rolled_back(self, factory, clones):
        with factory(clones).boot("tiny", **TINY, disks=["16MiB"]) as vm:
            vm.shell("mkfs.ext4 -q /dev/vda && mkdir -p /mnt/d && mount /dev/vda /mnt/d")
            vm.write_text("/mnt/d/file", "before")
            vm.write_text("/root/file", "before")
            process = vm.run(["sh", "-c", "sleep 100000 >/dev/null 2>&1 & echo $!"]).stdout.strip()
            randoms = set()
            for _ in range(2):
                with vm.snapshot():
                    vm.write_text("/mnt/d/file", "after")
                    vm.write_text("/root/file", "after")
                    vm.run(["kill", process])
                    vm.run(["sync"])
                    assert vm.read_text("/mnt/d/file") == "after"
                assert vm.read_text("/mnt/d/file") == "before"
                assert vm.read_text("/root/file") == "before"
                vm.run(["kill", "-0", process])
                assert abs(offset(vm)) < 0.05
                randoms.add(vm.read_text("/proc/sys/kernel/random/uuid"))
            assert len(randoms) == 2
            vm.shell("umount /mnt/d && e2fsck -fn /dev/vda")
            self.check_that_a_clock_is_kept(vm)

    def check_that_a_clock_is_kept(self, vm):
        """What a test has done to it, relative to the host's; measured to some seconds."""
        vm.run(["date", "-s", "2030-01-01 00:00:00"])
        ahead = offset(vm)
        assert ahead > 86_400
        with vm.snapshot():
            assert offset(vm) == pytest.approx(ahead, abs=5)
            vm.run(["date", "-s", "2031-01-01 00:00:00"])
        assert offset(vm) == pytest.approx(ahead, abs=5)
        with vm.snapshot():
            vm.power_cut()
        assert offset(vm) == pytest.approx(ahead, abs=5)
        vm.engine.rest()
        assert vm.engine.resting
        assert offset(vm) == pytest.approx(ahead, abs=5)
        assert not vm.engine.resting

    def test_also_of_a_guest_that_was_lost_or_cut_off_in_it(self, factory):
        with factory().boot("tiny", **TINY) as vm:
            vm.write_text("/root/file", "before")
            with vm.snapshot(), vm.snapshot():
                vm.power_cut()
            assert vm.read_text("/root/file") == "before"


class TestFallback:
    def test_a_qemu_that_does_not_ignore_shared_memory(self, first_factory, monkeypatch):
        """It is asked for in vain: guests are booted, and that is said once."""
        execute = Monitor.execute

        def refuse(self, command, arguments=None, **more):
            if command == "migrate-set-capabilities":
                raise MonitorError("QEMU refused it: x-ignore-shared is unknown")
            return execute(self, command, arguments, **more)

        monkeypatch.setattr(Monitor, "execute", refuse)
        one = first_factory()
        for _ in range(2):
            with one.boot("tiny", **TINY) as vm:
                assert vm.origin == "booted"
                vm.run(["true"])
        (line,) = one.told.about("are booted, because they cannot be cloned")
        assert "x-ignore-shared" in line

    def test_a_cache_without_room(self, first_factory, cache, tmp_path):
        """QEMU would be ended by SIGBUS: its guest's memory would lie there."""
        with small_file_system(tmp_path / "small", "64M") as small:
            for entry in cache.iterdir():
                (small / entry.name).symlink_to(entry)
            one = first_factory(cache=small)
            with one.boot("tiny", **TINY) as vm:
                assert vm.origin == "booted"
                vm.run(["true"])
            (line,) = one.told.about("are booted, because they cannot be cloned")
            assert "the cache has no room for 160MiB of memory" in line

    def test_a_template_that_no_clone_can_be_made_of(self, factory, first_factory, cache):
        """A state that QEMU does not take, though it is what was saved."""
        with (one := factory()).boot("tiny", **TINY):
            (opened,) = one._clones._builder._open.values()
            (cache / "templates").mkdir(mode=0o700)
            copy = ["cp", "-a", "--sparse=always", opened.template.folder, cache / "templates"]
            subprocess.run(copy, check=True)
        (template,) = TemplateStore(cache).all()
        (template.folder / "state").write_bytes(b"nonsense")
        content = integrity.read_record(template.folder / "template.json")
        content["digests"]["state"] = integrity.file_digest(template.folder / "state")
        integrity.write_record(template.folder / "template.json", content)
        one = first_factory()
        with one.boot("tiny", **TINY) as vm:
            assert vm.origin == "booted"
        assert one.told.about("are booted, because they cannot be cloned")

    def test_without_clones(self, first_factory, cache):
        one = first_factory("never")
        with one.boot("tiny", **TINY) as vm:
            assert vm.origin == "booted"
        assert not (cache / "templates").exists()


class TestChance:
    """What the host or chance does to one guest is no reason for the next ones to be slow or errors."""

    @pytest.fixture
    def first(self, monkeypatch):
        """Does something before the first call of a function of a module."""

        def arrange(module, name, action):
            original, calls = getattr(module, name), []

            def wrapped(*args, **kwargs):
                calls.append(args)
                if len(calls) == 1:
                    action(*args)
                return original(*args, **kwargs)

            monkeypatch.setattr(module, name, wrapped)
            return calls

        return arrange

    @staticmethod
    def kill(process):
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)

    def test_a_guest_that_is_killed_while_its_template_is_built(self, first_factory, first):
        retried = []
        first(template_builder, "settle", lambda guest, _: self.kill(machine_of(guest).process))
        with first_factory(note_retry=retried.append).boot("tiny", **TINY) as vm:
            assert vm.origin == "cloned"
        (error,) = retried
        assert "SIGKILL" in error.brief

    def test_one_that_is_killed_while_it_boots(self, factory, first):
        retried = []
        first(Running, "answers", lambda running, _: self.kill(running.machine.process))
        with factory("never", note_retry=retried.append).boot("tiny", **TINY) as vm:
            assert vm.origin == "booted"
        (error,) = retried
        assert "SIGKILL" in error.brief
        assert "while booting" in error.brief

    def test_one_that_panics_while_it_boots_is_no_chance(self, first_factory, first):
        retried = []

        def panic(vm, _):
            vm.run(["sh", "-c", "echo c > /proc/sysrq-trigger"])

        first(template_builder, "settle", panic)
        with first_factory(note_retry=retried.append).boot("tiny", **TINY) as vm:
            assert vm.origin == "booted"
        assert retried == []

    def test_a_clone_that_is_killed(self, factory, first):
        first(resume, "from_state", lambda machine, *_: self.kill(machine.process))
        one = factory()
        with one.boot("tiny", **TINY) as vm:
            assert vm.origin == "cloned"
        assert one.told.about("are booted, because they cannot be cloned") == []

    @pytest.mark.parametrize("command", ["migrate-incoming", "cont"])
    def test_one_late_answer_of_qemu(self, factory, monkeypatch, command):
        execute, late = Monitor.execute, []

        def slow(self, name, *args, **more):
            if name == command and not late:
                late.append(name)
                raise MonitorError("no answer", transient=True)
            return execute(self, name, *args, **more)

        one = factory()
        with one.boot("tiny", **TINY):
            pass
        monkeypatch.setattr(Monitor, "execute", slow)
        for _ in range(2):
            with one.boot("tiny", **TINY) as vm:
                assert vm.origin == "cloned"
        assert late == [command]
        assert one.told.about("are booted, because they cannot be cloned") == []

    def test_a_qemu_that_is_stopped_for_a_while(self, factory, first, monkeypatch):
        """It does not greet in time. The next one is given longer, and is cloned, too."""
        monkeypatch.setattr(machine_module, "GREETING_SECONDS", 2.0)
        one = factory()
        with one.boot("tiny", **TINY):
            pass
        spawned = first(
            Monitor, "_await", lambda *_: os.kill(started_by_the_launcher(), signal.SIGSTOP)
        )
        with one.boot("tiny", **TINY) as vm:
            assert vm.origin == "cloned"
        assert spawned
        assert one.backend.hypervisor.pace.slowness >= 2
        assert one.told.about("are booted, because they cannot be cloned") == []

    def test_the_launcher_is_killed(self, factory):
        """All guests of the run are gone, also those that were armed; the next ones come up."""
        one = factory("armed")
        one.expect("tiny", one.hardware("tiny", TINY), 6)
        with one.boot("tiny", **TINY) as vm:
            assert one.await_armed(120)
            launcher = one.backend.hypervisor.launcher._process
            self.kill(launcher)
            with pytest.raises(GuestLost):
                vm.run(["true"])
        for _ in range(2):
            with one.boot("tiny", **TINY) as vm:
                assert vm.origin != "booted"
                vm.run(["true"])
        assert one.told.about("are booted, because they cannot be cloned") == []


def machine_of(guest):
    with guest.engine.use() as running:
        return running.machine


def started_by_the_launcher():
    """The process number of this process's only guest, as soon as it has become QEMU."""
    deadline = Deadline(20)
    while not (found := children_of_the_launcher()) and not deadline.expired:
        deadline.pause(0.001)
    (number,) = found
    return number


def children_of_the_launcher():
    """The process numbers of this process's guests."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if b"qemu" in (stat.parent / "cmdline").read_bytes().split(b"\0")[0]:
                found.append(stat.parent)
    return [int(path.name) for path in found if launcher_of(path) == os.getpid()]


def launcher_of(path):
    """The parent of the parent of a process."""
    parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
    return int(
        Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
    )


def test_many_guests_rest_until_they_are_asked(factory, monkeypatch):
    monkeypatch.setattr("pytest_vmsandbox.guests.backend._RUNNING_PER_PROCESSOR", 1)
    one = factory()
    with ExitStack() as stack:
        guests = [stack.enter_context(one.boot("tiny", **TINY)) for _ in range(6)]
        time.sleep(0.6)
        one.backend.idle.pause_some()
        assert sum(vm.engine.resting for vm in guests) == 6 - (os.cpu_count() or 1)
        for vm in guests:
            assert abs(offset(vm)) < 0.5  # it is asked after it goes on
            assert not vm.engine.resting


def test_another_qemu_has_templates_of_its_own(factory):
    """The digest is of all that a state depends on; here, of the build of QEMU."""
    one = factory()
    blueprint = one.backend.blueprint("tiny", one.hardware("tiny", TINY))
    other = dataclasses.replace(
        blueprint, qemu=dataclasses.replace(find_qemu("x86_64"), build="other")
    )
    assert blueprint.digest != other.digest
