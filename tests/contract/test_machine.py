"""What `Machine` and `Monitor` promise, on a fake QEMU and on the real one."""

import fcntl
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.cache.integrity import file_digest
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import BootError, GuestLost, LaunchError, MonitorError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.machine import host, machine as machine_module, memory, progress
from pytest_vmsandbox.machine.cmdline import Start
from pytest_vmsandbox.machine.disk import Disks, PluggedDisk, empty_overlay
from pytest_vmsandbox.machine.progress import wait_for_guest_time, wait_for_user_space

FORBIDS_PNG = (7, 1)


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


def descriptors():
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def signs_of_progress(machine) -> Any:
    return progress._signs_of_progress(machine)


class TestMonitor:
    def test_answers(self, machine):
        assert machine.monitor.execute("query-status")["status"] == "running"

    def test_takes_arguments(self, machine):
        assert machine.monitor.execute("query-named-block-nodes", {"flat": True}) == []

    def test_refuses_an_unknown_command(self, machine):
        with pytest.raises(MonitorError, match="refused 'no-such-command'") as caught:
            machine.monitor.execute("no-such-command")
        assert caught.value.error_class == "CommandNotFound"
        assert machine.monitor.execute("query-status")

    def test_refuses_wrong_arguments(self, machine):
        with pytest.raises(MonitorError) as caught:
            machine.monitor.execute("remove-fd", {"fdset-id": 77})
        assert caught.value.error_class == "GenericError"

    def test_is_used_by_several_threads(self, machine):
        answers = []

        def ask():
            answers.extend(machine.monitor.execute("query-status")["status"] for _ in range(10))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == ["running"] * 40

    def test_tells_events_in_order(self, machine):
        machine.monitor.execute("stop")
        machine.monitor.execute("cont")
        assert machine.monitor.wait_event("RESUME", since=0, timeout=5)
        names = [event["event"] for event in machine.monitor.events()]
        assert [name for name in names if name in {"STOP", "RESUME"}] == ["STOP", "RESUME"]

    def test_looks_only_at_events_from_a_number_on(self, machine):
        machine.monitor.execute("stop")
        assert machine.monitor.wait_event("STOP", since=0, timeout=5)
        since = len(machine.monitor.events())
        assert machine.monitor.wait_event("STOP", since=since, timeout=0) is None
        machine.monitor.execute("system_reset")
        event = machine.monitor.wait_event("RESET", since=since, timeout=5)
        assert event is not None
        assert event["data"]["guest"] is False

    def test_is_gone_with_qemu(self, machine):
        machine.kill()
        with pytest.raises(MonitorError, match="'query-status'"):
            machine.monitor.execute("query-status", timeout=5)

    def test_makes_the_folder_for_its_logs(self, fake):
        fake.logs = fake.logs / "run" / "it"
        with fake.machine():
            pass
        names = {path.name for path in fake.logs.iterdir()}
        assert names == {"console.log", "qmp.log", "qemu.argv"}

    def test_writes_a_log(self, machine, stand):
        machine.monitor.execute("query-status")
        with pytest.raises(MonitorError):
            machine.monitor.execute("no-such-command")
        lines = (stand.logs / "qmp.log").read_text().splitlines()
        asked = [line.split(" ", 1)[1] for line in lines]
        assert asked[0] == '-> {"execute": "query-status", "arguments": {}}'
        assert asked[1].startswith('<- {"return": {')
        assert '<- {"error": ' in asked[3]

    def test_of_a_lost_guest_tells_the_loss(self, machine):
        machine.kill()
        with pytest.raises(GuestLost, match="signal SIGKILL"):
            machine.execute("query-status")
        assert machine.monitor.closed

    def test_of_a_running_guest_tells_the_refusal(self, machine):
        with pytest.raises(MonitorError, match="refused 'no-such-command'"):
            machine.execute("no-such-command")
        assert not machine.monitor.closed


class TestForward:
    def test_listens_on_loopback(self, machine):
        host_name, port = machine.forward(22)
        assert host_name == "127.0.0.1"
        with socket.create_connection((host_name, port), timeout=5):
            pass

    def test_is_the_same_when_asked_again(self, machine):
        assert machine.forward(22) == machine.forward(22)
        assert machine.forward(22) != machine.forward(80)

    def test_is_another_one_for_another_guest(self, stand):
        with stand.machine(name="a") as a, stand.machine(name="b") as b:
            assert a.forward(22) != b.forward(22)

    def test_of_udp(self, machine):
        tcp, udp = machine.forward(53), machine.forward(53, "udp")
        assert machine.forward(53, "udp") == udp != tcp
        with socket.socket(type=socket.SOCK_DGRAM) as sock, pytest.raises(OSError, match="in use"):
            sock.bind(udp)

    def test_is_refused(self, machine):
        with pytest.raises(MonitorError, match="could not forward TCP port 70000") as caught:
            machine.forward(70000)
        assert "invalid" in caught.value.details.lower()

    def test_ends_with_the_guest(self, stand):
        with stand.machine() as machine:
            address = machine.forward(22)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)


