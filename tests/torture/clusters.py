"""Kill pytest while tests have networks and clusters: nothing may be left, the switch neither.

    python tests/torture/clusters.py --seed 1 --kills 200 --jobs 2

Each round runs one test of `tiny`. Its guests join a network, talk to each other over a bad link, are captured, have
a power cut, are a cluster that is sealed and cloned, or are forked. When that has begun, pytest is killed with SIGKILL,
SIGTERM or SIGINT, at a random moment of the next seconds. Then no process that came from it may be alive. After the
next start there may be no file of it. The same seed kills at the same moments.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torture.world import Acting

ACTIONS = {  # what a test does again and again
    "joins": "begun()\nwith members() as (lan, a, b): ping(lan, a, b)",
    "link": (
        "with members() as (lan, a, b):\n"
        "    with lan.link(b, latency=0.05, loss=0.2, rate='1Mbit'): begun(); ping(lan, a, b)"
    ),
    "partition": (
        "with members() as (lan, a, b):\n    with lan.partition(a, b): begun(); ping(lan, a, b)"
    ),
    "capture": (
        "with members() as (lan, a, b):\n    with lan.capture('base/lan.pcap'): begun(); ping(lan, a, b)"
    ),
    "cluster": (
        "begun()\n"
        "with vm_factory.cluster(MACHINES) as cluster: ping(cluster.network, cluster['a'], cluster['b'])"
    ),
    "sealed": (
        "with vm_factory.cluster(MACHINES) as cluster:\n    begun()\n    sealed = cluster.seal()\n"
        "with vm_factory.cluster(sealed) as clone: ping(clone.network, clone['a'], clone['b'])"
    ),
    "fork": (
        "with vm_factory.boot('tiny', **HARDWARE) as vm:\n    begun()\n"
        "    with vm.fork(2) as (a, b): a.run(['true'])"
    ),
    "power": "with members() as (lan, a, b):\n    begun()\n    with b.faults.power_cut(): pass",
}
SUITE = """
import time
from contextlib import contextmanager
from pathlib import Path

HARDWARE = {{"memory": "{memory}"}}
MACHINES = dict.fromkeys("ab", {{"image": "tiny", **HARDWARE}})


def test_clusters(vm_factory):
    Path("base").mkdir(exist_ok=True)

    def begun():
        Path("begun").touch()
        time.sleep(0.1)

    @contextmanager
    def members():
        with vm_factory.network("lan") as lan:
            with vm_factory.boot("tiny", networks=[lan], **HARDWARE) as a:
                with vm_factory.boot("tiny", networks=[lan], **HARDWARE) as b:
                    yield lan, a, b

    def ping(lan, a, b):
        a.run(["ping", "-c", "3", "-W", "1", str(lan.address(b))], check=False)

    while True:
{body}
"""


class Clusters(Acting):
    """The action is what guests do with each other."""

    tests = SUITE
    actions = ACTIONS


if __name__ == "__main__":
    sys.exit(Clusters.main(__doc__))
