"""Run the same tests on every system, one image at a time, and print one table.

    python tests/systems/run.py [IMAGE]... [--list] [--again] [--work DIR] [--minutes N]

For each image of `SYSTEMS`, or those that are named:

- `vmsandbox images build` makes it;
- `vmsandbox bench` measures a cold boot and a clone on demand;
- `suite` drives its guests from outside: programs, files, power, disks, clones;
- a suite with every kind of outcome runs in a guest twice, once by us and once by plain pytest there, and what
  both say is compared. This needs Python 3.9 in the guest.
  Where the guest's Python has no pytest as new as the one here (3.9 has 8.4), its screen looks different: run
  this program with the same pytest there.

The folder --work holds a log of each image and `results.json`. A step that has passed is not done again unless
--again says so, so a run that was ended goes on where it was. Exit status 0 if all have passed.
Plan five minutes for each image of this machine's architecture, and half an hour for each other one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.core.paths import cache_dir
from support import fidelity, oracle
from support.environment import without_ours

SYSTEMS = (
    *("tiny", "debian-11", "debian-12", "debian-13", "debian-testing", "debian-sid"),
    *("debian-12-backports", "debian-13-backports", "debian-13-sysvinit", "debian-12_i386"),
    *("debian-13_arm64", "debian-13_armhf", "debian-13_riscv64", "debian-13_ppc64el"),
    *("debian-13_s390x", "tiny_arm64", "tiny_s390x"),
)
SUITE = Path(__file__).resolve().with_name("suite")
MACHINES = {"armv7l": "armv7l,armv8l"}  # our name of an architecture → what `uname -m` says
BENCH = ("bench", "--json", "--count=3", "--only=cold_boot_s", "--only=clone_on_demand_ms")
MOST_DIFFERENCES = 40  # lines in the log


class Failed(Exception):
    """A step did not do what it should."""


class System:
    """One image, and what is known about it.

    Args:
        image: its name.
        work: the folder for logs.
        done: what earlier runs have found; it is changed.
    """

    def __init__(self, image: str, work: Path, done: dict[str, Any]) -> None:
        self.image = image
        self.definition = Catalogue().get(image)
        self.log = work / f"{image}.log"
        self.done = done

    def build(self) -> None:
        """Make the image."""
        began = time.monotonic()
        self._ours("images", "build", self.image)
        self.done["build_s"] = round(time.monotonic() - began, 1)

    def measure(self) -> None:
        """Measure a cold boot and a clone."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
            self._run([*_OURS, *BENCH, self.image], stdout=out, status={0, 1})
            out.seek(0)
            figures = json.load(out)
        self.done["boot_s"] = figures["cold_boot_s"]
        self.done["clone_ms"] = figures["clone_on_demand_ms"]
        self.done["accelerator"] = figures["accelerator"]
        self.done["reasons"] = figures["reasons"]
        if self.done["boot_s"] is None:
            raise Failed(figures["reasons"]["cold_boot_s"])

    def outside(self) -> None:
        """Drive guests from outside."""
        machine = self.definition.architecture
        with tempfile.TemporaryDirectory() as folder:
            junit = Path(folder, "junit.xml")
            self._run(
                [
                    *(sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-rA"),
                    *(f"--vm={self.image}", f"--junitxml={junit}", f"--rootdir={SUITE}"),
                    *("-o", f"vm_artifacts_dir={self.log.parent / 'artifacts'}", SUITE),
                ],
                environment={"SYSTEM_MACHINE": MACHINES.get(machine, machine)},
            )
            root = ET.parse(junit).getroot()
        origins = _recorded(root, "origin")
        self.done["tests"] = len([*root.iter("testcase")])
        self.done["skipped"] = len([*root.iter("skipped")])
        self.done["origins"] = dict(Counter(origins))
        if len(set(_recorded(root, "random"))) != 2:
            raise Failed("two guests have the same random numbers")

    def inside(self) -> None:
        """Compare what tests inside a guest are said to have done with plain pytest there."""
        if not self.definition.in_vm:
            self.done["inside"] = "host-driven"
            return
        # pytest cuts messages by their length: a path here is as long as /opt/vmsandbox/src there.
        with tempfile.TemporaryDirectory(prefix="vmsb-", dir="/tmp") as folder:
            try:
                ours, theirs = oracle.compare(self.image, Path(folder), seconds=7200)
            except Exception as error:
                screen = Path(folder, "inside.txt")
                self._say(screen.read_text(encoding="utf-8") if screen.exists() else "")
                raise Failed(f"{type(error).__name__}: {error}") from error
        different = fidelity.differences(ours, theirs)
        self._say("\n".join(different[:MOST_DIFFERENCES]))
        if different:
            raise Failed(f"{len(different)} lines differ from plain pytest's")
        self.done["inside"] = f"{len(ours.cases)} cases as plain pytest"

    def _ours(self, *arguments: str) -> None:
        self._run([*_OURS, *arguments])

    def _run(
        self,
        argv: list[object],
        *,
        stdout: Any = None,
        status: set[int] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Run a program, with its output in the log.

        Raises:
            Failed: its exit status is none of `status`.
        """
        command = list(map(str, argv))
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout or log,
                stderr=log,
                env={**without_ours(), **(environment or {})},
                check=False,
            )
        if done.returncode not in (status or {0}):
            raise Failed(f"{' '.join(command[3:5])} ended with {done.returncode}: see {self.log}")

    def _say(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{text}\n")


_OURS = (sys.executable, "-m", "pytest_vmsandbox")
STEPS = {"build": System.build, "measure": System.measure, "outside": System.outside, "inside": System.inside}  # fmt: skip


def _recorded(root: ET.Element, name: str) -> list[str]:
    return [it.get("value") or "" for it in root.iter("property") if it.get("name") == name]


def main() -> int:
    """Try the systems, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"default: {' '.join(SYSTEMS)}")
    parser.add_argument("--list", action="store_true", help="only print the table so far")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--work", type=Path, default=cache_dir() / "systems", metavar="DIR")
    parser.add_argument(
        "--minutes", type=float, default=600.0, help="begin no image after that time"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "results.json"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    images = args.images or SYSTEMS
    end = time.monotonic() + args.minutes * 60
    for image in () if args.list else images:
        if time.monotonic() > end:
            break
        done = results.setdefault(image, {})
        if args.again:
            done.clear()
        attempt(System(image, args.work, done), lambda: write(kept, results))
    print_table({image: results.get(image, {}) for image in images})
    return 0 if all(has_passed(results.get(image, {})) for image in images) else 1


def write(kept: Path, results: dict[str, Any]) -> None:
    """Keep what is known so far."""
    new = kept.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1), encoding="utf-8")
    os.replace(new, kept)