class TestScreenshot:
    def test_is_a_png(self, machine, tmp_path):
        if machine.spec.version < FORBIDS_PNG:
            pytest.skip("QEMU writes PNG from 7.1 on")
        for name in ("one", "two"):
            with (tmp_path / name).open("wb") as file:
                machine.screenshot(file)
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


class TestDisks:
    def test_are_passed_by_descriptor(self, stand, tmp_path):
        base = tmp_path / "base.raw"
        base.write_bytes(bytes(MIB))
        folder = stand.hypervisor.cache
        with (
            Disks.open(base=base, root_size=2 * MIB, blank=[MIB], folder=folder) as disks,
            stand.machine(disks=disks) as machine,
        ):
            nodes = machine.monitor.execute("query-named-block-nodes", {"flat": True})
            drivers = {node["node-name"]: node["drv"] for node in nodes}
            assert drivers["base"] == "raw"
            assert drivers["root"] == drivers["disk0"] == "qcow2"


class TestEnd:
    def test_the_process_is_gone_afterwards(self, stand):
        with stand.machine() as machine:
            pid = machine.process.pid
            assert machine.ended() is None
            machine.check()
            machine.check_booting(0)
        assert gone(pid)

    def test_nothing_stays_open(self, stand):
        with stand.machine():
            pass  # what is made once is made
        before, threads = descriptors(), threading.active_count()
        with stand.machine():
            pass
        assert descriptors() == before
        assert threading.active_count() == threads

    def test_an_error_in_the_body_passes_through(self, stand):
        def use():
            with stand.machine() as machine:
                pids.append(machine.process.pid)
                raise KeyError("mine")

        pids: list[int] = []
        with pytest.raises(KeyError, match="mine"):
            use()
        assert gone(pids[0])

    def test_quits_a_guest_that_does_not_switch_itself_off(self, machine):
        assert machine.end(0.01) is False
        assert machine.ended() == 0
        assert machine.monitor.wait_event("SHUTDOWN", since=0, timeout=5)

    def test_is_lost_when_it_is_switched_off(self, machine):
        machine.end(0.01)
        assert machine.monitor.wait_event("SHUTDOWN", since=0, timeout=5)
        with pytest.raises(GuestLost, match=r"is switched off \(host-qmp-quit\)") as caught:
            machine.check()
        assert "vm.power_on()" in caught.value.remedy
        assert "by the fixture vm" in caught.value.remedy  # a test that runs inside has none

    def test_is_lost_when_it_is_killed(self, machine):
        machine.kill()
        assert machine.ended() == -signal.SIGKILL
        with pytest.raises(GuestLost, match="QEMU ended with signal SIGKILL"):
            machine.check()

    def test_is_lost_when_it_is_killed_from_outside(self, machine):
        os.kill(machine.process.pid, signal.SIGTERM)
        assert machine.process.wait(5) is not None
        with pytest.raises(GuestLost):
            machine.check()

    def test_a_dead_one_can_be_ended(self, machine):
        machine.kill()
        assert machine.end(0) is True
        machine.kill()


