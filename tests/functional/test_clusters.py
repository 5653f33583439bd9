"""Several machines of `tiny`, with names and networks of their own."""

import threading
from contextlib import ExitStack
from dataclasses import replace
from inspect import getsource

import pytest

from pytest_vmsandbox import CacheError, ConfigError, LaunchError
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory

TRIO = {"db1": "tiny", "db2": {"image": "tiny", "memory": "192MiB"}, "db3": "tiny"}


@pytest.mark.vm_cluster(
    TRIO, networks={"lan": ["db1", "db2", "db3"], "wan": {"machines": ["db1", "db3"]}}
)
def test_names_and_networks(vm_cluster):
    assert [*vm_cluster] == ["db1", "db2", "db3"]
    assert [*vm_cluster.networks] == ["lan", "wan"]
    assert vm_cluster.network is vm_cluster.networks["lan"]
    with pytest.raises(KeyError, match="the machines of this cluster are db1, db2, db3"):
        vm_cluster["db4"]
    for name, guest in vm_cluster.items():
        assert guest.name.startswith(f"{name}-")
        assert guest.run(["hostname"]).stdout == f"{name}\n"
        for other in vm_cluster:
            guest.run(["ping", "-c1", "-W20", other])
    assert vm_cluster["db2"].spec.memory == 192 * 1024**2
    one, wan = vm_cluster["db1"], vm_cluster.networks["wan"]
    assert one.engine.idle_seconds == 0.0  # others talk to it, so it is never paused
    vm_cluster["db3"].run(["ping", "-c1", "-W20", str(wan.address(one))])
    with pytest.raises(ConfigError, match="not on the network 'wan'"):
        wan.address(vm_cluster["db2"])
    one.power_cut()
    one.power_on()
    assert one.run(["hostname"]).stdout == "db1\n"
    one.run(["ping", "-c1", "-W20", "db2"])


@pytest.mark.origins("cloned")
def test_one_that_cannot_be_had(vm_factory, monkeypatch):
    """The others end, and the error names it."""
    others, is_up, started = [], threading.Event(), GuestFactory.started

    def start(self, image, arguments, hostname, stack):
        if hostname == "db2":
            assert is_up.wait(60)
            raise LaunchError("there is no room")
        others.append(started(self, image, arguments, hostname, stack))
        is_up.set()
        return others[0]

    monkeypatch.setattr(GuestFactory, "started", start)
    text = "the machine 'db2' of the cluster: there is no room"
    with (
        pytest.raises(LaunchError, match=text),
        vm_factory.cluster({"db1": "tiny", "db2": "tiny"}),
    ):
        pytest.fail("there is no such cluster")
    (other,) = others
    assert not other.alive


def formed(cluster):
    """A server in one, a client that is connected to it in the other, and a note."""
    one, two = cluster.values()
    # What reads no input ends the connection.
    one.shell("(sleep 99999 | nc -l -p 9000 >/tmp/heard) </dev/null >/dev/null 2>&1 &")
    # A client that comes too early is refused, and ends.
    one.wait_until(["sh", "-c", "netstat -ltn | grep -q ':9000 '"], timeout=120)
    two.shell("touch /tmp/said; (tail -f /tmp/said | nc db1 9000) </dev/null >/dev/null 2>&1 &")
    say(cluster, "before")


def say(cluster, word):
    one, two = cluster.values()
    two.shell(f"echo {word} >>/tmp/said")
    one.wait_until(["grep", "-q", word, "/tmp/heard"], timeout=120)