def attempt(system: System, keep: Any) -> None:
    """Do the steps of a system that have not passed. The build is asked for in any case: it may be stale."""
    passed = system.done.setdefault("passed", [])
    system.done.pop("error", None)
    for name, step in STEPS.items():
        if name in passed:
            continue
        print(f"{system.image}: {name} …", flush=True)
        try:
            step(system)
            passed.append(name)
        except Failed as error:
            system.done["error"] = f"{name}: {error}"
            print(f"  {error}", flush=True)
            if name in ("build", "measure"):
                break
        finally:
            keep()


def has_passed(done: dict[str, Any]) -> bool:
    """Whether all steps of an image have passed."""
    return set(done.get("passed", ())) == set(STEPS)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Print what is known about each image."""
    columns = (
        "image",
        "build s",
        "boot s",
        "clone ms",
        "boot/clone",
        "tests outside",
        "tests inside",
    )
    print(f"| {' | '.join(columns)} | sealed, or why not |")
    print(f"|{' --- |' * (len(columns) + 1)}")
    for image, done in results.items():
        boot, clone = done.get("boot_s"), done.get("clone_ms")
        ratio = f"{boot * 1000 / clone:.0f}" if boot and clone else ""
        tests = f"{done['tests'] - done['skipped']} of {done['tests']}" if "tests" in done else ""
        why = "yes" if clone else done.get("reasons", {}).get("clone_on_demand_ms", "")
        values = (image, done.get("build_s", ""), _short(boot), _short(clone), ratio, tests)
        print(
            f"| {' | '.join(map(str, values))} | {done.get('inside', '')} | {done.get('error') or why} |"
        )


def _short(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.3g}"


if __name__ == "__main__":
    sys.exit(main())