class TestStart:
    def test_writes_its_command_line(self, machine, stand):
        words = (stand.logs / "qemu.argv").read_text().splitlines()
        assert words[0] == str(stand.qemu.path)
        assert tuple(words) == machine.process.argv

    def test_writes_the_console_to_a_file(self, machine, stand):
        machine.console.wait_for("SeaBIOS", timeout=20)
        assert b"SeaBIOS" in (stand.logs / "console.log").read_bytes()
        assert machine.stage in {"firmware", "boot loader"}  # the real one gets on

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
    def test_runs_as_nobody_else(self, real):
        with real.machine() as machine:
            assert Path(f"/proc/{machine.process.pid}").stat().st_uid >= 61184

    def test_warns_of_nothing(self, stand, disks, ram, state):
        """A version that is newer than those we know may be about to drop something."""
        with stand.machine(start=Start.TO_BE_SAVED, ram=ram, disks=disks) as machine:
            machine.save(state, with_memory=False)
            assert machine.end(0) is False
            assert machine.process.stderr_tail == ""

    def test_sees_nothing_of_our_environment(self, machine):
        environ = Path(f"/proc/{machine.process.pid}/environ").read_bytes()
        names = {entry.partition(b"=")[0] for entry in environ.split(b"\0")}
        assert names - {b""} == {b"PATH", b"LC_ALL"}

    def test_refuses_what_the_host_has_no_room_for(self, stand, monkeypatch):
        monkeypatch.setattr(host, "available_memory", lambda: 100 * MIB)
        with pytest.raises(LaunchError, match="64MiB of memory does not fit"), stand.machine():
            pass

    def test_an_argument_it_does_not_know(self, stand):
        stand.qemu = type(stand.qemu)(path=stand.qemu.path, version=(1, 0), build="old")
        fault = "exits" if stand.kind == "fake" else None
        with (
            pytest.raises(LaunchError, match="QEMU ended with exit status 1") as caught,
            stand.machine(fault=fault),
        ):
            pass
        assert "unsupported machine type" in caught.value.details
        assert "-nodefaults" in caught.value.details

    def test_a_missing_program(self, stand, tmp_path):
        stand.qemu = type(stand.qemu)(path=tmp_path / "none", version=(7, 2), build="none")
        with pytest.raises(LaunchError, match="could not be started"), stand.machine():
            pass


