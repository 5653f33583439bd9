"""Guests that go on from the moment of another one."""

import time

import pytest

from pytest_vmsandbox import ConfigError, GuestLost

HOUR = 3600
COUNT = "i=0; while sleep 0.1; do i=$((i + 1)); echo $i >/root/count; done"
RANDOM = ["head", "-c", "16", "/dev/urandom"]

pytestmark = [pytest.mark.vm("tiny", memory="160MiB"), pytest.mark.origins("cloned")]


def count(vm):
    return int(vm.read_text("/root/count"))


def ahead(vm):
    """By how many seconds the guest's clock is ahead of this host's."""
    return int(vm.run(["date", "+%s"]).stdout) - time.time()


def test_forks_go_on_on_their_own(vm):
    program = vm.popen(["sh", "-c", COUNT])
    disk = vm.attach_disk(size="1MiB")
    vm.shell(f"echo hello >{disk.device}; date -s @$(($(date +%s) + {HOUR})); echo me >>/etc/hosts")
    vm.wait_until(["test", "-s", "/root/count"], timeout=60)
    inside = ["sh", "-c", f"hostname; cat /etc/hosts; head -c 5 {disk.device}"]
    same = vm.run(inside).stdout
    with vm.fork(2) as forks:
        guests = [vm, *forks]
        assert len({guest.name for guest in guests}) == 3
        assert [guest.run(inside).stdout for guest in guests] == [same] * 3
        assert all(abs(ahead(guest) - HOUR) < 2 for guest in guests)
        assert len({guest.run(RANDOM, text=False).stdout for guest in guests}) == 3
        for guest in guests:
            guest.write_text("/root/mine", guest.name)
            guest.shell(f"echo {guest.name} >{disk.device}")
        for guest in guests:
            assert guest.read_text("/root/mine") == guest.name
            assert guest.run(["head", "-n", "1", disk.device]).stdout.strip() == guest.name
        before = [count(guest) for guest in guests]
        for guest, then in zip(guests, before, strict=True):
            guest.shell(f"until [ $(cat /root/count) -gt {then} ]; do sleep 0.1; done", timeout=60)
        assert program.poll() is None
        first, second = forks
        with first.fork() as (third,):
            assert third.read_text("/root/mine") == first.name
        first.power_cut()
        first.power_on()
        assert first.run(["hostname"]).stdout == vm.run(["hostname"]).stdout
        assert first.shell("cat /sys/block/*/serial").stdout.split() == [disk.name]
        assert second.alive
    assert (vm.alive, first.alive, second.alive, third.alive) == (True, False, False, False)


def test_forks_end_with_their_guest_and_hear_of_its_failure(vm_factory, monkeypatch):
    ended = []
    callbacks = vm_factory.backend.callbacks
    monkeypatch.setattr(
        callbacks, "guest_stopping", lambda guest, error: ended.append((guest.name, repr(error)))
    )
    forks = []

    def fail():
        with vm_factory.boot("tiny", memory="160MiB") as vm:
            forks.extend(vm.fork())
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    (fork,) = forks
    assert not fork.alive
    assert next(name for name, _ in ended) == fork.name
    assert [error for _, error in ended] == ["ValueError('mine')"] * 2


def test_forks_leave_private_networks(vm_factory):
    lan = vm_factory.network("lan")
    with vm_factory.boot("tiny", memory="160MiB", networks=[lan]) as vm, vm.fork() as (fork,):
        with vm_factory.boot("tiny", memory="160MiB", networks=[lan]) as peer:
            ping = ["ping", "-c", "1", "-W", "2", str(lan.address(peer))]
            assert vm.run(ping, check=False).returncode == 0
            assert fork.run(ping, check=False).returncode == 1
        show = ["ip", "-o", "-4", "addr", "show", "dev", lan.interface(vm)]
        assert str(lan.address(vm)) in fork.run(show).stdout


def test_what_cannot_be_forked(vm):
    for count in (0, True, "x"):
        with pytest.raises(ConfigError, match="no such number"):
            vm.fork(count)
    with vm.faults.clock(60), pytest.raises(ConfigError, match="while faults are in force"):
        vm.fork()
    vm.power_cut()
    with pytest.raises(GuestLost, match="switched off"):
        vm.fork()
