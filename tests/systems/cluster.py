"""Shows etcd on three guests: formed once, sealed as one, and each test in a clone of the whole.

Run it by hand: ``python tests/systems/cluster.py [--tests N] [KIND…]``. It prepares debian-13 with etcd from
Debian's archive, which takes minutes on a slow host. The first test waits for 60 s and has no fault. The others
take the kinds of tests in turn. With KIND, there are only tests of these kinds.

Each test prints a line of a table: how long the clone took, how far the clocks of its members were apart, the
smallest of 20 round trips, etcd's term before and after, and what failed. It ends with 1 if any failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pytest_vmsandbox import Cluster, Guest, GuestFactory, VMSandboxError
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer

MEMBERS = ("etcd1", "etcd2", "etcd3")
PACKAGES = ("etcd-server", "etcd-client")
# Milliseconds. etcd's own are 100 and 1000, for real machines.
HEARTBEAT, ELECTION = 1000, 10000
AGREE_SECONDS = 180  # the longest that members may take until they agree
QUIET_SECONDS = 60
CLOCKS_SECONDS = 0.05
ROUND_TRIPS = 20

SETTINGS = """\
ETCD_NAME={name}
ETCD_DATA_DIR=/var/lib/etcd/cluster
ETCD_LISTEN_PEER_URLS=http://0.0.0.0:2380
ETCD_LISTEN_CLIENT_URLS=http://0.0.0.0:2379
ETCD_ADVERTISE_CLIENT_URLS=http://{name}:2379
ETCD_INITIAL_ADVERTISE_PEER_URLS=http://{name}:2380
ETCD_INITIAL_CLUSTER={members}
ETCD_INITIAL_CLUSTER_STATE=new
ETCD_HEARTBEAT_INTERVAL={heartbeat}
ETCD_ELECTION_TIMEOUT={election}
GOMAXPROCS=1
"""
# Tells the time to who asks, and asks others.
CLOCK_SERVER = """
import socket, time
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("", 9000))
while True:
    asked, who = server.recvfrom(100)
    server.sendto(asked + b" " + repr(time.time()).encode(), who)
"""
CLOCK_CLIENT = """
import json, socket, sys, time
found = {{}}
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(10)
for name in sys.argv[1:]:
    trips = []
    for number in range({trips} + 3):  # the first ones find the way
        before = time.time()
        client.sendto(str(number).encode(), (name, 9000))
        asked = None
        while asked != str(number):
            asked, told = client.recv(100).decode().split()
        after = time.time()
        trips.append((after - before, float(told) - (before + after) / 2))
    found[name] = min(trips[3:])