class TestFaults:
    """What only a fake can be made to do."""

    def test_never_greets(self, fake, monkeypatch):
        monkeypatch.setattr(machine_module, "GREETING_SECONDS", 0.2)
        monkeypatch.setattr(machine_module, "_TERM_SECONDS", 0.1)
        with pytest.raises(LaunchError, match="QEMU does not answer"), fake.machine(fault="silent"):
            pass

    @pytest.mark.parametrize("fault", ["garbage", "garbage-later"])
    def test_does_not_speak_the_protocol(self, fake, fault, monkeypatch):
        monkeypatch.setattr(machine_module, "_TERM_SECONDS", 0.1)
        with pytest.raises(LaunchError, match="QEMU does not answer"), fake.machine(fault=fault):
            pass

    def test_dies_in_the_middle(self, fake):
        with fake.machine(fault="dies-in-the-middle") as machine:
            with pytest.raises(MonitorError, match="'query-version'"):
                machine.monitor.execute("query-version")
            machine.process.wait(5)
            with pytest.raises(GuestLost, match="signal SIGABRT") as caught:
                machine.check()
            assert "assertion failed: version >= 0" in caught.value.details
            assert "SeaBIOS (fake)" in caught.value.details

    def test_hangs(self, fake):
        with fake.machine(fault="hangs") as machine:
            with pytest.raises(
                MonitorError, match=r"did not answer to 'query-version' within 0\.1 s"
            ):
                machine.monitor.execute("query-version", timeout=0.1)
            assert machine.monitor.execute("query-status")

    @pytest.mark.parametrize(
        ("fault", "status"), [("stubborn", -signal.SIGTERM), ("very-stubborn", -signal.SIGKILL)]
    )
    def test_does_not_quit(self, fake, fault, status, monkeypatch):
        monkeypatch.setattr(machine_module, "_TERM_SECONDS", 0.2)
        with fake.machine(fault=fault) as machine:
            assert machine.end(0.01) is False
            assert machine.ended() == status

    def test_panics(self, fake):
        with fake.machine(fault="panic") as machine:
            assert machine.monitor.wait_event("GUEST_PANICKED", since=0, timeout=5)
            machine.console.wait_for("Call Trace", timeout=5)
            with pytest.raises(GuestLost, match="kernel panic: Attempted to kill init!") as caught:
                machine.check()
            assert caught.value.stage == "kernel"
            assert "Call Trace" in caught.value.details
            error = machine.boot_error(caught.value, 3)
            assert "while booting, 3 s after power-on" in error.brief

    def test_prints_what_a_panic_prints(self, fake):
        with fake.machine(fault="prints-panic") as machine:
            machine.console.wait_for("Kernel panic", timeout=5)
            machine.check()

    @pytest.mark.parametrize("name", ["aarch64", "armv7l", "riscv64"])
    def test_panics_where_only_the_console_tells(self, fake, name):
        """Any program can write that text, so the guest is asked, once for all that it has written."""
        asked = []
        with fake.machine(fault="prints-panic", architecture=ARCHITECTURES[name]) as machine:
            machine.console.wait_for("end Kernel panic", timeout=5)
            machine.check()  # nobody can ask it
            machine.is_silent = lambda: asked.append(machine.check())  # which asks nobody
            machine.check()
            machine.check()
            assert len(asked) == 1
            machine.console.feed(b"it goes on\n")
            machine.is_silent = lambda: True
            for _ in range(2):
                with pytest.raises(GuestLost, match="kernel panic: says a test"):
                    machine.check()

    @pytest.mark.parametrize("name", ["x86_64", "i686", "ppc64le", "s390x"])
    def test_a_board_that_reports_panics_is_believed(self, fake, name):
        with fake.machine(fault="prints-panic", architecture=ARCHITECTURES[name]) as machine:
            machine.console.wait_for("end Kernel panic", timeout=5)
            machine.is_silent = lambda: pytest.fail("nobody needs to ask")
            machine.check()

    @pytest.mark.parametrize(
        ("fault", "cause", "remedy"),
        [
            ("internal-error", r"\(tcg\)", "--vm-accel=tcg"),
            ("io-error", "disk is full", "make room"),
        ],
    )
    def test_stops_by_itself(self, fake, fault, cause, remedy):
        with fake.machine(fault=fault) as machine:
            assert machine.monitor.wait_event("STOP", since=0, timeout=5)
            with pytest.raises(GuestLost, match=f"status '{fault}'.*{cause}") as caught:
                machine.check()
            assert caught.value.stage == "launch"
            assert remedy in caught.value.remedy

    @pytest.mark.parametrize(
        ("fault", "told", "remedy"),
        [
            ("disk-full", "No space left on device: this machine's disk is full", "make room"),
            ("over-quota", "Disk quota exceeded: this machine's disk is full", "make room"),
            ("disk-damaged", "Input/output error: this machine's disk may be", "dmesg"),
        ],
    )
    def test_cannot_write_a_disk(self, fake, disks, fault, told, remedy):
        """The guest was told, too. What it made of that is of no interest."""
        with fake.machine(disks=disks, fault=fault) as machine:
            for check in (machine.check_disks, machine.check):
                with pytest.raises(GuestLost, match=f"write a disk of the guest: {told}") as caught:
                    check()
                assert caught.value.stage == "launch"
                assert remedy in caught.value.remedy
            machine.kill()
            with pytest.raises(GuestLost, match=told):
                machine.check_disks()

    def test_cannot_write_another_block_device(self, fake, disks):
        """Somebody has put it under a disk."""
        with fake.machine(disks=disks, fault="disk-fails-on-purpose") as machine:
            assert machine.monitor.wait_event("BLOCK_IO_ERROR", since=0, timeout=5)
            machine.check_disks()
            machine.check()

    def test_goes_on_after_it_has_stopped_by_itself(self, fake):
        with fake.machine(fault="io-error") as machine:
            machine.resume()
            machine.check()

    def test_does_not_tell_why_it_stopped(self, fake):
        with fake.machine(fault="stops-and-falls-silent") as machine:
            assert machine.monitor.wait_event("STOP", since=0, timeout=5)
            machine.check()
            machine.kill()
            with pytest.raises(GuestLost, match="signal SIGKILL"):
                machine.check()

    @pytest.mark.parametrize("_", range(3))
    def test_ends_as_soon_as_it_has_greeted(self, fake, _):
        """Whether it is there long enough to be had depends on who is faster."""

        def use():
            with fake.machine(fault="greets-and-ends") as machine:
                assert machine.process.wait(5) == 3
                machine.check()

        with pytest.raises(
            (GuestLost, LaunchError), match="QEMU ended with exit status 3"
        ) as caught:
            use()
        assert "fake: changed its mind" in caught.value.details

    def test_switches_itself_off(self, fake):
        with fake.machine(fault="powers-off") as machine:
            machine.execute("system_powerdown")
            assert machine.monitor.wait_event("SHUTDOWN", since=0, timeout=5)
            assert machine.end(5) is True
            with pytest.raises(GuestLost, match=r"is switched off \(guest-shutdown\)") as caught:
                machine.check()
            assert caught.value.stage == "command"
            assert "on purpose" in caught.value.remedy
            error = machine.boot_error(caught.value, 3)
            assert error.stage == "firmware"
            assert "--append" in error.remedy  # no test did that
            assert "on purpose" not in error.remedy


