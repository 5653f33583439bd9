"""Run the own suites of real projects inside a guest, and compare with plain pytest in that guest.

    python tests/acceptance/projects.py [--project NAME]... [--work DIR] [--again]

The projects' source distributions are fetched and checked against their digests. Each is unpacked and
installed, editable, into a virtual environment of its own, with what its tests need and this checkout.
Of a suite with more than 300 tests, 300 are drawn. Then, for each project,

- `pytest --in-vm` runs these tests: the run that is judged;
- plain pytest runs them in such a guest, which got the same files in the same way: the oracle. Each test
  has to have the same outcome in both, and there have to be some;
- 60 of them, drawn too, run with `-n 2` and with `--vm-isolation=test`, and by plain pytest;
- in a copy of the tree, a test looks where the project's module comes from, and a part of the suite runs,
  first as it is and then with a line of the module broken on this machine: the guest must notice.

What was done is kept in the folder --work and not done again, so a run that was ended goes on where it was;
--again begins anew. Exit status 1 if anything differs. Tests that take many minutes where the CPU is
emulated run with --slow only. With emulation, a project takes from 10 to 30 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from pytest_vmsandbox.core.paths import cache_dir

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 3600.0  # that plain pytest has in its guest
SHOWN = 30  # differences that are told one by one
MOST, SAMPLE = 300, 60  # tests of a project, and of those the ones that run in further ways
SEED = 9
WAYS = {"workers": ("-n", "2"), "isolated": ("--vm-isolation=test",)}  # how the sample runs
Outcomes = dict[str, list[str]]  # of each test; one that fails twice has two


@dataclass(frozen=True, kw_only=True)
class Project:
    """One that is tested.

    Attributes:
        sha256: of its source distribution.
        module: what it is imported as.
        needs: what its tests need besides.
        git: whether its tree is made a git work tree.
        file, line, broken: a line of the module, and what it is replaced by.
        part: the tests that are to notice it.
        slow: tests, as `-k` takes them, that need minutes where a CPU is emulated: with --slow only.
        image: of its guests. A compiled module needs one with the Python that it was compiled for.
        racy: names of tests that measure seconds, or race with a sleep: where a CPU is emulated, their
            outcome is one thing now and another then, in plain pytest, too. It is not compared.
    """

    name: str
    version: str
    sha256: str
    module: str
    needs: tuple[str, ...] = ()
    git: bool
    file: str
    line: str
    broken: str
    part: str
    slow: str = ""
    image: str = "debian-13"
    racy: tuple[str, ...] = ()


PROJECTS = (
    Project(  # src layout; unittest's classes with a mixin
        name="cachetools",
        version="8.0.2",
        sha256="30ac523adfc118b51d2b2e7bad8a0ddb31370dfe2700c7f10ca224f36ccf81e0",
        module="cachetools",
        git=True,
        file="src/cachetools/__init__.py",
        line="while self.__currsize + 1 > maxsize:",
        broken="while False:",
        part="tests/test_lru.py",
    ),
    Project(  # processes, threads; plugins whose fixtures and ini keys are needed there, too
        name="filelock",
        version="3.18.0",
        sha256="adbc88eabb99d2fec8c9c1b229b171f18afa655400173ddc653d5d01501fb9f2",
        module="filelock",
        needs=("pytest-asyncio>=1.3", "pytest-mock>=3.15", "pytest-timeout>=2.4", "virtualenv>=20"),
        git=False,
        file="src/filelock/_api.py",
        line="if self._context.lock_counter == 0 or force:",
        broken="if False:",
        part="tests/test_filelock.py::test_nested_context_manager",
        slow="test_threaded",  # a hundred threads that poll
    ),
    Project(  # no src layout; many unittest's classes and subtests
        name="more-itertools",
        version="10.1.0",
        sha256="626c369fa0eb37bac0291bce8259b332fd59ac792fa5497b59837309cd5b114a",
        module="more_itertools",
        git=False,
        file="more_itertools/more.py",
        line="def first(iterable, default=_marker):",
        broken="def first(iterable, default=None):",
        part="tests/test_more.py::FirstTests",
    ),
    Project(  # doctests, parameters of all kinds, plugins' options; warnings are errors
        name="humanize",
        version="4.17.0",
        sha256="1d6a36c453dbfbb3f0b34601d2e0b4ce5d48d780305cd45714843f0068fde6ac",
        module="humanize",
        needs=("freezegun>=1.5", "pytest-benchmark>=5", "pytest-codspeed>=5.0.4"),
        git=True,
        file="src/humanize/lists.py",
        line='return f"{item_list[0]} and {item_list[1]}"',
        broken='return f"{item_list[0]} or {item_list[1]}"',
        part="tests/test_lists.py",
    ),
    Project(  # processes, signals, terminals; a file that is called sh_test.py
        name="sh",
        version="2.4.0",
        sha256="a250aef68509ed93419c9a1d90b0647cd5cbe26107ba94d3717ef5b6d595ffd9",
        module="sh",
        git=True,
        file="src/sh/__init__.py",
        line='exc_class = get_exc_exit_code_would_raise(code, ca["ok_code"], ca["piped"])',
        broken="exc_class = None",
        part="tests/sh_test.py::FunctionalTests::test_exit_code",
        racy=(
            "test_background",
            "test_done_callback",
            "test_done_callback_no_deadlock",
            "test_general_signal",
            "test_ok_code_ignores_bad_sig_exception",
            "test_stdin_newline_bufsize",
            "test_stdin_unbuffered_bufsize",
            "test_timeout",
            "test_timeout_overstep",
            "test_timeout_race_condition_process_exit",
        ),
    ),
    Project(  # compiled, and the same tests without what is compiled
        name="markupsafe",
        version="3.0.4",
        sha256="2e9ad7dd851bf45fab9f75cbff4cb493fee9979e8d8c7c9c3ee119022518edd6",
        module="markupsafe",
        git=False,
        file="src/markupsafe/_native.py",
        line='.replace("<", "&lt;")',
        broken='.replace("<", "<")',
        part="tests/test_escape.py",
        image="debian-12",
    ),
    Project(  # asyncio: loops, threads and contexts
        name="asgiref",
        version="3.13.0",
        sha256="034cc8cbf72d00553b4be256703ac545120b4e50af13b49dec99da899aeeecb4",
        module="asgiref",
        needs=("packaging", "pytest-asyncio>=1.3"),
        git=True,
        file="asgiref/compatibility.py",
        line="return not iscoroutinefunction(application)",
        broken="return iscoroutinefunction(application)",
        part="tests/test_compatibility.py",
        racy=("test_inner_shield_sync_middleware",),  # two threads; 1 in 3,000 fails natively
    ),
    Project(  # spawns processes with terminals of their own
        name="ptyprocess",
        version="0.7.0",
        sha256="5c5d0a3b48ceee0b48485e0c26037c0acd7d29765ca3fbb5cb3831d347423220",
        module="ptyprocess",
        git=False,
        file="ptyprocess/ptyprocess.py",
        line="pid, status = os.waitpid(self.pid, 0)",
        broken="pid, status = self.pid, 256",
        part="tests/test_wait.py",
        image="debian-12",  # one file of its tests needs unittest.makeSuite
    ),
    Project(  # a thousand tests with parameters of all kinds; replaces the standard streams
        name="click",
        version="8.5.1",
        sha256="9bbfada76703fd1d784b83eea012e3e8c6a001a876543ef104fa56aaaeb072b4",
        module="click",
        git=True,
        file="src/click/formatting.py",
        line='{heading}:\\n")',
        broken='{heading}\\n")',
        part="tests/test_formatting.py",
    ),
    Project(  # classes of tests that inherit from each other, and parameters of fixtures
        name="itsdangerous",
        version="2.2.0",
        sha256="e0050c0b7da1eea53ffaf149c0cfbb5c6e2e2b69c4bef22c81fa6eb73e5f6173",
        module="itsdangerous",
        needs=("freezegun>=1.5",),
        git=False,
        file="src/itsdangerous/encoding.py",
        line='raise BadData("Invalid base64-encoded data") from e',
        broken='return b""',
        part="tests/test_itsdangerous/test_encoding.py",
    ),
)
PUSHED = """
import os

