"""Run the own suites of real projects inside a guest, and compare with plain pytest in that guest.

    python tests/acceptance/projects.py [--project NAME]... [--work DIR] [--image debian-13]

The projects' source distributions are fetched and checked against their digests. Each is unpacked and
installed, editable, into a virtual environment of its own, with what its tests need and this checkout.
Then, for each of them,

- `pytest --in-vm --vm=IMAGE` runs its whole suite, unchanged: the run that is judged;
- plain pytest runs it in such a guest, which got the same files in the same way: the oracle. Each test
  has to have the same outcome in both, and there have to be some;
- in a copy of the tree, a test looks where the project's module comes from, and a part of the suite runs,
  first as it is and then with a line of the module broken on this machine: the guest must notice.

Exit status 1 if anything differs. Tests that take many minutes where the CPU is emulated run with --slow
only. With emulation and four guests for each project, a project takes about ten minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 3600.0  # that plain pytest has in its guest
SHOWN = 30  # differences that are told one by one
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
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keeps all; the default is a temporary folder"
    )
    parser.add_argument("--image", default="debian-13")
    parser.add_argument("--memory", default="1GiB", help="of each guest (default: %(default)s)")
    parser.add_argument("--slow", action="store_true", help="with tests that take many minutes")
    parser.add_argument("--oracle", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.oracle:
        tree, junit = args.oracle
        plain_pytest(tree, junit, args.arguments, image=args.image, memory=args.memory)
        return 0
    with tempfile.TemporaryDirectory(prefix="vmsandbox-acceptance-") as scratch:
        work = (args.work or Path(scratch)).resolve()
        rows, bad = [], 0
        for project in PROJECTS:
            if project.name in (args.project or names):
                without = () if args.slow or not project.slow else ("-k", f"not ({project.slow})")
                tried = Trial(project, work / project.name, without, args.image, args.memory)
                bad += len(tried.differences())
                rows.append(tried.row())
    print(f"\n{'project':16}{'version':10}{'ids':>6}{'inside':>9}{'plain':>9}  outcomes")
    print("\n".join(rows))
    print(f"{bad} differences")
    return 1 if bad else 0


class Trial:
    """The runs of one project.

    Args:
        project: which.
        folder: holds all of it.
        selection: arguments for pytest.
        image, memory: of its guests.
    """

    def __init__(
        self, project: Project, folder: Path, selection: Sequence[str], image: str, memory: str
    ) -> None:
        self._project = project
        self._folder = folder
        self._selection = selection
        self._image = image
        self._memory = memory
        self._python = folder / "env" / "bin" / "python"
        self._tree = folder / project.name
        self._seconds = {"inside": 0.0, "plain": 0.0}
        self._inside: Outcomes = {}

    def differences(self) -> list[str]:
        """Run all; what is not as it has to be. It is printed, too."""
        found = []

        def differs(text: str) -> None:
            found.append(text)
            say(f"{self._project.name}: DIFFERS: {text}")

        self._prepare()
        self._inside = self._run_inside("inside", self._tree, *self._selection)
        unlike = compare(self._inside, self._run_plain(), self._project.racy)
        for text in unlike[:SHOWN]:
            differs(text)
        if len(unlike) > SHOWN:
            differs(f"and {len(unlike) - SHOWN} more")
        for text in self._check_pushed():
            differs(text)
        return found

    def row(self) -> str:
        """A line on it, for a table."""
        kinds = Counter(
            outcome.partition(":")[0] for them in self._inside.values() for outcome in them
        )
        return (
            f"{self._project.name:16}{self._project.version:10}{len(self._inside):6}"
            f"{self._seconds['inside']:7.0f} s{self._seconds['plain']:7.0f} s"
            f"  {', '.join(f'{number} {kind}' for kind, number in sorted(kinds.items()))}"
        )

    def _prepare(self) -> None:
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
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"),
            *("--no-binary", project.name, "--dest", self._folder, "--requirement", asked),
        )
        (archive,) = self._folder.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(self._folder, filter="data")
        archive.unlink()
        (unpacked,) = (it.parent for it in self._folder.glob("*/PKG-INFO"))
        unpacked.rename(self._tree)
        call(uv(), "venv", "--quiet", "--python", sys.executable, self._folder / "env")
        self._install(self._tree, "--editable", CHECKOUT, *project.needs)
        if project.git:
            call("git", "init", "--quiet", cwd=self._tree)
            call("git", "add", "--all", cwd=self._tree)

    def _install(self, tree: Path, *more: str | Path) -> None:
        call(
            *(uv(), "pip", "install", "--quiet", "--python", self._python),
            *("--editable", tree, *more),
        )

    def _run_inside(self, name: str, tree: Path, *arguments: str) -> Outcomes:
        """The judged run; what became of each test."""
        junit = self._folder / f"{name}.xml"
        junit.unlink(missing_ok=True)
        started = time.monotonic()
        status = self._logged(
            name,
            [
                *(self._python.with_name("pytest"), "--in-vm", f"--vm={self._image}"),
                *("-o", f"vm_memory={self._memory}", f"--junitxml={junit}", *arguments),
            ],
            tree,
        )
        if status not in (0, 1) or not junit.exists():
            say(f"{self._project.name}: pytest ended with status {status}")
        self._seconds[name] = time.monotonic() - started
        return outcomes(junit, self._image)

    def _run_plain(self) -> Outcomes:
        """The oracle; it runs in the project's environment, since it mirrors that."""
        junit = self._folder / "plain.xml"
        started = time.monotonic()
        self._logged(
            "plain",
            [
                *(self._python, Path(__file__).resolve(), "--oracle", self._tree, junit),
                *("--image", self._image, "--memory", self._memory, "--", *self._selection),
            ],
            self._tree,
        )
        self._seconds["plain"] = time.monotonic() - started
        return outcomes(junit, "")

    def _check_pushed(self) -> list[str]:
        """Whether it is the tree of this machine that is tested in the guest."""
        project, copy = self._project, self._folder / f"{self._project.name}-copy"
        shutil.copytree(self._tree, copy, symlinks=True)
        self._install(copy)
        pushed = Path(project.part.partition("::")[0]).parent / "test_vmsandbox_pushed.py"
        (copy / pushed).write_text(PUSHED.format(module=project.module, image=self._image))
        found = []
        asked = self._run_inside("pushed", copy, str(pushed), project.part)
        if not any("test_pushed" in it for it in asked) or set(kinds(asked)) != {"passed"}:
            found.append(f"not all passed in the copy: {asked}")
        file = copy / project.file
        text = file.read_text()
        assert text.count(project.line) == 1, project.line
        file.write_text(text.replace(project.line, project.broken))
        asked = self._run_inside("broken", copy, str(pushed), project.part)
        if "failed" not in kinds(asked):
            found.append(f"a broken line of {project.file} went unnoticed: {asked}")
        return found

    def _logged(self, name: str, argv: list[str | Path], cwd: Path) -> int:
        """Run a program that writes into a log; its exit status."""
        log = self._folder / f"{name}.log"
        say(f"{self._project.name}: {name}, {log}")
        env = {name: it for name, it in os.environ.items() if not name.startswith("PYTEST_")}
        with log.open("wb") as output:
            done = subprocess.run(
                argv,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        lines = log.read_text(errors="replace").splitlines()
        say(f"{self._project.name}: {name}: {lines[-1] if lines else 'it said nothing'}")
        return done.returncode


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


def plain_pytest(
    tree: Path, junit: Path, arguments: Sequence[str], *, image: str, memory: str
) -> None:
    """Run plain pytest in a guest that is made as for a run inside, and fetch what it reports."""
    from pytest_vmsandbox.core.settings import Settings
    from pytest_vmsandbox.guests.factory import GuestFactory
    from pytest_vmsandbox.inside.install import Payload, install

    payload = Payload.of(tree, say=say)
    with GuestFactory.open(Settings()) as factory, factory.boot(image, memory=memory) as guest:
        there = install(guest, payload)
        done = guest.run(
            [
                *("sh", "-c", 'PATH="$0:$PATH" exec python -m pytest "$@"', there.programs),
                *("--junitxml=/tmp/plain.xml", *arguments),
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
