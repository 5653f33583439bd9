"""Fresh guests in a row: what each costs as their number grows, and whether anything of the host does.

    python tests/benchmarks/fresh_guests.py --count 2000 --image debian-13

Each guest runs one program and is gone. The time of each is told by hundreds, the slope from the first
hundred to the last, and what this process and the host have of memory, descriptors and files.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

from pytest_vmsandbox.core.paths import cache_dir, runtime_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.machine import host

BATCH = 100
MAY_GROW = 20 * MIB  # this process, from the first hundred to the last


def main() -> int:
    """Run guests; 1 if one failed, or something grew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--image", default="debian-13")
    args = parser.parse_args()
    callbacks = Announcer(print)
    rows: list[tuple[float, int, int, int]] = []
    origins: dict[str, int] = {}
    with GuestFactory.open(Settings(), callbacks) as factory:
        factory.expect(args.image, factory.hardware(args.image, {}), args.count + 1)
        with factory.boot(args.image) as guest:
            guest.run(["true"])
        print(
            "  guests  ms each (median, mean)  our memory MiB  descriptors  files  host's memory MiB"
        )
        taken: list[float] = []
        for number in range(1, args.count + 1):
            started = time.perf_counter()
            with factory.boot(args.image) as guest:
                assert guest.run(["echo", str(number)]).stdout == f"{number}\n"
                origins[guest.engine.origin] = origins.get(guest.engine.origin, 0) + 1
            taken.append(time.perf_counter() - started)
            if number % BATCH == 0 or number == args.count:
                rows.append((statistics.median(taken), *inventory()))
                each, memory, descriptors, files = rows[-1]
                print(
                    f"{number:8} {1e3 * each:10.1f} {1e3 * statistics.mean(taken):8.1f} mean "
                    f"{memory / MIB:10.1f} {descriptors:8} {files:8} "
                    f"{(host.available_memory() or 0) / MIB:12.0f}",
                    flush=True,
                )
                taken.clear()
    print(f"origins: {origins}")
    (first, memory, descriptors, files), (last, *then) = rows[0], rows[-1]
    print(f"the last hundred took {last / first:.2f} times what the first did")
    grown = then[0] - memory > MAY_GROW or then[1] > descriptors + 20 or then[2] > files + 20
    print("something grew" if grown else "nothing grew")
    return 1 if grown else 0


def inventory() -> tuple[int, int, int]:
    """Bytes of this process, its descriptors, and the files of ours."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    files = sum(len(names) for root in (cache_dir(), runtime_dir()) for *_, names in os.walk(root))
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), files


if __name__ == "__main__":
    sys.exit(main())