class TestUserSpace:
    """Whether a kernel starts its first program, as long as there is progress."""

    @pytest.fixture(autouse=True)
    def look_often(self, monkeypatch):
        monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.01)

    @pytest.fixture
    def ticks(self, monkeypatch):
        """What the kernel says of the guest's time, one after the other; it stays at the last."""
        ticks = [0]
        monkeypatch.setattr(
            progress, "guest_time", lambda _: ticks.pop(0) if len(ticks) > 1 else ticks[0]
        )
        return ticks

    def test_is_reached(self, fake):
        with fake.machine(fault="boots") as machine:
            wait_for_user_space(machine, standstill=60, at_most=60)
            assert machine.stage == "init"

    def test_is_not_reached(self, fake):
        with fake.machine() as machine:
            with pytest.raises(BootError, match=r"it: no program ran within 0\.1 s") as caught:
                wait_for_user_space(machine, standstill=60, at_most=0.1)
            assert caught.value.stage == "firmware"
            assert caught.value.seconds >= 0.1

    def test_nothing_to_boot_ends_it(self, real):
        with real.machine() as machine:
            with pytest.raises(BootError, match="it: the firmware found nothing to boot") as caught:
                wait_for_user_space(machine, standstill=60, at_most=60)
            assert caught.value.stage == "firmware"

    def test_a_standstill(self, fake, ticks):
        with fake.machine(accelerator="kvm") as machine:
            with pytest.raises(BootError, match="made no progress for") as caught:
                wait_for_user_space(machine, standstill=0.1, at_most=60)
            assert 0.1 <= caught.value.seconds < 60

    def test_progress_of_the_processor_prolongs(self, fake, ticks):
        ticks += range(1, 10)
        with (
            fake.machine(accelerator="kvm") as machine,
            pytest.raises(BootError, match="made no progress"),
        ):
            wait_for_user_space(machine, standstill=1e-9, at_most=60)
        assert ticks == [9]

    def test_a_host_without_a_free_processor_is_no_standstill(self, fake, ticks, monkeypatch):
        """QEMU waits for one all the time: nothing can be said of the guest."""
        began = time.monotonic()
        monkeypatch.setattr(progress, "time_waited", lambda _: time.monotonic() - began)
        with (
            fake.machine(accelerator="kvm") as machine,
            pytest.raises(BootError, match="no program ran"),
        ):
            wait_for_user_space(machine, standstill=0.05, at_most=0.2)

    def test_text_alone_is_no_progress(self, fake, ticks, monkeypatch):
        """KVM that emulates firmware one instruction after the other writes, too."""
        texts = [b"one", b"two", b"three"]
        with fake.machine(accelerator="kvm") as machine:
            monkeypatch.setattr(
                progress, "time_waited", lambda _: machine.console.feed(texts.pop()) or 0.0
            )
            with pytest.raises(BootError, match="made no progress"):
                wait_for_user_space(machine, standstill=1e-9, at_most=60)
        assert len(texts) == 1  # two looks

    def test_emulated_text_is_progress(self, real):
        with real.machine() as machine:
            machine.console.wait_for("SeaBIOS", 20)
            machine.pause()  # its registers stay
            before = signs_of_progress(machine)
            assert signs_of_progress(machine) == before
            machine.console.feed(b"more")
            assert signs_of_progress(machine) != before

    def test_emulated_registers_are_progress(self, real):
        """Firmware changes one all the time."""
        with real.machine() as machine:
            before, deadline = signs_of_progress(machine)[1], Deadline(20)
            while signs_of_progress(machine)[1] == before:
                assert not deadline.expired

    def test_where_the_kernel_does_not_tell_the_guests_time(self, fake, monkeypatch):
        monkeypatch.setattr(progress, "guest_time", lambda _: None)
        with fake.machine(accelerator="kvm") as machine:
            size, _ = signs_of_progress(machine)
            assert size == machine.console.size

    def test_a_guest_that_ends_is_noticed_early(self, fake):
        with fake.machine() as machine:
            machine.kill()
            with pytest.raises(BootError, match="while booting"):
                wait_for_user_space(machine, standstill=60, at_most=60)

    def test_an_accelerator_that_gives_up_is_noticed_early(self, fake):
        with fake.machine(fault="internal-error") as machine:
            with pytest.raises(BootError, match="'internal-error'") as caught:
                wait_for_user_space(machine, standstill=60, at_most=60)
            assert caught.value.stage == "launch"


def status(machine):
    return machine.monitor.execute("query-status")["status"]


@pytest.fixture
def ram(tmp_path):
    """A file for the memory of a guest."""
    with memory.create(tmp_path / "memory", 64 * MIB) as file:
        (tmp_path / "memory").chmod(0o666)  # QEMU may be somebody else
        yield file


