"""Looks for power cuts that break programs known to be right or wrong, on ext4, xfs, btrfs and the root disk.

Run it by hand: ``python tests/systems/crash.py [CASE…]``, where a case is such as ``ext4/rename``. Where a
case needs packages of Debian's archive, it prepares debian-13 with them, which takes minutes on a slow host.
It prints a line of a table for each case: how many states were tried, how many broke, and how many a minute.
It ends with 1 if a program that is right was accused, or one that is wrong was not found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox import CrashPointError, CrashPoints, CrashReport, Guest, GuestFactory
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.provision import PreparedImage
from pytest_vmsandbox.guests.running.plugging import AttachedDisk

FOLDER = "/mnt/data"
UPDATES = 6
MAKE = {
    "ext4": ("64MiB", ["mkfs.ext4", "-q"]),
    "xfs": ("320MiB", ["mkfs.xfs", "-q"]),
    "btrfs": ("128MiB", ["mkfs.btrfs", "-q"]),
}
PACKAGES = {"ext4": (), "xfs": ("xfsprogs",), "btrfs": ("btrfs-progs",)}
ROOT = "root"  # in place of a file system: the disk that the guest runs from
STATES, DATABASE_STATES, BOOTS = 600, 100, 8

# Programs that keep a text. Each reads a text, keeps it, and prints a line.
WRITER = """
import os, sys
os.chdir("{folder}")
def keep(text, name, mode="wb"):
    file = open(name, mode)
    file.write(text)
    file.flush()
    return file
def sync(name):
    number = os.open(name, os.O_RDONLY)
    os.fsync(number)
    os.close(number)
for line in sys.stdin:
    text = (line.strip() * 20000).encode()
    {keep}
    print("kept", flush=True)
"""
KEEP = {
    "in place": 'keep(text, "file", "r+b"); sync("file")',
    "rename": 'keep(text, "new"); os.rename("new", "file")',
    "right": 'keep(text, "new"); sync("new"); os.rename("new", "file"); sync(".")',
}
# What is wrong with a program does not show everywhere: btrfs writes a changed file elsewhere, and then puts it in
# place at once. So nothing tears until a file is told to be without that.
NO_COPIES = f"touch {FOLDER}/file; chattr +C {FOLDER}/file; "
SQLITE = """
import sqlite3, sys
db = sqlite3.connect("{folder}/data.db", isolation_level=None)
db.execute("pragma journal_mode={journal}")
db.execute("pragma synchronous={synchronous}")
db.execute("create table if not exists t (text)")
if len(sys.argv) > 1: sys.exit()
for line in sys.stdin:
    db.execute("insert into t values (?)", (line.strip() * 3000,))
    print("kept", flush=True)