print(json.dumps(found))
"""


def install(vm: Guest) -> None:
    """etcd, not yet a member of anything."""
    vm.shell(
        "apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install "
        f"--no-install-recommends {' '.join(PACKAGES)} && systemctl disable --now etcd && "
        "rm -rf /var/lib/etcd/* && sync",
        timeout=3600,
    )


def form(cluster: Cluster) -> None:
    """Three members that agree, and a program in each that tells its time."""
    members = ",".join(f"{name}=http://{name}:2380" for name in cluster)
    for name, guest in cluster.items():
        settings = SETTINGS.format(
            name=name, members=members, heartbeat=HEARTBEAT, election=ELECTION
        )
        guest.write_text("/etc/default/etcd", settings)
        guest.write_text("/usr/local/bin/clock-server", CLOCK_SERVER)
        guest.run(["systemd-run", "--unit=clock-server", "python3", "/usr/local/bin/clock-server"])
        guest.run(["systemctl", "enable", "etcd"], timeout=300)
        guest.run(["systemctl", "start", "--no-block", "etcd"])
    for guest in cluster.values():
        guest.wait_until(["etcdctl", "endpoint", "health"], timeout=600)


@dataclass(frozen=True)
class Member:
    """A member of the cluster, as tests use it."""

    name: str
    guest: Guest

    def etcdctl(self, *words: str, seconds: int = AGREE_SECONDS, check: bool = True) -> str | None:
        """What it says; None if it fails."""
        limits = [f"--command-timeout={seconds}s", f"--dial-timeout={seconds}s"]
        result = self.guest.run(
            ["etcdctl", *limits, *words], check=check, timeout=seconds + AGREE_SECONDS
        )
        return result.stdout if result.returncode == 0 else None

    def put(self, key: str, text: str) -> None:
        self.etcdctl("put", key, text)

    def refuses(self, key: str) -> bool:
        """Whether it cannot write. Another key: etcd may carry out later what it could not confirm in time."""
        return self.etcdctl("put", f"{key}/refused", "", seconds=15, check=False) is None

    def get(self, key: str) -> str | None:
        """What the majority knows."""
        said = self.etcdctl("get", key, "--print-value-only")
        return said.strip() or None if said is not None else None

    def keys(self) -> list[str]:
        said = self.etcdctl("get", "/tests/", "--prefix", "--keys-only")
        assert said is not None
        return said.split()

    def has(self, key: str, text: str) -> None:
        """Wait until this member itself knows it, without asking the others."""
        script = f'test "$(etcdctl get --consistency=s --print-value-only {key})" = "{text}"'
        self.guest.wait_until(["sh", "-c", script], timeout=AGREE_SECONDS)

    def status(self) -> dict[str, Any]:
        said = self.etcdctl("endpoint", "status", "-w", "json")
        assert said is not None
        status: dict[str, Any] = json.loads(said)[0]["Status"]
        return status

    def term(self) -> int:
        return int(self.status()["raftTerm"])

    def leads(self) -> bool:
        status = self.status()
        # While nobody leads, etcd leaves it out.
        return int(status.get("leader", 0)) == int(status["header"]["member_id"])


@dataclass
class Run:
    """A test in its clone.

    Attributes:
        key: that only this test writes.
        leader: when the test began.
        followers: the others, then.
    """

    number: int
    cluster: Cluster
    key: str
    leader: Member
    followers: list[Member]

    @classmethod
    def of(cls, number: int, cluster: Cluster) -> Run:
        members = [Member(name, guest) for name, guest in cluster.items()]
        (leader,) = (it for it in members if it.leads())
        followers = [it for it in members if it is not leader]
        return cls(number, cluster, f"/tests/{number}", leader, followers)

    def begin(self) -> None:
        """There is no key of another test, in any member."""
        for member in (self.leader, *self.followers):
            assert member.keys() == [], f"{member.name} has keys of another test"
        self.leader.put(self.key, "begun")

    def agree(self, text: str) -> None:
        """All members know what was written last, and no key of another test."""
        for member in (self.leader, *self.followers):
            member.has(self.key, text)
            others = {*member.keys()} - {self.key, f"{self.key}/refused"}
            assert not others, f"{member.name} has keys of another test"

    def new_leader(self) -> Member:
        """Who leads the two that are left."""
        deadline = time.monotonic() + AGREE_SECONDS
        while time.monotonic() < deadline:
            for member in self.followers:
                if member.leads():
                    return member
        raise AssertionError("no new leader")

    def written_by(self, members: list[Member], text: str) -> None:
        for member in members:
            member.put(self.key, f"{text} by {member.name}")
            assert member.get(self.key) == f"{text} by {member.name}"
        members[-1].put(self.key, text)


def control(run: Run) -> None:
    """No fault: no term changes."""
    before = run.leader.term()
    run.written_by(run.followers, "written")
    run.agree("written")
    assert run.leader.term() == before, "the term changed without a fault"
    assert run.leader.leads()


def quiet(run: Run) -> None:
    """No fault, for a minute."""
    before = run.leader.term()
    time.sleep(QUIET_SECONDS)
    assert run.leader.term() == before, "the term changed without a fault"
    control(run)


def partition(run: Run) -> None:
    """The majority goes on. Who is alone refuses to write, and catches up afterwards."""
    alone, other = run.followers
    with run.cluster.network.partition(alone.guest, [run.leader.guest, other.guest]):
        assert alone.refuses(run.key), "a member without a majority has written"
        run.written_by([run.leader, other], "parted")
    run.agree("parted")


def lost_leader(run: Run) -> None:
    """The leader's cable is out: another leads, and the old one follows when it is back."""
    before = run.leader.term()
    with run.cluster.network.unplug(run.leader.guest):
        leader = run.new_leader()
        assert leader.term() > before
        assert run.leader.refuses(run.key), "the lost leader has written"
        run.written_by(run.followers, "without the first")
    run.agree("without the first")


def power_cut(run: Run) -> None:
    """The leader's power goes: another leads. The old one has all when it is on again."""
    before = run.leader.term()
    run.leader.guest.power_cut()
    leader = run.new_leader()
    assert leader.term() > before
    run.written_by(run.followers, "after the power cut")
    run.leader.guest.power_on()
    run.leader.guest.wait_until(["etcdctl", "endpoint", "health"], timeout=600)
    run.agree("after the power cut")