class TestState:
    def test_pause_and_resume(self, machine):
        machine.pause()
        assert status(machine) == "paused"
        machine.pause()
        machine.check()
        machine.resume()
        assert status(machine) == "running"

    def test_one_that_was_saved_goes_on(self, machine, state):
        machine.save(state, with_memory=True)
        assert status(machine) != "running"
        machine.check()
        assert os.fstat(state.fileno()).st_size > 0
        machine.resume()
        assert status(machine) == "running"

    def test_is_saved_again_and_again(self, machine, tmp_path):
        for name in ("one", "two"):
            with (tmp_path / name).open("xb") as file:
                machine.save(file, with_memory=True)
            assert (tmp_path / name).stat().st_size > 0
            machine.resume()

    def test_its_file_is_written_and_read_from_the_beginning(self, stand, state):
        state.write(b"old " * MIB)
        with stand.machine() as machine:
            machine.save(state, with_memory=True)
        state.seek(0)
        assert state.read(4) != b"old "
        with stand.machine(start=Start.RESTORED, state=state) as machine:
            assert status(machine) == "paused"

    def test_qemu_keeps_no_descriptor_of_its_file(self, stand, state):
        def kept(machine):
            folder = Path(f"/proc/{machine.process.pid}/fd")
            open_files = [os.readlink(it) for it in folder.iterdir()]
            return open_files.count(state.name), machine.execute("query-fdsets")

        def nothing_kept(machine):
            deadline = Deadline(20)  # QEMU closes the file a moment after it has told of the end
            while kept(machine) != (0, []) and not deadline.expired:
                deadline.pause(0.01)
            return kept(machine) == (0, [])

        with stand.machine() as machine:
            machine.save(state, with_memory=True)
            assert nothing_kept(machine)
        with stand.machine(start=Start.RESTORED, state=state) as machine:
            assert nothing_kept(machine)

    def test_with_its_memory(self, stand, state):
        with stand.machine() as machine:
            machine.save(state, with_memory=True)
        for _ in range(2):
            with stand.machine(start=Start.RESTORED, state=state) as machine:
                assert status(machine) == "paused"
                machine.resume()
                assert status(machine) == "running"

    def test_clones(self, stand, ram, state):
        """Two at a time; they change nothing in the file that they begin with."""
        with stand.machine(start=Start.TO_BE_SAVED, ram=ram) as machine:
            machine.console.wait_for("SeaBIOS", timeout=20)
            machine.save(state, with_memory=False)
            assert machine.end(0) is False
        assert os.fstat(state.fileno()).st_size < 4 * MIB  # no memory is in it
        before = file_digest(Path(ram.name))
        with (
            memory.for_clones(Path(ram.name), stand.qemu.version) as shared,
            stand.machine(start=Start.CLONED, ram=shared, state=state, name="a") as a,
            stand.machine(start=Start.CLONED, ram=shared, state=state, name="b") as b,
        ):
            for clone in (a, b):
                assert status(clone) == "paused"
                clone.resume()
                clone.execute("system_reset")
                assert status(clone) == "running"
        assert file_digest(Path(ram.name)) == before

    def test_one_that_goes_on_writing_its_memory(self, stand, ram, state):
        with stand.machine(start=Start.TO_BE_SAVED, ram=ram) as machine:
            machine.save(state, with_memory=False)
        with stand.machine(start=Start.CONTINUED, ram=ram, state=state) as machine:
            machine.resume()
            assert status(machine) == "running"

    @pytest.mark.parametrize("content", [b"", b"no state at all\n" * 1000])
    def test_nothing_that_could_be_loaded(self, stand, state, content):
        state.write(content)
        with (
            pytest.raises(LaunchError, match="cannot load the saved state of the guest") as caught,
            stand.machine(start=Start.RESTORED, state=state),
        ):
            pass
        assert "load of migration failed" in caught.value.details

    def test_a_state_of_another_machine(self, stand, state):
        with stand.machine() as machine:
            machine.save(state, with_memory=True)
        before = descriptors()
        with (
            pytest.raises(LaunchError, match="cannot load the saved state of the guest"),
            stand.machine(start=Start.RESTORED, state=state, memory=96),
        ):
            pass
        assert descriptors() == before

    def test_a_disk_that_is_full(self, machine):
        """Here, a file that may not grow."""
        number = os.memfd_create("full", os.MFD_ALLOW_SEALING)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        with (
            os.fdopen(number, "r+b", buffering=0) as full,
            pytest.raises(MonitorError, match="save or load the guest's state") as caught,
        ):
            machine.save(full, with_memory=True)
        assert caught.value.details
        machine.resume()
        assert status(machine) == "running"

    def test_one_that_was_not_meant_to_be_loaded(self, machine, state, monkeypatch):
        monkeypatch.setattr(machine_module, "_TERM_SECONDS", 0.1)
        with pytest.raises(LaunchError, match="cannot load the saved state of the guest") as caught:
            machine._load(state, has_memory=True)
        assert "refused 'migrate-incoming'" in caught.value.details

    def test_one_that_is_never_saved(self, fake, state, monkeypatch):
        monkeypatch.setattr(machine_module, "_STATE_SECONDS", 0.1)
        with (
            fake.machine(fault="never-saves") as machine,
            pytest.raises(MonitorError, match=r"state within [\d.]+ s"),
        ):
            machine.save(state, with_memory=True)

    def test_one_that_ends_meanwhile(self, fake, state, monkeypatch):
        monkeypatch.setattr(machine_module, "_LOOK_SECONDS", 0.05)
        with fake.machine(fault="never-saves") as machine:
            timer = threading.Timer(0.1, machine.kill)
            timer.start()
            with pytest.raises(GuestLost, match="signal SIGKILL"):
                machine.save(state, with_memory=True)
            timer.join()