import {module}


def test_pushed():
    assert os.environ["VMSANDBOX_GUEST"].startswith("{image}")
    assert {module}.__file__.startswith("/opt/vmsandbox/src/"), {module}.__file__
"""


def main() -> int:
    """Run all projects; 0 if nothing differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [project.name for project in PROJECTS]
    parser.add_argument(
        "--project", action="append", choices=names, help="only this one; repeatable"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", default=cache_dir() / "acceptance")
    parser.add_argument("--again", action="store_true", help="also what was done")
    parser.add_argument("--image", help="of all guests, instead of the one that suits the project")
    parser.add_argument("--memory", default="1GiB", help="of each guest (default: %(default)s)")
    parser.add_argument("--slow", action="store_true", help="with tests that take many minutes")
    parser.add_argument("--oracle", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.oracle:
        plain_pytest(*args.oracle, image=args.image, memory=args.memory)
        return 0
    work = args.work.resolve()
    rows, bad = [], 0
    for project in PROJECTS:
        if project.name in (args.project or names):
            folder = work / project.name
            if args.again and folder.exists():
                shutil.rmtree(folder)
            slow = "" if args.slow else project.slow
            tried = Trial(project, folder, slow, args.image or project.image, args.memory)
            bad += len(tried.differences())
            rows.append(tried.row())
    columns = "".join(f"{name:>10}" for name in ("inside", "plain", *WAYS))
    print(f"\n{'project':16}{'version':10}{'ids':>5}{columns}  outcomes")
    print("\n".join(rows))
    print(f"{bad} differences; the results are in {work}")
    return 1 if bad else 0


class Trial:
    """The runs of one project.

    Args:
        project: which.
        folder: holds all of it.
        slow: tests that do not run, as `-k` takes them.
        image, memory: of its guests.
    """

    def __init__(self, project: Project, folder: Path, slow: str, image: str, memory: str) -> None:
        self._project = project
        self._folder = folder
        self._slow = slow
        self._image = image
        self._memory = memory
        self._python = folder / "env" / "bin" / "python"
        self._tree = folder / project.name
        self._runs: dict[str, Any] = {}

    def differences(self) -> list[str]:
        """Run all; what is not as it has to be. It is printed, too."""
        self._once("prepared", self._prepare)
        drawn = self._once("drawn", self._draw)
        everything = self._ids("everything", drawn["everything"])
        sample = self._ids("sample", drawn["sample"])
        inside = self._run_inside("inside", self._tree, everything)
        found = self._compare("inside", inside, self._run_plain("plain", everything))
        plain = self._run_plain("plain-sample", sample)
        for way, arguments in WAYS.items():
            found += self._compare(
                way, self._run_inside(way, self._tree, sample, *arguments), plain
            )
        found += self._once("pushed", self._check_pushed)
        for text in found:
            say(f"{self._project.name}: DIFFERS: {text}")
        return found

    def row(self) -> str:
        """A line on it, for a table."""
        inside = self._runs["inside"]["outcomes"]
        numbers = Counter(kinds(inside))
        seconds = [f"{self._runs[name]['seconds']:8.0f} s" for name in ("inside", "plain", *WAYS)]
        return (
            f"{self._project.name:16}{self._project.version:10}{len(inside):5}{''.join(seconds)}"
            f"  {', '.join(f'{number} {kind}' for kind, number in sorted(numbers.items()))}"
        )

    def _once(self, name: str, work: Callable[[], Any]) -> Any:
        """What some work gives, which JSON can hold; it is kept, and not done a second time."""
        kept = self._folder / f"{name}.json"
        if not kept.exists():
            result = work()
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1))
            part.replace(kept)
        return json.loads(kept.read_text())

    def _draw(self) -> dict[str, list[str]]:
        """Which tests run, and which of them are the sample; in the order of the suite."""
        without = ("-k", f"not ({self._slow})") if self._slow else ()
        listed = subprocess.run(
            [self._python, "-m", "pytest", "--collect-only", "-q", "--color=no", *without],
            cwd=self._tree,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        found = [line for line in listed.split("\n\n")[0].splitlines() if "::" in line]
        everything = drawn(found, MOST)
        return {"everything": everything, "sample": drawn(everything, SAMPLE)}

    def _ids(self, name: str, ids: Sequence[str]) -> Path:
        """A file that names tests, as pytest takes it after an @."""
        file = self._folder / f"{name}.txt"
        file.write_text("".join(f"{it}\n" for it in ids))
        return file

    def _compare(self, name: str, here: Outcomes, there: Outcomes) -> list[str]:
        found = [f"{name}: {text}" for text in compare(here, there, self._project.racy)]
        more = [f"{name}: and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        return found[:SHOWN] + more

    def _prepare(self) -> str:
        """Fetch, unpack and install."""
        project = self._project
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True)
        asked = self._folder / "asked.txt"
        pin = f"{project.name}=={project.version}"
        asked.write_text(f"{pin} --hash=sha256:{project.sha256}\n")
        say(f"{pin}: fetching and installing")
        call(
            *(uv(), "tool", "run", "pip", "download", "-qq", "--no-deps", "--require-hashes"),
            *("--no-binary", project.name, "--dest", self._folder, "--requirement", asked),
        )
        (archive,) = self._folder.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(self._folder, filter="data")
        archive.unlink()
        (unpacked,) = (it.parent for it in self._folder.glob("*/PKG-INFO"))
        unpacked.rename(self._tree)
        call(uv(), "venv", "--quiet", "--python", sys.executable, self._folder / "env")
        self._install(self._tree, "--editable", CHECKOUT, "pytest-xdist", *project.needs)
        if project.git:
            call("git", "init", "--quiet", cwd=self._tree)
            call("git", "add", "--all", cwd=self._tree)
        return pin

    def _install(self, tree: Path, *more: str | Path) -> None:
        call(
            *(uv(), "pip", "install", "--quiet", "--python", self._python),
            *("--editable", tree, *more),
        )

    def _run_inside(self, name: str, tree: Path, tests: Path, *arguments: str) -> Outcomes:
        """What becomes of some tests in a run that is judged."""
        junit = self._folder / f"{name}.xml"
        argv: list[str | Path] = [
            *(self._python.with_name("pytest"), "--in-vm", f"--vm={self._image}"),
            *("-o", f"vm_memory={self._memory}", f"--junitxml={junit}", *arguments, f"@{tests}"),
        ]
        return self._run(name, argv, tree, junit, self._image)

    def _run_plain(self, name: str, tests: Path) -> Outcomes:
        """The oracle; it runs in the project's environment, since it mirrors that."""
        junit = self._folder / f"{name}.xml"
        argv: list[str | Path] = [
            *(self._python, Path(__file__).resolve(), "--oracle", self._tree, junit, tests),
            *("--image", self._image, "--memory", self._memory),
        ]
        return self._run(name, argv, self._tree, junit, "")

    def _run(
        self, name: str, argv: Sequence[str | Path], cwd: Path, junit: Path, image: str
    ) -> Outcomes:
        """What becomes of each test, once."""

        def run() -> dict[str, Any]:
            junit.unlink(missing_ok=True)
            started = time.monotonic()
            status = self._logged(name, argv, cwd)
            if status not in (0, 1) or not junit.exists():
                say(f"{self._project.name}: {name} ended with status {status}")
            return {"seconds": time.monotonic() - started, "outcomes": outcomes(junit, image)}

        self._runs[name] = self._once(name, run)
        return self._runs[name]["outcomes"]

    def _check_pushed(self) -> list[str]:
        """Whether it is the tree of this machine that is tested in the guest."""
        project, copy = self._project, self._folder / f"{self._project.name}-copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._tree, copy, symlinks=True)
        self._install(copy)
        pushed = Path(project.part.partition("::")[0]).parent / "test_vmsandbox_pushed.py"
        (copy / pushed).write_text(PUSHED.format(module=project.module, image=self._image))
        found = []
        tests = self._ids("pushed", [str(pushed), project.part])
        asked = self._run_inside("as-it-is", copy, tests)
        if not any("test_pushed" in it for it in asked) or set(kinds(asked)) != {"passed"}:
            found.append(f"not all passed in the copy: {asked}")
        file = copy / project.file
        text = file.read_text()
        assert text.count(project.line) == 1, project.line
        file.write_text(text.replace(project.line, project.broken))
        asked = self._run_inside("broken", copy, tests)
        if "failed" not in kinds(asked):
            found.append(f"a broken line of {project.file} went unnoticed: {asked}")
        return found

    def _logged(self, name: str, argv: Sequence[str | Path], cwd: Path) -> int:
        """Run a program that writes into a log; its exit status."""
        log = self._folder / f"{name}.log"
        say(f"{self._project.name}: {name}, {log}")
        with log.open("wb") as output:
            done = subprocess.run(
                argv,
                cwd=cwd,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        lines = log.read_text(errors="replace").splitlines()
        say(f"{self._project.name}: {name}: {lines[-1] if lines else 'it said nothing'}")
        return done.returncode


def drawn(found: Sequence[str], most: int) -> list[str]:
    """At most so many of them, the same ones each time, in their order."""
    if len(found) <= most:
        return list(found)
    numbers = random.Random(SEED).sample(range(len(found)), most)
    return [found[number] for number in sorted(numbers)]


def environment() -> dict[str, str]:
    """What runs of pytest see of ours."""
    return {name: it for name, it in os.environ.items() if not name.startswith("PYTEST_")}


def compare(inside: Outcomes, plain: Outcomes, racy: Collection[str]) -> list[str]:
    """What differs between the two; of a racy test, only that one of them lacks it."""
    if "passed" not in kinds(plain):
        return ["no test passed with plain pytest in the guest"]
    found = []
    for name in sorted({*inside, *plain}):
        here, there = inside.get(name, ["missing"]), plain.get(name, ["missing"])
        text = f"{name}: inside {here}, plain {there}"
        if here == there:
            continue
        if name in inside and name in plain and name.rpartition("::")[2] in racy:
            say(f"(racy, not counted) {text}")
        else:
            found.append(text)
    return found


def outcomes(junit: Path, image: str) -> Outcomes:
    """What became of each test; without the image in its name."""
    found: Outcomes = {}
    if not junit.exists():
        return found
    for case in ET.parse(junit).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if image:
            name = re.sub(rf"\[{re.escape(image)}(?:\]$|-)", "[", name).removesuffix("[")
        them = found.setdefault(name, [])
        ends = [it for it in case if it.tag in ("error", "failure", "skipped")]
        them += [outcome(it) for it in ends] or ["passed"]
    return {name: sorted(them) for name, them in found.items()}


def outcome(end: ET.Element) -> str:
    """One of failed, error, skipped and xfailed; with the reason, where that is the test's."""
    if end.tag != "skipped":
        return {"failure": "failed"}.get(end.tag, end.tag)
    kind = "xfailed" if end.get("type") == "pytest.xfail" else "skipped"
    return f"{kind}: {end.get('message')}"


def kinds(found: Outcomes) -> list[str]:
    """All outcomes, without reasons."""
    return [it.partition(":")[0] for them in found.values() for it in them]


def plain_pytest(tree: Path, junit: Path, tests: Path, *, image: str, memory: str) -> None:
    """Run plain pytest in a guest that is made as for a run inside, and fetch what it reports."""
    from pytest_vmsandbox.core.settings import Settings
    from pytest_vmsandbox.guests.factory import GuestFactory
    from pytest_vmsandbox.inside.install import Payload, install

    payload = Payload.of(tree, say=say)
    with GuestFactory.open(Settings()) as factory, factory.boot(image, memory=memory) as guest:
        there = install(guest, payload)
        guest.push(tests, "/tmp/tests.txt")
        done = guest.run(
            [
                *("sh", "-c", 'PATH="$0:$PATH" exec python -m pytest "$@"', there.programs),
                *("--junitxml=/tmp/plain.xml", "@/tmp/tests.txt"),
            ],
            cwd=there.tree,
            env={"VMSANDBOX_GUEST": guest.name},
            check=False,
            timeout=SECONDS,
        )
        say(done.stdout + done.stderr)
        guest.pull("/tmp/plain.xml", junit)


def uv() -> str:
    """Its program."""
    from uv import find_uv_bin

    return find_uv_bin()


def call(*argv: str | Path, cwd: Path | None = None) -> None:
    """Run a program that must end well."""
    subprocess.run(argv, cwd=cwd, check=True)


def say(text: str) -> None:
    """For who waits."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