@pytest.mark.origins("cloned")
def test_a_clone_of_the_whole(vm_factory):
    """Names, addresses and connections are as before. No clone sees another, nor the original."""
    pair = {"db1": "tiny", "db2": "tiny"}
    with vm_factory.cluster(pair) as original, ExitStack() as stack:
        formed(original)
        sealed = stack.enter_context(original.seal())
        clones = [stack.enter_context(vm_factory.cluster(sealed)) for _ in range(2)]
        for number, cluster in enumerate([*clones, original]):
            assert [*cluster] == ["db1", "db2"]
            one, two = cluster.values()
            assert one.run(["hostname"]).stdout == "db1\n"
            assert cluster.network.address(two) == original.network.address(original["db2"])
            two.run(["ping", "-c1", "-W20", "db1"])
            say(cluster, f"word-{number}")
            assert one.read_text("/tmp/heard") == f"before\nword-{number}\n"
        with vm_factory.cluster(sealed) as late:
            late["db1"].power_cut()
            late["db1"].power_on()
            late["db2"].run(["ping", "-c1", "-W20", "db1"])
            late["db1"].run(["ping", "-c1", "-W20", "db2"])
    with pytest.raises(ConfigError, match="the sealed cluster of db1, db2 is over"):
        vm_factory.cluster(sealed).__enter__()


@pytest.mark.origins("cloned")
def test_formed_once_and_armed(vm_factory):
    """What an earlier run has formed is found in the cache. From the second clone on, one is armed ahead."""
    called, origins = [], []

    def form(cluster):
        called.append(cluster)
        formed(cluster)
        disk = cluster["db2"].attach_disk(size="1MiB", name="extra")
        cluster["db2"].shell(f"ln -s {disk.device} /tmp/disk; echo kept >/tmp/disk; sync")

    pair = {"db1": "tiny", "db2": "tiny"}
    settings = replace(vm_factory.backend.settings, clones="armed")
    for run in range(2):
        origins.clear()
        with GuestFactory.open(settings) as factory:
            sealed = factory.prepare_cluster(pair, form, depends_on=[getsource(formed)])
            for number in range(3 if run else 1):
                with factory.cluster(sealed) as cluster:
                    say(cluster, f"word-{number}")
                    assert cluster["db1"].read_text("/tmp/heard") == f"before\nword-{number}\n"
                    show = "echo 3 >/proc/sys/vm/drop_caches; head -n1 /tmp/disk"
                    assert cluster["db2"].shell(show, user="root").stdout == "kept\n"
                    cluster["db2"].detach("extra")
                    origins.append({guest.origin for guest in cluster.values()})
    assert len(called) <= 1
    assert origins == [{"cloned"}, {"cloned"}, {"armed"}]


@pytest.mark.origins("cloned")  # whatever `clones` says below
@pytest.mark.parametrize(("clones", "count"), [("never", 0), ("demand", 1)])
def test_formed_for_each_test(vm_factory, monkeypatch, clones, count):
    """So it is where there are no clones. It is told unless it was asked for."""
    monkeypatch.setattr(Blueprint, "unsaved", "QEMU does not save it")
    called, told = [], []

    def form(cluster):
        called.append(cluster)
        cluster["db1"].write_text("/tmp/formed", str(len(called)))

    settings = replace(vm_factory.backend.settings, clones=clones)
    with GuestFactory.open(settings, Announcer(tell=told.append)) as factory:
        for number in (1, 2):
            sealed = factory.prepare_cluster({"db1": "tiny"}, form, depends_on=[])
            assert sealed.machines == ("db1",)
            with factory.cluster(sealed) as cluster:
                assert cluster["db1"].read_text("/tmp/formed") == str(number)
                assert cluster["db1"].origin == "booted"
    lines = [line for line in told if line.startswith("the cluster of db1 is formed for each test")]
    assert len(lines) == count
    assert all("QEMU does not save it" in line for line in lines)


@pytest.mark.origins("cloned")
@pytest.mark.parametrize("error", [CacheError("of mine"), OSError("of mine")])
def test_form_fails(vm_factory, error):
    """What users raise is theirs, also where the cache raises the same."""

    def form(_):
        raise error

    with pytest.raises(type(error), match="of mine") as caught:
        vm_factory.prepare_cluster({"db1": "tiny"}, form, depends_on=[])
    assert caught.value is error