class TestOnTop:
    @pytest.fixture
    def fresh(self, disks, tmp_path):
        """Makes empty files, one for each disk."""
        with ExitStack() as stack:
            yield lambda: [
                stack.enter_context(empty_overlay(size, tmp_path)) for size in disks.sizes
            ]

    def test_again_and_again(self, stand, disks, fresh):
        with stand.machine(disks=disks) as machine:
            before = machine.monitor.execute("query-named-block-nodes", {"flat": True})
            machine.pause()
            for _ in range(20):
                machine.drives.put_on_top(fresh())
            machine.resume()
            after = machine.monitor.execute("query-named-block-nodes", {"flat": True})
            drivers = [{it["node-name"]: it["drv"] for it in nodes} for nodes in (before, after)]
            more = drivers[1].keys() - drivers[0].keys()
            assert [drivers[1][name] for name in more].count("qcow2") == 40
            assert status(machine) == "running"

    def test_what_is_no_disk(self, stand, disks, fresh, tmp_path):
        (tmp_path / "text").write_bytes(b"no qcow2 " * 1000)
        with stand.machine(disks=disks) as machine, (tmp_path / "text").open("r+b") as file:
            with pytest.raises(MonitorError, match="not in qcow2 format"):
                machine.drives.put_on_top([file])
            machine.drives.put_on_top(fresh())

    def test_a_guest_is_saved_with_them(self, stand, disks, fresh, state, tmp_path):
        """And goes on with other files on top of what they had by then, twice."""

        def fresh_one(size):
            return stack.enter_context(empty_overlay(size, tmp_path))

        with stand.machine(disks=disks) as machine, ExitStack() as stack:
            machine.pause()
            frozen = disks.frozen(stack)
            machine.drives.put_on_top(fresh())
            machine.save(state, with_memory=True)
            machine.resume()
            for _ in range(2):
                with stand.machine(
                    disks=frozen.on_top(fresh_one), start=Start.RESTORED, state=state
                ) as other:
                    other.resume()
                    assert status(other) == "running"


