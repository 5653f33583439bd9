"""Several machines of `tiny`, with names and networks of their own."""

import threading

import pytest

from pytest_vmsandbox import ConfigError, LaunchError
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
