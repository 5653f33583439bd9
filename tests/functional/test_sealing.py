"""Several guests that are sealed at one moment, and go on together."""

from contextlib import ExitStack

import pytest

from pytest_vmsandbox import Guest
from pytest_vmsandbox.guests.cloning.sealing import clones_of, go_on, sealed_all

SECONDS = 60
SERVER = "while :; do nc -l -p 7 -e cat; done"
LISTENS = ["sh", "-c", "netstat -ltn | grep -q ':7 '"]
CLIENT = "while sleep 0.1; do n=$((n + 1)); echo $n; done | nc $0 7 >/root/heard"

pytestmark = pytest.mark.origins("cloned")


def clocks(guests):
    """How far apart the clocks of guests are, at least, in seconds: asking may take long on a busy machine."""
    spans = [guest.engine.running.helper.read_lead() for guest in guests]
    return max(least for least, _ in spans) - min(most for _, most in spans)


@pytest.mark.parametrize("arm", [False, True], ids=["on-demand", "armed"])
def test_connections_between_members_are_alive(vm_factory, arm):
    backend, memory = vm_factory.backend, "160MiB"
    lan = vm_factory.network("lan")
    other = vm_factory.network("other", ipv4=str(lan.ipv4), ipv6=str(lan.ipv6))
    with (
        vm_factory.boot("tiny", memory=memory, networks=[lan]) as server,
        vm_factory.boot("tiny", memory=memory, networks=[lan]) as client,
        ExitStack() as stack,
    ):
        server.popen(["sh", "-c", SERVER])
        server.wait_until(LISTENS, timeout=SECONDS)  # else the client is refused, and ends
        client.popen(["sh", "-c", CLIENT, str(lan.address(server))])
        client.wait_until(["grep", "-qx", "3", "/root/heard"], timeout=SECONDS)
        members = sealed_all(backend, [server.engine, client.engine], stack)
        cards = [[other.seat(it.hostname, card=card) for card in it.cards] for it in members]
        clones = clones_of(backend, list(zip(members, cards, strict=True)), stack, arm=arm)
        if arm:
            go_on(clones)
        guests = [Guest(stack.enter_context(backend.engine(it.machines))) for it in clones]
        assert clocks(guests) < 0.1  # each is right to 0.05 s
        for guest in (client, guests[1]):
            heard = guest.read_text("/root/heard").split()
            more = f"until [ $(wc -l </root/heard) -gt {len(heard) + 5} ]; do sleep 0.1; done"
            guest.shell(more, timeout=SECONDS)
            heard = guest.read_text("/root/heard").split()
            assert heard == [str(number + 1) for number in range(len(heard))]