class TestPlugging:
    """No guest is there that would answer, but a reset does what it should."""

    @pytest.fixture
    def disk(self, tmp_path):
        (tmp_path / "content").write_bytes(b"content" * 1000)
        with ExitStack() as stack:
            yield PluggedDisk(
                name="data",
                port="port1",
                size=MIB,
                read_only=False,
                base=stack.enter_context((tmp_path / "content").open("rb")),
                layers=(stack.enter_context(empty_overlay(MIB, tmp_path)),),
            )

    def held(self, machine):
        """The block devices of a QEMU, and the sets of its descriptors."""
        nodes = machine.monitor.execute("query-named-block-nodes", {"flat": True})
        names = {it["node-name"] for it in nodes if not it["node-name"].startswith("#")}
        return names, {it["fdset-id"] for it in machine.monitor.execute("query-fdsets")}

    def test_it_comes_and_goes(self, stand, disks, disk, tmp_path):
        with stand.machine(disks=disks) as machine, ExitStack() as stack:
            fresh = [stack.enter_context(empty_overlay(MIB, tmp_path)) for _ in range(6)]
            before = self.held(machine)
            for on_top in fresh[:3], fresh[3:]:
                machine.drives.plug(disk)
                assert self.held(machine)[0] - before[0] == {"at-data", "at-data.base"}
                machine.drives.put_on_top(on_top)
                assert machine.drives.unplug("data", Deadline(0), machine.check) is False
                machine.monitor.execute("system_reset")
                assert machine.drives.unplug("data", Deadline(30), machine.check) is True
                nodes, sets = self.held(machine)
                assert (len(nodes), len(sets)) == (len(before[0]) + 2, len(before[1]) + 2)
                before = nodes, sets  # with what is now on top of the disks that stay

    def test_what_cannot_be_plugged(self, stand, disks, disk, tmp_path):
        (tmp_path / "text").write_bytes(b"no qcow2 " * 1000)
        with stand.machine(disks=disks) as machine, (tmp_path / "text").open("r+b") as file:
            before = self.held(machine)
            with pytest.raises(MonitorError, match="not in qcow2 format"):
                machine.drives.plug(replace(disk, layers=(file,)))
            with pytest.raises(MonitorError, match="[Bb]us 'port9'"):
                machine.drives.plug(replace(disk, port="port9"))
            assert self.held(machine) == before
            machine.drives.plug(disk)

    def test_a_guest_is_saved_with_it(self, stand, disks, disk, state, tmp_path):
        with stand.machine(disks=disks) as machine, ExitStack() as stack:

            def fresh(size):
                return stack.enter_context(empty_overlay(size, tmp_path))

            machine.drives.plug(disk)
            machine.pause()
            frozen = replace(disks, plugged=(disk,)).frozen(stack)
            on_top = frozen.on_top(fresh)
            machine.drives.put_on_top(on_top.tops())
            machine.save(state, with_memory=True)
            with stand.machine(
                disks=frozen.on_top(fresh), start=Start.RESTORED, state=state
            ) as other:
                other.resume()
                assert {"at-data", "at-data.0", "at-data.base"} <= self.held(other)[0]
                other.drives.put_on_top([fresh(MIB) for _ in range(3)])
                other.drives.unplug("data", Deadline(0), other.check)
                other.monitor.execute("system_reset")
                assert other.drives.unplug("data", Deadline(30), other.check) is True
                assert not any("data" in name for name in self.held(other)[0])


class TestGuestTime:
    """Whether the host's processors run a guest's own code, as long as there is progress."""

    @pytest.fixture(autouse=True)
    def look_often(self, monkeypatch):
        monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.01)
        monkeypatch.setattr(progress, "time_waited", lambda _: 0.0)

    @pytest.fixture
    def ticks(self, monkeypatch):
        """What the kernel says of the guest's time, one after the other; it stays at the last."""
        ticks: list[int | None] = []
        monkeypatch.setattr(
            progress, "guest_time", lambda _: ticks.pop(0) if len(ticks) > 1 else ticks[0]
        )
        return ticks

    def test_a_second_is_enough(self, fake, ticks):
        ticks += [0, 1, os.sysconf("SC_CLK_TCK") - 1, os.sysconf("SC_CLK_TCK")]
        with fake.machine(accelerator="kvm") as machine:
            wait_for_guest_time(machine, first=60, standstill=60, at_most=60)

    def test_firmware_that_does_not_begin(self, fake, ticks):
        """KVM that emulates single instructions gets on, but the processor runs none of them."""
        ticks.append(0)
        with (
            fake.machine(accelerator="kvm") as machine,
            pytest.raises(BootError, match=r"no progress for 0\.05 s"),
        ):
            wait_for_guest_time(machine, first=0.05, standstill=60, at_most=60)

    def test_a_boot_loader_may_wait(self, fake, ticks):
        ticks.append(7)
        with (
            fake.machine(accelerator="kvm") as machine,
            pytest.raises(BootError, match=r"no progress for 0\.1 s"),
        ):
            wait_for_guest_time(machine, first=1e-9, standstill=0.1, at_most=60)

    def test_too_slow(self, fake, ticks):
        ticks += range(1, 50)
        with (
            fake.machine(accelerator="kvm") as machine,
            pytest.raises(BootError, match=r"no system ran within 0\.1 s"),
        ):
            wait_for_guest_time(machine, first=60, standstill=60, at_most=0.1)

    def test_where_it_is_not_accounted_the_console_tells(self, fake, ticks):
        ticks.append(None)
        with fake.machine(accelerator="kvm", fault="boots") as machine:
            wait_for_guest_time(machine, first=60, standstill=60, at_most=60)