"""


def check_file(folder: Path, acknowledged: list[str]) -> None:
    file = folder / "file"
    text = (file if file.exists() else folder / "mnt/data/file").read_text()  # in a booted guest
    assert len(text) == 20000, "the length is wrong"
    assert len(set(text)) == 1, "torn"
    assert text[0] >= max(acknowledged, default="A"), "an acknowledged text is lost"


def check_sqlite(folder: Path, acknowledged: list[str]) -> None:
    import sqlite3

    db = sqlite3.connect(str(folder / "data.db"))
    assert db.execute("pragma integrity_check").fetchone() == ("ok",), "damaged"
    texts = [row[0] for row in db.execute("select text from t")]
    db.close()
    assert {text[0] for text in texts} >= set(acknowledged), "an acknowledged text is lost"


def check_postgresql(folder: Path, acknowledged: list[str]) -> None:
    import glob
    import subprocess

    bin_folder = glob.glob("/usr/lib/postgresql/*/bin")[-1]

    def run(*words: str) -> str:
        argv = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *words]
        return subprocess.run(argv, stdout=subprocess.PIPE, cwd="/", check=True).stdout.decode()

    data = str(folder / "db")
    options = "-c listen_addresses='' -k /tmp"
    run(f"{bin_folder}/pg_ctl", "-D", data, "-o", options, "-s", "-w", "-l", "/tmp/log", "start")
    try:
        found = run("psql", "-h", "/tmp", "-qAt", "postgres", "-c", "select text from t").split()
        assert set(found) >= set(acknowledged), "an acknowledged row is lost"
    finally:
        run(f"{bin_folder}/pg_ctl", "-D", data, "-s", "-m", "immediate", "stop")


@dataclass(frozen=True)
class Case:
    """A program on a file system.

    Attributes:
        start: makes ready what it needs in a guest, and returns what keeps a text.
        check: the check of its states.
        is_right: whether no power cut breaks it.
        packages: that it needs, beside those of its file system.
    """

    kind: str
    start: Callable[[Guest], Callable[[str], None]]
    check: Callable[[Path, list[str]], object]
    is_right: bool
    states: int = STATES
    size: str = ""
    packages: tuple[str, ...] = ()


def file_case(kind: str, name: str, *, before: str = "", is_right: bool = False) -> Case:
    def start(vm: Guest) -> Callable[[str], None]:
        vm.shell(f"{before}head -c 20000 /dev/zero | tr '\\0' A >{FOLDER}/file; sync")
        return fed(vm, WRITER.format(folder=FOLDER, keep=KEEP[name]))

    states = BOOTS if kind == ROOT else STATES
    return Case(kind, start, check_file, is_right=is_right or name == "right", states=states)


def sqlite_case(kind: str, journal: str, synchronous: str, *, is_right: bool) -> Case:
    script = SQLITE.format(folder=FOLDER, journal=journal, synchronous=synchronous)

    def start(vm: Guest) -> Callable[[str], None]:
        vm.run(["python3", "-c", script, "create"])
        return fed(vm, script)

    return Case(kind, start, check_sqlite, is_right=is_right)


def postgresql_case(fsync: str) -> Case:
    def start(vm: Guest) -> Callable[[str], None]:
        as_postgres = "setpriv --reuid=postgres --regid=postgres --clear-groups"
        vm.shell(
            f"mkdir {FOLDER}/db; chown postgres {FOLDER}/db; cd /usr/lib/postgresql/*/bin; "
            f"{as_postgres} ./initdb -D {FOLDER}/db >/dev/null; "
            f"{as_postgres} ./pg_ctl -D {FOLDER}/db -w -l /tmp/log "
            f"-o \"-c fsync={fsync} -c listen_addresses='' -k /tmp\" start >/dev/null; "
            f"{as_postgres} psql -h /tmp postgres -qc 'create table t (text text)'; sync",
            timeout=600,
        )

        def keep(text: str) -> None:
            words = [
                "psql",
                "-h",
                "/tmp",
                "-q",
                "postgres",
                "-c",
                f"insert into t values ('{text}')",
            ]
            vm.run(["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *words])

        return keep

    return Case(
        "ext4", start, check_postgresql, fsync == "on", DATABASE_STATES, "512MiB", ("postgresql",)
    )


def fed(vm: Guest, script: str) -> Callable[[str], None]:
    """What gives a running Python program a text, and waits until the program has kept it."""
    program = vm.popen(["python3", "-c", script])

    def keep(text: str) -> None:
        program.stdin.write(f"{text}\n")
        program.stdin.flush()
        assert program.stdout.readline() == "kept\n"

    return keep


CASES = {
    **{f"{kind}/{name}": file_case(kind, name) for kind in MAKE for name in KEEP},
    **{
        f"{ROOT}/{name}": file_case(ROOT, name) for name in ("rename", "right")
    },  # few boots tear nothing
    "btrfs/in place": file_case("btrfs", "in place", is_right=True),
    "btrfs/in place, no copies": file_case("btrfs", "in place", before=NO_COPIES),
    **{
        f"ext4/sqlite-{journal}-{synchronous}": sqlite_case(
            "ext4", journal, synchronous, is_right=is_right
        )
        for journal, synchronous, is_right in (
            ("DELETE", "OFF", False),
            ("DELETE", "NORMAL", False),
            ("DELETE", "FULL", False),  # its manual says so
            ("DELETE", "EXTRA", True),
            ("WAL", "OFF", False),
            ("WAL", "NORMAL", False),
            ("WAL", "FULL", True),
            ("WAL", "EXTRA", True),
        )
    },
    "ext4/postgresql-off": postgresql_case("off"),
    "ext4/postgresql-on": postgresql_case("on"),
}


def image_of(factory: GuestFactory, case: Case) -> str | PreparedImage:
    """debian-13 with the programs that a case needs."""
    packages = [*PACKAGES.get(case.kind, ()), *case.packages]
    if not packages:
        return "debian-13"

    def installed(vm: Guest) -> None:
        vm.shell(
            "apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install "
            f"--no-install-recommends {' '.join(packages)}; "
            "systemctl disable --now postgresql; sync",
            timeout=3600,
        )

    return factory.prepare("debian-13", installed, depends_on=packages, network="nat")


@contextmanager
def recorded(vm: Guest, case: Case) -> Iterator[CrashPoints]:
    disk: AttachedDisk | str = ROOT
    vm.shell(f"mkdir -p {FOLDER}")
    if case.kind != ROOT:  # attached, because other hardware would need another preparation
        size, make = MAKE[case.kind]
        disk = vm.attach_disk(size=case.size or size)
        vm.run([*make, disk.device])
        vm.shell(f"modprobe {case.kind}; mount {disk.device} {FOLDER}")
    keep = case.start(vm)
    with vm.crash_points(disk) as cuts:
        for number in range(UPDATES):
            text = "BCDEFGHI"[number]
            keep(text)
            cuts.acknowledge(text)
    yield cuts


def searched(cuts: CrashPoints, case: Case, states: int) -> CrashReport:
    try:
        boot = case.kind == ROOT
        return cuts.check(case.check, states=min(states, case.states), boot=boot)
    except CrashPointError as error:
        if error.report is None:
            raise
        return error.report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--states", type=int, default=STATES)
    options = parser.parse_args()
    wrong = 0
    settings = Settings(clones="demand")
    with GuestFactory.open(settings, Announcer(lambda text: print(f"  {text}"))) as factory:
        for name in options.cases or CASES:
            case = CASES[name]
            image = image_of(factory, case)
            with factory.boot(image) as vm, recorded(vm, case) as cuts:
                report = searched(cuts, case, options.states)
            is_as_known = case.is_right == (report.broken == 0)
            wrong += not is_as_known
            kinds = "; ".join(f"{it.count} {it.kind}" for it in report.failures)
            rate = report.states * 60 / report.seconds
            print(
                f"| {name} | {report.requests} | {report.states} | {report.broken} | {rate:.0f} | "
                f"{'as known' if is_as_known else 'NOT AS KNOWN'} | {kinds} |",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