def slow_disk(run: Run) -> None:
    """The leader's disk is slow: all goes on."""
    with run.leader.guest.faults.disk("root", rate="256KiB"):
        script = "import time; print(time.monotonic())"
        words = ["dd", "if=/dev/zero", "of=/var/tmp/slow", "bs=64k", "count=24", "oflag=direct"]
        began = float(run.leader.guest.run(["python3", "-c", script]).stdout)
        dd = run.leader.guest.popen([*words, "status=none"])
        run.written_by(run.followers, "slow")
        assert dd.wait(timeout=AGREE_SECONDS) == 0
        taken = float(run.leader.guest.run(["python3", "-c", script]).stdout) - began
        assert taken > 4, f"1.5 MiB in {taken:.1f} s: the disk is not slow"
    run.agree("slow")


def clock_jump(run: Run) -> None:
    """The leader's clock is an hour ahead, then a follower's an hour behind. Nobody cares."""
    before = run.leader.term()
    for member, offset in ((run.leader, 3600), (run.followers[0], -3600)):
        with member.guest.faults.clock(offset):
            run.written_by([run.leader, *run.followers], f"at {offset}")
    run.agree("at -3600")
    assert run.leader.term() == before, "the term changed because of a clock"


def bad_link(run: Run) -> None:
    """A follower's link loses 30 % and is late: the others go on, and it keeps up in the end."""
    bad, other = run.followers
    with run.cluster.network.link(bad.guest, loss=0.3, latency=0.05, jitter=0.01):
        run.written_by([run.leader, other], "over a bad link")
        bad.has(run.key, "over a bad link")
    run.agree("over a bad link")


KINDS: dict[str, Callable[[Run], None]] = {
    "partition": partition,
    "lost leader": lost_leader,
    "power cut": power_cut,
    "slow disk": slow_disk,
    "clock jump": clock_jump,
    "bad link": bad_link,
    "control": control,
}


def clocks(cluster: Cluster) -> tuple[float, float]:
    """How far the clocks of two members are apart at most, and the smallest round trip, in seconds."""
    apart, shortest = [], []
    script = CLOCK_CLIENT.format(trips=ROUND_TRIPS)
    for (name, guest), number in zip(cluster.items(), itertools.count(1)):
        others = [*cluster][number:]
        if others:
            found = json.loads(guest.run(["python3", "-c", script, *others]).stdout)
            for other, (trip, offset) in found.items():
                limit = CLOCKS_SECONDS + trip / 2
                text = f"{name} and {other} are {offset * 1000:.1f} ms apart, trip {trip * 1000:.1f} ms"
                assert abs(offset) <= limit, text
                apart.append(abs(offset))
                shortest.append(trip)
    return max(apart), min(shortest)


def tried(number: int, name: str, test: Callable[[Run], None], opened: Any) -> bool:
    """Run a test in its clone, and print its line."""
    began = time.monotonic()
    row: dict[str, str] = {}
    try:
        with opened as cluster:
            row["clone"] = f"{time.monotonic() - began:.1f} s"
            offset, trip = clocks(cluster)
            row["clocks"] = f"{offset * 1000:.1f} ms"
            row["trip"] = f"{trip * 1000:.1f} ms"
            run = Run.of(number, cluster)
            row["before"] = str(run.leader.term())
            run.begin()
            test(run)
            row["after"] = str(run.followers[0].term())
        row["result"] = "passed"
    except (AssertionError, VMSandboxError) as error:
        traceback.print_exc()
        row["result"] = f"FAILED: {type(error).__name__} {str(error).splitlines()[:1]}"
    columns = ("clone", "clocks", "trip", "before", "after", "result")
    cells = " | ".join(row.get(column, "") for column in columns)
    print(f"| {number} | {name} | {cells} | {time.monotonic() - began:.0f} s |", flush=True)
    return row["result"] == "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--tests", type=int, default=50)
    options = parser.parse_args()
    chosen = [(name, KINDS[name]) for name in options.kinds or KINDS]
    first = [] if options.kinds else [("quiet", quiet)]
    plan = itertools.islice(itertools.chain(first, itertools.cycle(chosen)), options.tests)
    failed = 0
    settings = Settings(clones="demand")
    with GuestFactory.open(settings, Announcer(lambda text: print(f"  {text}"))) as factory:
        image = factory.prepare("debian-13", install, depends_on=[*PACKAGES], network="nat")
        began = time.monotonic()
        depends_on = [SETTINGS, CLOCK_SERVER, str(HEARTBEAT), str(ELECTION)]
        sealed = factory.prepare_cluster(dict.fromkeys(MEMBERS, image), form, depends_on=depends_on)
        print(f"  formed, or found in the cache, in {time.monotonic() - began:.0f} s")
        print(
            "| test | kind | clone | clocks apart | round trip | term before | after | result | all |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for number, (name, test) in enumerate(plan, 1):
            failed += not tried(number, name, test, factory.cluster(sealed))
    print(f"{options.tests - failed} of {options.tests} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
